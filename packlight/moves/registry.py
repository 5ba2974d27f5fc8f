"""All moves there are: Packlight's own, and those that installed packages bring.

A package announces a class derived from `Move` as an entry point:

    [project.entry-points."packlight.moves"]
    my-move = "my_package.moves:MyMove"

Its `name` is then known to `moves=`, to a way's JSON, and to the search.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from packlight.errors import MoveError, OptionError, PacklightError
from packlight.moves.channels_last import ChannelsLast
from packlight.moves.chunk.move import Chunk
from packlight.moves.data_parallel import DataParallel
from packlight.moves.fuse.move import Fuse, FuseExactly
from packlight.moves.in_backward import GroupUpdates, UpdateInBackward
from packlight.moves.lossy.move import Lossy
from packlight.moves.microbatch.move import Microbatch
from packlight.moves.move import Effect, Move, Stage
from packlight.moves.pack import Pack
from packlight.moves.precision import Autocast
from packlight.moves.stream.move import Offload

GROUP = "packlight.moves"
BUILT_IN: tuple[type[Move], ...] = (
    Autocast, UpdateInBackward, Microbatch, ChannelsLast, Pack, Chunk, Lossy, Fuse, FuseExactly,
    GroupUpdates, DataParallel, Offload,
)


@cache
def registered() -> tuple[type[Move], ...]:
    """Return all moves, in the order in which they are looked at within their stages.

    Raises:
        MoveError: an entry point does not load, or is no move, or has a name that is taken.
    """
    known = {move.name: move for move in BUILT_IN}
    for entry in sorted(entry_points(group=GROUP), key=lambda e: e.name):
        move = _loaded(entry)
        if known.setdefault(move.name, move) is not move:
            raise MoveError(move.name, _origin(entry), "its name is another move's")
    return tuple(known.values())


def _loaded(entry: EntryPoint) -> type[Move]:
    try:
        move = entry.load()
    except Exception as error:
        raise MoveError(
            entry.name, _origin(entry), f"it does not load: {type(error).__name__}: {error}"
        ) from error
    if not (isinstance(move, type) and issubclass(move, Move)):
        raise MoveError(
            entry.name, _origin(entry), f"{entry.value} is no class derived from packlight's Move"
        )
    missing = [name for name in ("name", "effect") if not hasattr(move, name)]
    if missing:
        raise MoveError(entry.name, _origin(entry), f"{entry.value} has no {missing[0]!r}")
    return move


@contextmanager
def of_package(move: Move | type[Move]) -> Iterator[None]:
    """Have what goes wrong in a move that a package brings raised as a `MoveError` that names it.

    Packlight's own errors pass: a move may refuse in their words.
    """
    kind = move if isinstance(move, type) else type(move)
    try:
        yield
    except PacklightError:
        raise
    except Exception as error:
        if kind in BUILT_IN:
            raise
        package = kind.__module__.partition(".")[0]
        raise MoveError(kind.name, package, f"{type(error).__name__}: {error}") from error


def _origin(entry: EntryPoint) -> str:
    return entry.dist.name if entry.dist is not None else entry.value


def of_stage(stage: Stage) -> list[type[Move]]:
    """Return the moves of one stage."""
    return [move for move in registered() if move.stage is stage]


def move_names(*, on_request: bool = False) -> tuple[str, ...]:
    """Return what `moves=` may name: what is done to a loss before it is traced is `allow=`'s.

    Args:
        on_request: also those that are only made where they are named.
    """
    return tuple(
        move.name for move in registered()
        if move.stage is not Stage.LOSS and (on_request or not move.is_on_request)
    )


def exact_move_names() -> tuple[str, ...]:
    """Return those made unasked that change no bit of losses, gradients and parameters."""
    exact = {move.name for move in registered() if move.effect is Effect.SAME_BITS}
    return tuple(name for name in move_names() if name in exact)


def technique_names() -> tuple[str, ...]:
    """Return what `allow=` may name."""
    names = dict.fromkeys(name for move in registered() for name in techniques_of(move))
    return tuple(names)


def techniques_of(move: type[Move]) -> tuple[str, ...]:
    """Return what `allow=` has to name for a move: its own name where it is approximate."""
    if move.effect is Effect.APPROXIMATE and not move.techniques:
        return (move.name,)
    return move.techniques


def move_named(name: str) -> type[Move]:
    """Return the move of a name.

    Raises:
        OptionError: there is none; lists the known ones.
    """
    for move in registered():
        if move.name == name:
            return move
    known = ", ".join(repr(move.name) for move in registered())
    raise OptionError(f"unknown move {name!r}\nhint: known moves are {known}")


def chosen_names(moves: Iterable[str] | None) -> frozenset[str]:
    """Return the names that `moves=` stands for, checked; for None all that are made unasked.

    Raises:
        OptionError: one is unknown; lists the known ones.
    """
    known = move_names(on_request=True)
    names = frozenset(move_names() if moves is None else moves)
    strange = sorted(names - set(known))
    if strange:
        raise OptionError(
            f"unknown move {strange[0]!r}\nhint: known moves are {', '.join(map(repr, known))}"
        )
    return names


def checked_techniques(allow: Any, known: Collection[str] = ()) -> tuple[str, ...]:
    """Return the names of approximate techniques that were allowed, checked."""
    names = (allow,) if isinstance(allow, str) else tuple(allow)
    strange = [name for name in names if name not in known]
    if strange:
        hint = f"known techniques here: {', '.join(map(repr, known))}" if known else (
            "no approximate technique is available here; leave allow empty"
        )
        raise OptionError(f"unknown technique {strange[0]!r} in allow\nhint: {hint}")
    return names
