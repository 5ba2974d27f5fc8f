"""Captures the joint graph behind `loss_fn(model, batch)`, and later runs a program in its place.

Dynamo traces the call, guards it, and collects its inputs (parameters, model buffers, tensors of
the batch) at every call; AOTAutograd adds the backward. Both are asked for nothing else: what runs
is the program that `install` is given.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn

from packlight.capture import kept
from packlight.capture.aot import drop_other_tangents, user_results, written_back
from packlight.capture.batch import Dicts, dicts_of, own
from packlight.capture.casts import merge_casts
from packlight.capture.collectives import merge_waits
from packlight.capture.derivative import is_derivative
from packlight.capture.dropout import use_eager_dropout
from packlight.capture.dynamo import (
    Returned,
    detach_all_but,
    made_traceable,
    native_calls,
    plain_errors,
    prepare_dynamo,
    refuse_graph_break,
    refuse_values,
    returned_places,
    specialize,
)
from packlight.capture.guards import guard_what_dynamo_trusts
from packlight.capture.results import check_arguments, loss_index_of
from packlight.capture.returned import detached
from packlight.capture.sizes import Changing, is_symbolic, sizes_as_symbols, with_sizes
from packlight.errors import GraphBreakError, PacklightError, UnsupportedModelError
from packlight.torch_internals.aot import aot_compiler, numbers_stay_numbers
from packlight.torch_internals.dynamo import (
    gradients_inside,
    many_entries,
    quick_tracing,
    with_own_cache,
)

# So many traced calls are remembered for batches of the same tensors.
MOST_ENTRIES = 32
NOT_COMPILED = (
    "torch.compile is switched off here, so no planned step can run: a torch dispatch mode is on, "
    "or torch.compiler.set_stance('force_eager')\nhint: call the step without that"
)
INSIDE_COMPILED = (
    "a planned step cannot be traced into another compiled function\n"
    "hint: call it outside, or from a function under torch.compiler.disable"
)

# Returns a scalar tensor, or a tuple that begins with one.
LossFunction = Callable[[nn.Module, Any], Any]


@dataclass(frozen=True)
class CapturedLoss:
    """The joint graph of one call of a loss function.

    Attributes:
        joint: placeholders are primals then tangents; outputs are forward results then gradients.
        num_forward_outputs: how many of the outputs are forward results.
        written_back: forward result -> primal whose new value it is.
        loss_index: which forward result is the loss.
        returned: what dynamo is given back, in order: forward results; among them are tensors that
            the forward assigns to attributes.
        extras: which of those the loss function returns beside the loss.
        arguments: the real primals of the captured call, in order.
        key: what tells the traced graph from any other (see kept.py); None where nothing does.
        is_derivative: of a graph with a key, whether its backward is sure to be the derivative.
    """

    joint: fx.GraphModule
    num_forward_outputs: int
    written_back: dict[int, int]
    loss_index: int
    returned: tuple[int, ...]
    extras: tuple[int, ...]
    arguments: list[Any]
    key: str | None = None
    is_derivative: bool = False

    @property
    def same_as_primal(self) -> dict[int, int]:
        """Returned results that are a primal with its new value: forward result -> primal."""
        results = self.joint.graph.find_nodes(op="output")[0].args[0]
        primal_of = {results[i]: primal for i, primal in self.written_back.items()}
        return {i: primal_of[results[i]] for i in self.returned if results[i] in primal_of}

    @property
    def assigned(self) -> tuple[torch.Tensor, ...]:
        """What attributes hold after the step: fake tensors with storages of their own."""
        return self._values({*self.returned} - {*self.extras})

    @property
    def extra_values(self) -> tuple[torch.Tensor, ...]:
        """What is returned beside the loss: fake tensors with storages of their own."""
        return self._values({*self.extras})

    def _values(self, indices: set[int]) -> tuple[torch.Tensor, ...]:
        results = self.joint.graph.find_nodes(op="output")[0].args[0]
        others = indices - {self.loss_index} - self.same_as_primal.keys()
        return tuple(
            results[i].meta["val"] for i in sorted(others) if isinstance(results[i], fx.Node)
        )


class _CapturedError(Exception):
    """Ends a capture: the joint graph is known and nothing has run."""


# From the primals to what dynamo is given back.
Program = Callable[[list[Any]], Sequence[Any]]


class CapturedAgainError(Exception):
    """A guard of the traced call failed: the step is another one, and nothing of it has run.

    Attributes:
        program: what was installed for that step; None if it is new.
    """

    def __init__(self, program: Program | None = None) -> None:
        super().__init__("the traced call is another one")
        self.program = program


@dataclass
class _Entry:
    """One graph that dynamo traced, and what runs in its place.

    Attributes:
        joint: behind it, and how many of its results are the forward's; None once it was taken.
        returned: which of its results the loss function returns.
        arguments: of the call that was captured last.
        sizes: what that call's symbols stand for; empty where there are none.
        programs: by sizes.
        is_taken: whether the joint graph was taken.
    """

    joint: tuple[fx.GraphModule, int] | None = None
    returned: Returned = field(default_factory=Returned)
    arguments: list[Any] = field(default_factory=list)
    sizes: tuple[int, ...] = ()
    programs: dict[tuple[int, ...], Program] = field(default_factory=dict)
    is_taken: bool = False
    key: str | None = None
    is_derivative: bool = False


class StepCapture:
    """One compiled call of a loss function, for batches of the same tensors.

    What else the traced code depends on (plain values in the batch, attributes of the model) dynamo
    guards: for each there is an entry of its own. Calling it runs the program that was installed
    for the entry whose guards hold.

    Args:
        loss_fn: the user's, perhaps under autocast.
        model: the user's.
        changing: sizes of the batch's tensors for which there may be symbols: then one entry is for
            all sizes that its guards let pass, with a program for each.
    """

    def __init__(
        self, loss_fn: LossFunction, model: nn.Module, changing: Changing | None = None
    ) -> None:
        prepare_dynamo()
        self.loss_fn, self.model, self.changing = loss_fn, model, changing or {}
        self._start_over()

    def _start_over(self) -> None:
        self._entry = _Entry()
        self._entries: list[_Entry] = []
        self._expected: Program | None = None
        function = with_own_cache(_traced_loss)
        # Dynamo remembers every backend for good; what hangs on this one must not live as long.
        this = weakref.ref(self)

        def backend(module: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
            capture = this()
            assert capture is not None, "the compiled function belongs to the capture"
            return capture._backend(module, inputs)

        self._compiled = torch.compile(function, backend=backend, fullgraph=True, dynamic=False)

    def capture(self, batch: Any) -> CapturedLoss:
        """Return the joint graph of a call without running it.

        Raises:
            GraphBreakError: the call is not one graph.
            UnsupportedModelError: no gradient depends on the loss, or it is no scalar.
        """
        self._expected = None
        with sizes_as_symbols(batch, self.changing):
            try:
                self._trace(batch)
            except GraphBreakError as error:
                if not made_traceable(self.model, error):
                    raise
                self._trace(batch)
            if self._entry.is_taken:  # its graph is gone: it was planned before, or did not fit
                self._start_over()
                self._trace(batch)
        if self._entry.joint is None:
            raise UnsupportedModelError(
                "the loss does not depend on any parameter that needs a gradient"
            )
        joint, num_forward_outputs = self._entry.joint
        arguments, self._entry.arguments = self._entry.arguments, []
        if is_symbolic(joint):
            joint = with_sizes(joint, num_forward_outputs, self._entry.sizes)
        else:
            self._entry.joint, self._entry.is_taken = None, True
        drop_other_tangents(joint)
        placeholders = [n for n in joint.graph.nodes if n.op == "placeholder"]
        primals = placeholders[: len(arguments)]
        merge_casts(joint, primals)
        use_eager_dropout(joint)
        merge_waits(joint)
        mutated = written_back(joint, num_forward_outputs)
        returned = user_results(joint, num_forward_outputs)
        loss_index = loss_index_of(joint, returned, self._entry.returned.loss, mutated)
        check_arguments(primals, arguments, len(placeholders))
        extras = tuple(returned[place] for place in self._entry.returned.extras)
        return CapturedLoss(
            joint, num_forward_outputs, mutated, loss_index, returned, extras, arguments,
            self._entry.key, self._entry.is_derivative,
        )

    def _trace(self, batch: Any) -> None:
        try:
            with plain_errors(), torch.enable_grad(), quick_tracing(), _tracing():
                self._compiled(self.loss_fn, self.model, batch, dicts_of(batch))
        except _CapturedError:
            pass

    def install(self, program: Program) -> None:
        """Set what runs with the primals of the latest captured call."""
        self._entry.programs[self._entry.sizes] = program

    def remove(self, program: Program) -> None:
        """Take an installed program away: calls that it stood for are captured again."""
        for entry in self._entries:
            for sizes in [sizes for sizes, mine in entry.programs.items() if mine is program]:
                del entry.programs[sizes]

    @property
    def num_traced(self) -> int:
        """How many calls dynamo has traced."""
        return len(self._entries)

    @property
    def is_full(self) -> bool:
        """Whether dynamo would trace no further entry."""
        return len(self._entries) >= MOST_ENTRIES

    def __call__(self, batch: Any, program: Program) -> Any:
        """Run an installed program on a batch of the captured signature.

        Args:
            batch: whose tensors are like those of the captured one.
            program: that is ready to run.

        Returns:
            What the loss function does, without gradients.

        Raises:
            CapturedAgainError: the traced call depends on something that is not as it was for this
                program; `capture` must be called, or another program be made ready.
            UnsupportedModelError: torch.compile is switched off here: nothing has run.
        """
        if torch.compiler.is_compiling():  # inside another traced function, which leaves it alone
            raise UnsupportedModelError(INSIDE_COMPILED)
        self._expected = program
        try:
            with plain_errors(), torch.enable_grad(), _tracing():
                return self._compiled(self.loss_fn, self.model, batch, dicts_of(batch))
        except _CapturedError:
            entry = self._entry
            raise CapturedAgainError(entry.programs.get(entry.sizes)) from None

    # -- the dynamo backend

    def _backend(self, module: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        refuse_graph_break()
        refuse_values(module)
        if not self.changing:
            specialize(inputs)
        guard_what_dynamo_trusts(module)
        entry = self._entry = _Entry(returned=returned_places(module))
        self._entries.append(entry)
        entry.is_derivative = is_derivative(module)
        if entry.returned.loss is not None:
            detach_all_but(module, entry.returned.loss)
        key = entry.key = kept.key_of(module, inputs)
        entry.joint = None if key is None else kept.load(key)
        if entry.joint is None:
            entry.joint = _joint_graph(module, inputs)
            if key is not None and entry.joint is not None:
                kept.save(key, *entry.joint)

        # Dynamo puts what it is given into the module's globals and leaves it there.
        this, mine = weakref.ref(self), weakref.ref(entry)

        def run(*arguments: Any) -> Any:
            capture, entry = this(), mine()
            assert capture is not None and entry is not None
            sizes = tuple([a for a in arguments if type(a) is int])
            tensors = [a for a in arguments if type(a) is not int] if sizes else list(arguments)
            program = entry.programs.get(sizes)
            if program is None or program is not capture._expected:
                capture._entry, entry.sizes = entry, sizes
                entry.arguments = tensors if program is None else []
                raise _CapturedError
            return program(tensors)

        return run


@contextmanager
def _tracing() -> Iterator[None]:
    with many_entries(MOST_ENTRIES), gradients_inside():
        yield


def _traced_loss(
    loss_fn: LossFunction, model: nn.Module, batch: Any, dicts: Dicts | None
) -> Any:
    if not torch.compiler.is_compiling():  # known while tracing: not a part of the traced call
        raise UnsupportedModelError(NOT_COMPILED)
    return detached(loss_fn(model, own(batch, dicts)))


def _joint_graph(
    module: fx.GraphModule, inputs: Sequence[Any]
) -> tuple[fx.GraphModule, int] | None:
    """Return the joint graph behind a traced call and how many of its results are the forward's.

    None where there is no backward.
    """
    joints: list[tuple[fx.GraphModule, int]] = []

    def take_joint(
        joint: fx.GraphModule, num_forward_outputs: int
    ) -> tuple[fx.GraphModule, fx.GraphModule]:
        joints.append((joint, num_forward_outputs))
        raise _CapturedError

    with native_calls(), numbers_stay_numbers(), suppress(_CapturedError):
        aot_compiler(_as_it_is, take_joint)(module, inputs)
    return joints[-1] if joints else None


def _as_it_is(module: fx.GraphModule, inputs: Any) -> Callable[..., Any]:
    """Reached where there is no backward: `capture` tells the user."""
    forward: Callable[..., Any] = module.forward
    return forward


@contextmanager
def naming_failures() -> Iterator[None]:
    """Raise what fails while forward and backward are traced as an error of ours."""
    try:
        yield
    except (PacklightError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        first_line = str(error).strip().partition("\n")[0]
        raise UnsupportedModelError(
            f"the loss or its backward fails when it is traced\n  {type(error).__name__}: "
            f"{first_line}\nhint: a step in eager PyTorch shows whether it fails there, too"
        ) from error
