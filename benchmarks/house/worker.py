"""What runs with one checkout or the other on `PYTHONPATH`: a file of its own, no module.

    python worker.py capture MODEL KIND GRAPH.json
    python worker.py plan GRAPH.json [--link SHARE] [--budgets '{"60%": 123}']

`capture` writes a step with its measured times frozen. `plan` prints a JSON line per budget;
without `--budgets`, at shares of the way from the smallest peak that it finds itself to the plain
one. Every budget is asked of a new planner.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

SHARES = {"85%": 0.85, "60%": 0.6, "35%": 0.35, "smallest": 0.0}


def main() -> None:
    """Capture or plan."""
    parser = argparse.ArgumentParser()
    commands = parser.add_subparsers(dest="command", required=True)
    capturing = commands.add_parser("capture")
    for name in ("model", "kind"):
        capturing.add_argument(name)
    capturing.add_argument("path", type=Path)
    planning = commands.add_parser("plan")
    planning.add_argument("path", type=Path)
    planning.add_argument("--link", type=float)
    planning.add_argument("--budgets", type=json.loads)
    arguments = parser.parse_args()
    if arguments.command == "capture":
        capture(arguments.model, arguments.kind, arguments.path)
    else:
        plan(arguments.path, arguments.link, arguments.budgets)


def capture(name: str, kind: str, path: Path) -> None:
    """Write a model's step: "compile" for forward and backward, "fit" for all of it.

    Of "synthetic_gpt", which nobody captures, the kind is how many blocks it has.
    """
    from packlight.step.serialize import to_json

    if name == "synthetic_gpt":
        from tests.oracles.gpt import gpt_step

        path.write_text(to_json(gpt_step(int(kind))), encoding="utf-8")
        return
    model, batch, loss_fn = _made(name)
    if kind == "fit":
        import torch

        from packlight import profile

        optimizer = torch.optim.AdamW(model.parameters(), fused=True)
        graph = profile(model, loss_fn, batch, optimizer, progress=False).graph
    else:
        graph = _compiled(model, batch, loss_fn)
    path.write_text(to_json(graph), encoding="utf-8")


def _made(name: str) -> Any:
    """Return model, batch and loss: "gpt2-12x768" is the paper's, "lstm-64" has so many steps."""
    import torch

    from tests.models import LSTMTagger, classify, make

    if name == "gpt2-12x768":
        return make("gpt2", layers=12, width=768, heads=12, vocabulary=50257, batch_size=2,
                    length=256)
    family, _, length = name.partition("-")
    if not length:
        return make(name)
    torch.manual_seed(0)
    tokens = torch.randint(0, 100, (8, int(length)))
    assert family == "lstm"
    return LSTMTagger().train(), (tokens, tokens.roll(-1, 1)), classify


def _compiled(model: Any, batch: Any, loss_fn: Any) -> Any:
    import torch

    try:
        from packlight.runtime.backend import PacklightBackend  # where it was
    except ImportError:
        from packlight.backend import PacklightBackend

    backend = PacklightBackend(progress=False)
    loss = torch.compile(
        lambda batch: loss_fn(model, batch), backend=backend, fullgraph=True, dynamic=False
    )
    loss(batch)
    return backend.compilations[-1].graph


def plan(path: Path, link_share: float | None, budgets: dict[str, int] | None) -> None:
    """Print what a planner makes of a graph."""
    from packlight.errors import InfeasibleBudgetError
    from packlight.planner import Planner
    from packlight.step import serialize

    document = json.loads(path.read_text(encoding="utf-8"))
    document["version"] = serialize.VERSION  # what is free of transfers reads the same in all
    graph: Any = serialize.from_json(json.dumps(document))
    plain_bytes, device = Planner(graph).plain_peak_bytes, None
    if link_share is not None:
        graph, device = _with_disk(graph, plain_bytes, link_share * graph.seconds)
    begin = time.process_time()
    smallest_bytes = Planner(graph, device).smallest().peak_bytes
    smallest_seconds = time.process_time() - begin
    if budgets is None:
        budgets = {
            name: smallest_bytes + int(share * (plain_bytes - smallest_bytes))
            for name, share in SHARES.items()
        }
    for setting, budget_bytes in budgets.items():
        begin = time.process_time()
        record = {
            "setting": setting,
            "budget_bytes": budget_bytes,
            "plain_bytes": plain_bytes,
            "plain_seconds": graph.seconds,
            "num_operations": len(graph.operations),
            "smallest_bytes": smallest_bytes,
            "smallest_cpu_seconds": round(smallest_seconds, 2),
            "peak_bytes": None,
            "seconds": None,
        }
        try:
            found = Planner(graph, device).plan(budget_bytes)
            record.update(peak_bytes=found.peak_bytes, seconds=found.seconds)
        except InfeasibleBudgetError:
            pass
        record["cpu_seconds"] = round(time.process_time() - begin, 2)
        print(json.dumps(record), flush=True)


def _with_disk(graph: Any, num_bytes: int, seconds: float) -> tuple[Any, Any]:
    """Return a graph, and what it runs on, with a disk: bytes there and back in some seconds."""
    from packlight import step

    rate = 2 * num_bytes / seconds
    if not hasattr(step, "Machine"):  # as it was
        return graph, step.Device("some", 1 << 40, links=(step.Link("disk", rate),))
    lane = step.Lane("disk", "disk", step.Speed(rate), step.Speed(rate))
    machine = step.Machine.with_one_lane(lane)
    return step.with_transfers(graph, machine), machine


if __name__ == "__main__":
    main()
