"""How dynamo is brought to break a traced function anywhere.

By itself it leaves a whole function to eager PyTorch where it would have to go on in the middle of
a loop; here it goes on, for the backends that ask for it, and says what it leaves out.
"""

from __future__ import annotations

import functools
import inspect
import warnings
import weakref
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import BuiltinMethodType, CodeType
from typing import Any, Protocol
from unittest import mock

from packlight.torch_internals.dynamo import dynamo_errors

# Every turn of an unrolled loop is another entry in a cache that dynamo wants small.
MANY_ENTRIES = 1_000_000
CONTAINERS = (list, dict, set, deque, OrderedDict, defaultdict)


class BreaksAnywhere(Protocol):
    """Who has pieces of functions compiled."""

    def left_to_eager(self, code: CodeType, reason: str) -> None:
        """Take note that a function will run uncompiled; an error raised here comes out."""


# What was passed to `torch.compile` as its backend, as dynamo has it -> who has pieces compiled.
Find = Callable[[Any], BreaksAnywhere | None]
_finders: weakref.WeakKeyDictionary[Any, Find] = weakref.WeakKeyDictionary()


def break_anywhere(backend: Callable[..., Any], find: Find) -> None:
    """Have dynamo break functions compiled for a backend wherever it has to.

    Relied upon: `convert_frame._compile` is found among its module's names, takes the backend and
    whether it must not break as `compiler_fn` and `one_graph` (positions 5 and 6), returns
    something with `skip_reason` or raises; `innermost_backend` takes wrappers off, except that of
    `torch.compile`, which has the backend as `compiler_fn`.
    """
    from torch._dynamo import convert_frame
    from torch._dynamo.eval_frame import innermost_backend

    _finders[backend] = find
    original: Any = convert_frame._compile
    if hasattr(original, "breaks_anywhere"):
        return

    @functools.wraps(original)
    def compile_pieces(code: CodeType, *args: Any, **kwargs: Any) -> Any:
        compiler_fn, one_graph = args[4], args[5]
        asker = None if one_graph else _asker(innermost_backend(compiler_fn))
        if asker is None:
            return original(code, *args, **kwargs)
        try:
            with _cut_everywhere():
                result = original(code, *args, **kwargs)
        except dynamo_errors()[1] as error:  # dynamo goes on without this function
            asker.left_to_eager(code, str(error))
            raise
        if result.skip_reason is not None:
            asker.left_to_eager(code, result.skip_reason)
        return result

    compile_pieces.breaks_anywhere = True  # type: ignore[attr-defined]
    convert_frame._compile = compile_pieces


def _asker(given: Any) -> BreaksAnywhere | None:
    try:
        find = _finders.get(getattr(given, "compiler_fn", given))
    except TypeError:  # no weak reference can be had of it
        return None
    return None if find is None else find(given)


@contextmanager
def _cut_everywhere() -> Iterator[None]:
    """Let dynamo go on after breaks in loops and in functions that are called.

    Relied upon: `config.nested_graph_breaks`, `allow_empty_graphs` (a function of which nothing is
    left to compile is not skipped for good), `recompile_limit`, `accumulated_recompile_limit`;
    `maybe_has_backedge` says whether a break would be in a loop. None of the user's code runs
    meanwhile, so what is warned of (gradients of values between pieces, functions that break) is
    none of the user's business: breaks are told by `describe`.
    """
    from torch._dynamo import config, symbolic_convert
    from torch._dynamo.variables import iter as iterators
    from torch._dynamo.variables.builder import VariableBuilder

    translator = symbolic_convert.InstructionTranslatorBase
    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        stack.enter_context(
            config.patch(
                nested_graph_breaks=True,
                allow_empty_graphs=True,
                recompile_limit=MANY_ENTRIES,
                accumulated_recompile_limit=MANY_ENTRIES,
            )
        )
        stack.enter_context(mock.patch.object(translator, "maybe_has_backedge", _never))
        for iterator in (iterators.DictViewIterator, iterators.ZipVariable):
            made = _made_again(iterator.reconstruct)
            stack.enter_context(mock.patch.object(iterator, "reconstruct", made))
        wrap = _knowing_methods_by_name(VariableBuilder._wrap)
        stack.enter_context(mock.patch.object(VariableBuilder, "_wrap", wrap))
        yield


def _never(_: Any) -> bool:
    return False


def _knowing_methods_by_name(wrap: Callable[..., Any]) -> Callable[..., Any]:
    """Return how a value becomes known behind a break: methods of containers by their names.

    What waits for its argument (`layers.append(layer(x))`) is made anew in each call, so dynamo,
    which knows it by its identity, would compile what follows in every step again.

    Relied upon: `VariableBuilder._wrap` is given the value, knows its `source` and `tx`;
    `BoundBuiltinMethodVariable` takes a descriptor and the container. Where the latter is not
    there, nothing is changed.
    """
    from torch._dynamo import guards, source
    from torch._dynamo.variables import base, functions

    variable = getattr(functions, "BoundBuiltinMethodVariable", None)

    def wrapped(self: Any, value: Any) -> Any:
        # Nothing is asked of other values: who knows what their attributes do.
        container = value.__self__ if type(value) is BuiltinMethodType else None
        if variable is None or self.source is None or type(container) not in CONTAINERS:
            return wrap(self, value)
        name = source.AttrSource(self.source, "__name__")
        guards.install_guard(name.make_guard(guards.GuardBuilder.EQUALS_MATCH))
        known = base.VariableTracker.build(
            self.tx, container, source.AttrSource(self.source, "__self__")
        )
        descriptor = inspect.getattr_static(type(container), value.__name__)
        return variable(descriptor, known, source=self.source)

    return wrapped


def _made_again(reconstruct: Callable[..., None]) -> Callable[..., None]:
    """Return how an iterator is made again behind a break: over a tuple of what it has left.

    Dynamo cannot make those of dictionaries again, nor take up those of `zip`.
    """

    def over_what_is_left(self: Any, codegen: Any) -> None:
        from torch._dynamo.variables.lists import ListIteratorVariable

        left = _left(self)
        if left is None:
            reconstruct(self, codegen)
        else:
            ListIteratorVariable(left).reconstruct(codegen)

    return over_what_is_left


def _left(iterator: Any) -> list[Any] | None:
    """Return what a traced iterator has left; None where that is not known.

    Relied upon: `items`, `index`, `is_exhausted` of lists' iterators; `_iter`, an iterator of
    Python's, and `view_type` of dictionaries'; `start`, `step`, `len` of ranges'; `iterable.items`
    of `zip`'s.
    """
    from torch._dynamo.variables import ConstantVariable, TupleVariable, lists
    from torch._dynamo.variables import iter as iterators

    if isinstance(iterator, lists.ListIteratorVariable):
        return [] if iterator.is_exhausted else iterator.items[iterator.index :]
    if isinstance(iterator, iterators.DictViewIterator):
        rest: Any = iterator._iter.__reduce__()
        left: list[Any] = rest[1][0]
        if iterator.view_type == "keys":
            return [key.vt for key in left]
        if iterator.view_type == "values":
            return left
        return [TupleVariable([key.vt, value]) for key, value in left]
    if isinstance(iterator, lists.RangeIteratorVariable):
        numbers = (iterator.start + i * iterator.step for i in range(iterator.len))
        return [ConstantVariable.create(number) for number in numbers]
    if isinstance(iterator, iterators.ZipVariable):
        columns = [_left(one) for one in iterator.iterable.items]
        known = [column for column in columns if column is not None]
        if len(known) < len(columns):
            return None
        return [TupleVariable(list(row)) for row in zip(*known, strict=False)]
    return None
