"""A move from elsewhere is planned, run, described, saved and refused like Packlight's own."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import packlight
from packlight.errors import FormatError, InfeasibleBudgetError, MoveError, OptionError, WayError
from packlight.moves import registry
from packlight.moves.chunk.move import Chunk
from packlight.moves.microbatch.move import Microbatch
from packlight.moves.move import Effect
from packlight.search.saved import way_from_json, way_to_json

TOY = '''
from dataclasses import dataclass
from typing import ClassVar

import torch

from packlight.moves.move import Effect, Move, Refusal


@dataclass(frozen=True)
class NoClones(Move):
    """Copies that nothing but arithmetic reads are not made."""

    name: ClassVar[str] = "no-clones"
    effect: ClassVar[Effect] = Effect.SAME_BITS

    most: int = 0

    @classmethod
    def space(cls, draft, room):
        count = len(clones(draft.graph_module.graph))
        yield cls(count) if count else Refusal("nothing is cloned")

    def apply(self, draft):
        module = copy_of(draft.graph_module)
        for node in clones(module.graph)[: self.most]:
            node.replace_all_uses_with(node.args[0])
            module.graph.erase_node(node)
        module.recompile()
        return draft.changed(module=module)

    def describe(self, draft):
        return f"{self.most} clones left out"


def clones(graph):
    return [n for n in graph.nodes if n.target is torch.ops.aten.clone.default]


def copy_of(module):
    graph = torch.fx.Graph()
    copies = {}
    for node in module.graph.nodes:
        copies[node] = graph.node_copy(node, copies.__getitem__)
    new = torch.fx.GraphModule(module, graph)
    new.meta.update(module.meta)
    return new


class Approximate(NoClones):
    name = "roughly"
    effect = Effect.APPROXIMATE


class Failing(NoClones):
    name = "failing"

    @classmethod
    def space(cls, draft, room):
        raise ZeroDivisionError("by zero")


number = 3
'''


class Cloning(nn.Module):
    """One operation reads three copies of a hidden layer where one would do."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(64, 64) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
            still = x.detach()
            x = torch.addcmul(x, still.clone(), still.clone())
        return x


def loss_fn(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
    return model(batch).square().mean()


@pytest.fixture
def install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Any]:
    """Install a package that brings moves: entry point name -> object."""
    registry.registered.cache_clear()

    def installed(**moves: str) -> Path:
        site = tmp_path / "site"
        info = site / "toys-1.0.dist-info"
        info.mkdir(parents=True)
        (site / "toys.py").write_text(TOY)
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: toys\nVersion: 1.0\n")
        lines = [f"{name} = {value}" for name, value in moves.items()]
        (info / "entry_points.txt").write_text("\n".join(["[packlight.moves]", *lines]))
        monkeypatch.syspath_prepend(str(site))
        registry.registered.cache_clear()
        return site

    yield installed
    registry.registered.cache_clear()
    sys.modules.pop("toys", None)


def fitted(budget: Any, **options: Any) -> tuple[packlight.TrainStep, torch.Tensor]:
    torch.manual_seed(0)
    model, batch = Cloning(), torch.randn(256, 64)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return packlight.fit(model, loss_fn, optimizer, batch, budget, progress=False, **options), batch


def smallest_bytes(**options: Any) -> int:
    with pytest.raises(InfeasibleBudgetError) as caught:
        fitted(1, **options)
    return caught.value.smallest_bytes


