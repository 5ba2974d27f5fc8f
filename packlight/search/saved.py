"""Ways as JSON text, in files and in the cache of ways.

    {"format": "packlight", "version": 2, "type": "way", "value": {"moves": [{"move": "pack"}, ...

The cache is only ever a hint: what is found there is bound to the step and judged by `simulate`
like a way that somebody hands over (`restore.py`), and whatever is wrong with it makes it a miss.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from packlight.costs.cache import cache_directory
from packlight.errors import FormatError
from packlight.moves.draft import Draft
from packlight.moves.move import Move
from packlight.moves.registry import move_named, registered
from packlight.ranks.collectives import is_heard
from packlight.search.plan_way import environment
from packlight.search.way import Way
from packlight.step.serialize import decode, encode, read_document, write_document
from packlight.updates.several import parts_of
from packlight.updates.twin import kinds_of_settings

NO_CACHE_VARIABLE = "PACKLIGHT_NO_WAY_CACHE"


def way_to_json(way: Way) -> str:
    """Return a way as JSON text that `way_from_json` reads back as an equal one."""
    value = encode(replace(way, moves=()))
    value["moves"] = [{"move": move.name, **encode(move)} for move in way.moves]
    return write_document("way", value)


def way_from_json(text: str | bytes) -> Way:
    """Return the way that `way_to_json` wrote.

    Raises:
        FormatError: the text is cut short or describes no way.
        OptionError: it names a move that is not known here; lists those that are.
    """
    _, value = read_document(text, ("way",))
    if not isinstance(value, dict) or not isinstance(value.get("moves"), list):
        raise FormatError("way has no list of moves")
    way: Way = decode(Way, {**value, "moves": []}, "way")
    if not way.parts:
        raise FormatError("way.parts is empty")
    moves = [_move(item, f"way.moves[{place}]") for place, item in enumerate(value["moves"])]
    return replace(way, moves=tuple(moves))


def _move(value: Any, where: str) -> Move:
    if not isinstance(value, dict) or not isinstance(value.get("move"), str):
        raise FormatError(f"{where} names no move")
    setting = {name: content for name, content in value.items() if name != "move"}
    move: Move = decode(move_named(value["move"]), setting, where)
    return move


def read_way(path: str | os.PathLike[str]) -> Way:
    """Return the way in a file.

    Raises:
        FormatError: there is none that can be read; names the file.
        OptionError: it names a move that is not known here.
    """
    try:
        return way_from_json(Path(path).read_bytes())
    except (OSError, FormatError) as error:
        raise FormatError(f"{os.fspath(path)}: {error}") from error


def write_way(way: Way, path: str | os.PathLike[str]) -> None:
    """Write a way to a file, whole or not at all.

    Raises:
        OSError: it cannot be written; what was there stays.
    """
    target = Path(path)
    with tempfile.NamedTemporaryFile("w", dir=target.parent, delete=False) as file:
        file.write(way_to_json(way))
    os.replace(file.name, target)


def cached_way(key: str) -> Way | None:
    """Return the way that was remembered under a key, None if there is none to be read."""
    try:
        return way_from_json(_path(key).read_bytes())
    except (OSError, ValueError):
        return None


def remember_way(key: str, way: Way) -> None:
    """Remember a way; a cache that cannot be written costs only time."""
    try:
        _path(key).parent.mkdir(parents=True, exist_ok=True)
        write_way(way, _path(key))
    except OSError:
        pass


def _path(key: str) -> Path:
    return cache_directory() / "ways" / f"{key}.json"


def cache_key(whole: Draft) -> str | None:
    """Return what tells a step from all others that would be run otherwise; None for no caching.

    Args:
        whole: the draft of the whole batch, traced.
    """
    request = whole.request
    is_for_nobody = request.modelled is not None or request.is_weightless
    if os.environ.get(NO_CACHE_VARIABLE) or callable(request.loss_weight) or is_for_nobody:
        return None  # (what a function of the user's does, no key can tell)
    content = [
        version("packlight"),
        encode(environment(whole.costs.device)),
        [move.name for move in registered()],
        request.budget_bytes, sorted(request.moves), sorted(request.allow), request.accumulates,
        whole.costs.beside.bytes_beside(()),
        request.max_gradient_error,
        request.clipping.norm is None, request.clipping.value is None,
        request.scaler is None, str(request.loss_weight), whole.offered is None,
        [f"{type(part)} {kinds_of_settings(part)}" for part in parts_of(request.optimizer)],
        whole.costs.optimizer_bytes,
        None if request.ranks is None else [
            whole.costs.agreed_buckets, request.placements, request.is_talkative,
            *(r and r.size for r in (
                request.ranks, request.data_ranks, request.tensor_ranks, request.shard_ranks
            )),
        ],
        graph_digest(whole.graph_module),
    ]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def graph_digest(module: fx.GraphModule) -> str:
    """Return a digest of a graph's calls: targets, literal arguments, shapes, dtypes, strides."""
    place_of: dict[fx.Node, int] = {}

    def described(leaf: Any) -> str:
        if isinstance(leaf, fx.Node):
            return f"%{place_of[leaf]}"
        if isinstance(leaf, torch.Tensor):
            return f"{leaf.dtype}{tuple(leaf.shape)}{tuple(leaf.stride())}{leaf.device}"
        if isinstance(leaf, str) and is_heard(leaf):  # a group's name, another in each process
            return "ranks"
        text = repr(leaf)
        return type(leaf).__name__ if " at 0x" in text else text

    digest = hashlib.sha256()
    for node in module.graph.nodes:
        content = (node.args, dict(node.kwargs), node.meta.get("val"))
        leaves = ",".join(map(described, pytree.tree_leaves(content)))
        digest.update(f"{node.op} {node.target} {leaves}\n".encode())
        place_of[node] = len(place_of)
    return digest.hexdigest()
