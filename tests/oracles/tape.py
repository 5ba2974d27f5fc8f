"""Writes small training steps: forward operations on a tape, then their backward in reverse.

The backward operations read what ATen's read: the gradient of the output, and inputs, outputs or
both. Gradients of a value with several readers are added up by operations of their own; gradients
of parameters are outputs of the step and pile up.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from packlight.step import Buffer, BufferKind, Operation, Phase, StepGraph

KIB = 1024
_Backward = Callable[[int], None]
_Thunk = Callable[[], None]


@dataclass
class Tape:
    """A training step under construction. Sizes are KiB, durations are milliseconds.

    Every method that computes returns the id of the buffer that holds the result. Set `layer` to
    name the layer that the next operations belong to, backward operations included.
    """

    _operations: list[Operation] = field(default_factory=list)
    _buffers: list[Buffer] = field(default_factory=list)
    _backwards: list[_Thunk] = field(default_factory=list)
    _gradients: dict[int, int] = field(default_factory=dict)
    _shared: set[int] = field(default_factory=set)
    _outputs: list[int] = field(default_factory=list)
    _phase: Phase = Phase.FORWARD
    layer: str = ""

    def size(self, buffer: int) -> int:
        """Return the size of a buffer in KiB."""
        return self._buffers[buffer].bytes // KIB

    def _buffer(self, kib: int, kind: BufferKind, name: str) -> int:
        self._buffers.append(Buffer(len(self._buffers), kib * KIB, kind, name))
        return len(self._buffers) - 1

    def _run(
        self,
        name: str,
        reads: list[int],
        creates: list[tuple[int, BufferKind]],
        ms: float,
        *,
        workspace: int = 0,
        overwrite: int | None = None,
        can_recompute: bool = True,
        is_random: bool = False,
    ) -> list[int]:
        made = [self._buffer(kib, kind, f"{name}.{i}") for i, (kib, kind) in enumerate(creates)]
        # A gradient that a residual handed on unchanged still has another reader to come.
        overwrites: tuple[tuple[int, int], ...] = ()
        if overwrite is not None and overwrite not in self._shared:
            assert self.size(overwrite) == self.size(made[0])
            overwrites = ((made[0], overwrite),)
        self._operations.append(
            Operation(
                id=len(self._operations), name=name, reads=tuple(reads), creates=tuple(made),
                seconds=ms / 1e3, workspace_bytes=workspace * KIB, phase=self._phase,
                is_random=is_random, can_recompute=can_recompute,
                overwrites=overwrites, layer=self.layer,
            )
        )
        return made

    def input(self, kib: int) -> int:
        """Add the batch: resident, no gradient."""
        return self._buffer(kib, BufferKind.INPUT, "input")

    def _add_gradient(self, value: int, gradient: int) -> None:
        if self._buffers[value].kind.is_resident:
            return
        if value in self._gradients:
            first = self._gradients[value]
            kind = (self.size(value), BufferKind.GRADIENT)
            self._gradients[value] = self._run(
                "add_grad", [first, gradient], [kind], 0.02 * self.size(value), overwrite=first
            )[0]
        else:
            self._gradients[value] = gradient

    def _parameter_gradient(self, gradient: int) -> None:
        self._outputs.append(gradient)

    def linear(
        self, x: int, kib: int, ms: float, *, weight: int = 4, workspace: int = 0,
        split: bool = False,
    ) -> int:
        """A matmul or convolution: the backward reads the output's gradient, the input, the weight.

        Args:
            x: what it reads.
            kib: size of its result.
            ms: duration of the forward; the backward takes twice as long.
            weight: size of its parameter.
            workspace: of the forward and of each backward operation.
            split: two backward operations (as for a matmul) instead of one that creates both.
        """
        parameter = self._buffer(weight, BufferKind.PARAMETER, "weight")
        act, grad = BufferKind.ACTIVATION, BufferKind.GRADIENT
        y = self._run("linear", [x, parameter], [(kib, act)], ms, workspace=workspace)[0]
        needs_input = not self._buffers[x].kind.is_resident

        def backward(gy: int) -> None:
            if split or not needs_input:
                if needs_input:
                    gx = self._run(
                        "linear_grad_input", [gy, parameter], [(self.size(x), grad)], ms,
                        workspace=workspace,
                    )[0]
                gw = self._run(
                    "linear_grad_weight", [gy, x], [(weight, grad)], ms, workspace=workspace
                )[0]
            else:
                gx, gw = self._run(
                    "linear_backward", [gy, x, parameter], [(self.size(x), grad), (weight, grad)],
                    2 * ms, workspace=workspace,
                )
            self._parameter_gradient(gw)
            if needs_input:
                self._add_gradient(x, gx)

        self._backwards.append(self._from_gradient(y, backward))
        return y

    def pointwise(self, x: int, ms: float, *, reads_output: bool = False) -> int:
        """GELU (the backward reads the input) or ReLU (it reads the output; both run in place)."""
        size = self.size(x)
        name = "relu" if reads_output else "gelu"
        overwrite = x if reads_output and not self._buffers[x].kind.is_resident else None
        made = [(size, BufferKind.ACTIVATION)]
        y = self._run(name, [x], made, ms, overwrite=overwrite)[0]

        def backward(gy: int) -> None:
            reads = [gy, y if reads_output else x]
            made = [(size, BufferKind.GRADIENT)]
            gx = self._run(f"{name}_backward", reads, made, 1.3 * ms, overwrite=gy)[0]
            self._add_gradient(x, gx)

        self._backwards.append(self._from_gradient(y, backward))
        return y

    def norm(self, x: int, ms: float) -> int:
        """Layer norm: a second, small output that its backward reads; two parameters in one."""
        size = self.size(x)
        parameter = self._buffer(1, BufferKind.PARAMETER, "scale")
        made = [(size, BufferKind.ACTIVATION), (1, BufferKind.ACTIVATION)]
        y, statistics = self._run("norm", [x, parameter], made, ms)

        def backward(gy: int) -> None:
            made = [(size, BufferKind.GRADIENT), (1, BufferKind.GRADIENT)]
            reads = [gy, x, statistics, parameter]
            gx, gp = self._run("norm_backward", reads, made, 2 * ms)
            self._parameter_gradient(gp)
            self._add_gradient(x, gx)

        self._backwards.append(self._from_gradient(y, backward))
        return y

    def dropout(self, x: int, ms: float) -> int:
        """Random: an output and a mask, of which the backward reads the mask alone."""
        size = self.size(x)
        mask_size = max(1, size // 4)
        made = [(size, BufferKind.ACTIVATION), (mask_size, BufferKind.ACTIVATION)]
        y, mask = self._run("dropout", [x], made, ms, is_random=True)

        def backward(gy: int) -> None:
            made = [(size, BufferKind.GRADIENT)]
            gx = self._run("dropout_backward", [gy, mask], made, ms, overwrite=gy)[0]
            self._add_gradient(x, gx)

        self._backwards.append(self._from_gradient(y, backward))
        return y

    def attention(self, x: int, ms: float, *, workspace: int = 0) -> int:
        """Its backward reads input, output and the row sums: no recompute frees it of either."""
        size = self.size(x)
        made = [(size, BufferKind.ACTIVATION), (1, BufferKind.ACTIVATION)]
        y, row_sums = self._run("attention", [x], made, ms, workspace=workspace)

        def backward(gy: int) -> None:
            made = [(size, BufferKind.GRADIENT)]
            gx = self._run(
                "attention_backward", [gy, x, y, row_sums], made, 2.5 * ms, workspace=2 * workspace
            )[0]
            self._add_gradient(x, gx)

        self._backwards.append(self._from_gradient(y, backward))
        return y

    def add(self, a: int, b: int, ms: float) -> int:
        """A residual: its backward runs nothing, both inputs get the same gradient."""
        made = [(self.size(a), BufferKind.ACTIVATION)]
        y = self._run("add", [a, b], made, ms)[0]

        def backward(gy: int) -> None:
            self._shared.add(gy)
            self._add_gradient(a, gy)
            self._add_gradient(b, gy)

        self._backwards.append(self._from_gradient(y, backward))
        return y

    def multiply(self, a: int, b: int, ms: float) -> int:
        """A gate: its backward reads both inputs and creates two gradients."""
        size = self.size(a)
        y = self._run("mul", [a, b], [(size, BufferKind.ACTIVATION)], ms)[0]

        def backward(gy: int) -> None:
            made = [(size, BufferKind.GRADIENT), (size, BufferKind.GRADIENT)]
            ga, gb = self._run("mul_backward", [gy, a, b], made, 2 * ms)
            self._add_gradient(a, ga)
            self._add_gradient(b, gb)

        self._backwards.append(self._from_gradient(y, backward))
        return y

    def concatenate(self, parts: list[int], ms: float) -> int:
        """A skip connection's end: the backward copies the gradient apart, reading nothing else."""
        sizes = [self.size(part) for part in parts]
        y = self._run("cat", parts, [(sum(sizes), BufferKind.ACTIVATION)], ms)[0]

        def backward(gy: int) -> None:
            made = [(size, BufferKind.GRADIENT) for size in sizes]
            for part, gradient in zip(parts, self._run("split", [gy], made, ms), strict=True):
                self._add_gradient(part, gradient)

        self._backwards.append(self._from_gradient(y, backward))
        return y

    def finish(self, x: int, ms: float) -> StepGraph:
        """End in a loss whose backward reads the log-probabilities; return the whole step."""
        size = self.size(x)
        made = [(1, BufferKind.OUTPUT), (size, BufferKind.ACTIVATION)]
        loss, log_probabilities = self._run("loss", [x], made, ms)
        num_forward = len(self._operations)
        self._phase = Phase.BACKWARD
        made = [(size, BufferKind.GRADIENT)]
        self._gradients[x] = self._run("loss_backward", [log_probabilities], made, ms)[0]
        for backward in reversed(self._backwards):
            backward()
        return StepGraph(
            tuple(self._operations), tuple(self._buffers), num_forward,
            (loss,), (loss, *self._outputs),
        )

    def _from_gradient(self, y: int, backward: _Backward) -> _Thunk:
        layer = self.layer

        def run() -> None:
            self.layer = layer
            if y in self._gradients:
                backward(self._gradients.pop(y))

        return run