def test_a_move_of_another_package_is_planned_run_described_saved_and_loaded(
    install: Any, tmp_path: Path
) -> None:
    own = ("update-in-backward",)
    without = smallest_bytes(moves=own)
    install(**{"no-clones": "toys:NoClones"})
    assert "no-clones" in packlight.MOVES and "no-clones" in packlight.EXACT_MOVES
    moves = (*own, "no-clones")
    within = smallest_bytes(moves=moves)
    assert within < without
    step, batch = fitted(within, moves=moves)
    toy = step.way.moves[-1]
    assert toy.name == "no-clones" and step.way.is_bit_exact
    assert "6 clones left out" in step.describe()
    # The oracle is eager PyTorch.
    eager = copy.deepcopy(step.model)
    optimizer = torch.optim.SGD(eager.parameters(), lr=0.1)
    for _ in range(2):
        measured = step.measured(batch)
        loss = loss_fn(eager, batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        assert torch.equal(measured.loss, loss.detach())
        assert measured.peak_bytes <= within
    assert all(map(torch.equal, step.model.parameters(), eager.parameters()))
    # As data.
    text = way_to_json(step.way)
    assert {"move": "no-clones", "most": 6} in json.loads(text)["value"]["moves"]
    assert way_from_json(text) == step.way
    step.save_way(tmp_path / "way.json")
    again, _ = fitted(within, moves=moves, way=tmp_path / "way.json")
    assert again.way.moves == step.way.moves
    assert again.plan.schedule == step.plan.schedule


def test_a_move_of_another_package_is_refused_by_name(install: Any) -> None:
    with pytest.raises(OptionError, match="unknown move 'no-clones'.*\n.*'pack'"):
        fitted(None, moves=("no-clones",))
    install(**{"no-clones": "toys:NoClones"})
    step, _ = fitted("1GiB", moves=("no-clones",))
    assert [move.name for move in step.way.moves] == []
    with pytest.raises(InfeasibleBudgetError) as caught:
        fitted(1, moves=())
    assert "without no-clones: not among the moves" in caught.value.hint


def test_an_approximate_move_is_made_only_where_it_is_allowed_by_name(install: Any) -> None:
    install(roughly="toys:Approximate")
    assert "roughly" not in packlight.EXACT_MOVES
    moves = ("update-in-backward", "roughly")
    without = smallest_bytes(moves=moves)
    within = smallest_bytes(moves=moves, allow={"roughly"})
    assert within < without
    step, _ = fitted(within, moves=moves, allow={"roughly"})
    assert step.way.moves[-1].effect is Effect.APPROXIMATE


@pytest.mark.parametrize(
    ("entry", "problem"),
    [
        ("toys:nothing", "it does not load: AttributeError"),
        ("nowhere:Move", "it does not load: ModuleNotFoundError"),
        ("toys:number", "toys:number is no class derived from packlight's Move"),
    ],
)
def test_an_entry_point_that_is_no_move_is_named(install: Any, entry: str, problem: str) -> None:
    install(broken=entry)
    with pytest.raises(MoveError, match="'broken' of 'toys'") as caught:
        fitted(None)
    assert problem in str(caught.value)


def test_a_name_belongs_to_one_move(install: Any) -> None:
    install(one="toys:NoClones", two="toys:copy_of")
    with pytest.raises(MoveError, match="'two' of 'toys'"):
        packlight.MOVES  # noqa: B018


def test_a_move_that_raises_is_named_and_nothing_is_changed(install: Any) -> None:
    install(failing="toys:Failing")
    smallest = None
    try:
        fitted(1, moves=("failing",))
    except MoveError as error:
        assert "'failing' of 'toys'" in str(error) and "ZeroDivisionError: by zero" in str(error)
        smallest = error
    assert smallest is not None
    step, batch = fitted("1GiB", moves=("failing",))  # what fits as it is needs no move
    assert torch.isfinite(step(batch))


# -- saved ways


def saved(tmp_path: Path, budget: Any = "2MiB", **options: Any) -> tuple[Path, packlight.TrainStep]:
    step, _ = fitted(budget, **options)
    path = tmp_path / "way.json"
    step.save_way(path)
    return path, step


def test_every_own_move_comes_back_from_json_as_it_was(tmp_path: Path) -> None:
    step, _ = fitted("1GiB")
    moves = (Microbatch(4, 1, True), Chunk(8, 4, 1000))
    way = replace(step.way, moves=moves, not_made={"pack": "no masks"}, words=("a", "b"))
    assert way_from_json(way_to_json(way)) == way


def test_another_process_trains_the_saved_way_without_searching(tmp_path: Path) -> None:
    budget = smallest_bytes(moves=packlight.EXACT_MOVES)
    path, step = saved(tmp_path, budget, moves=packlight.EXACT_MOVES)
    batch = torch.randn(256, 64, generator=torch.Generator().manual_seed(1))
    here = [float(step(batch)) for _ in range(2)]
    code = f"""
import sys
import torch
import packlight
from packlight.search.search import Search
from tests.test_moves import fitted
Search.fastest = None
step, _ = fitted({budget}, moves=packlight.EXACT_MOVES, way={str(path)!r})
batch = torch.randn(256, 64, generator=torch.Generator().manual_seed(1))
print(*[float(step(batch)).hex() for _ in range(2)])
"""
    root = Path(__file__).resolve().parent.parent
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [loss.hex() for loss in here]


def test_the_same_step_is_searched_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from packlight.search.search import Search

    monkeypatch.setenv("PACKLIGHT_CACHE", str(tmp_path))
    monkeypatch.delenv("PACKLIGHT_NO_WAY_CACHE", raising=False)
    searched = []
    fastest = Search.fastest
    monkeypatch.setattr(
        Search, "fastest", lambda search: searched.append(search) or fastest(search)
    )
    budget = smallest_bytes()
    searched.clear()
    first, _ = fitted(budget)
    second, batch = fitted(budget)
    assert len(searched) == 1
    assert second.way == first.way
    assert second.measured(batch).peak_bytes <= budget
    fitted(budget + 1)  # another budget is another question
    assert len(searched) == 2
    for path in (tmp_path / "ways").iterdir():
        path.write_text(path.read_text()[:-100])
    fitted(budget)  # what cannot be read is looked for anew
    assert len(searched) == 3


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda way: {**way, "environment": {**way["environment"], "torch_version": "1.0"}},
         "torch"),
        (lambda way: {**way, "environment": {**way["environment"], "device_name": "abacus"}},
         "device"),
        (lambda way: {**way, "parts": [{**way["parts"][0], "graph_digest": "0" * 64}]}, "step"),
        (lambda way: {**way, "parts": [{**way["parts"][0], "num_rows": 8}]}, "step"),
    ],
)
def test_a_way_of_another_step_or_place_is_refused(
    tmp_path: Path, change: Any, what: str
) -> None:
    path, _ = saved(tmp_path)
    document = json.loads(path.read_text())
    path.write_text(json.dumps({**document, "value": change(document["value"])}))
    with pytest.raises(WayError, match="way= out") as caught:
        fitted("2MiB", way=path)
    assert caught.value.what == what


def test_a_way_is_refused_by_a_smaller_budget_than_it_needs(tmp_path: Path) -> None:
    path, step = saved(tmp_path, "1GiB")
    with pytest.raises(WayError, match="budget") as caught:
        fitted(step.peak_bytes - 1, way=path)
    assert str(step.peak_bytes) in str(caught.value)
    fitted(step.peak_bytes, way=path)


def test_a_way_whose_move_may_not_be_made_is_refused(tmp_path: Path) -> None:
    path, step = saved(tmp_path, smallest_bytes())
    assert "microbatch" in [move.name for move in step.way.moves]
    with pytest.raises(WayError, match="it makes 'microbatch'"):
        fitted("2MiB", moves=(), way=path)


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("", FormatError),
        ('{"format": "packlight"', FormatError),
        ('{"format": "other"}', FormatError),
    ],
)
def test_a_file_that_holds_no_way_is_named(tmp_path: Path, text: str, error: type) -> None:
    path = tmp_path / "way.json"
    path.write_text(text)
    with pytest.raises(error, match="way.json"):
        fitted("2MiB", way=path)


def test_an_unknown_move_in_a_way_lists_the_known_ones(tmp_path: Path) -> None:
    path, _ = saved(tmp_path)
    document = json.loads(path.read_text())
    document["value"]["moves"] = [{"move": "teleport"}]
    path.write_text(json.dumps(document))
    with pytest.raises(OptionError, match="unknown move 'teleport'.*\n.*'chunk'"):
        fitted("2MiB", way=path)


def test_a_schedule_that_is_none_of_the_step_is_refused(tmp_path: Path) -> None:
    path, _ = saved(tmp_path)
    document = json.loads(path.read_text())
    schedule = document["value"]["parts"][0]["plan"]["schedule"]
    schedule["instructions"] = schedule["instructions"][3:]
    path.write_text(json.dumps(document))
    with pytest.raises(WayError, match="its schedule"):
        fitted("2MiB", way=path)
