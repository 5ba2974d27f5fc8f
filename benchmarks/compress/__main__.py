"""Train the LeNets, make them small, and write down the files' bytes and the errors they have."""

from __future__ import annotations

import argparse
import copy
import shlex
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

import packlight.compress as compress
from benchmarks.common import append_line, provenance, read_lines, write_lines
from benchmarks.compress.data import mnist
from benchmarks.compress.lenets import Recipe, error_percent, train
from benchmarks.compress.recipes import METHODS, NETWORKS, Method, prune, share

MODULE = "benchmarks.compress"
FOLDER = Path(__file__).resolve().parent
RESULTS = FOLDER / "results.jsonl"


@dataclass(frozen=True)
class Record:
    """One network made small by one method.

    Attributes:
        network, method, seed: what was run.
        settings: of the method.
        dense_error_percent: on the test set, before.
        pruned_error_percent: after pruning.
        error_percent: of what was loaded from the file into a new network.
        num_nonzeros: weights that are not zero, biases included.
        file_bytes, dense_bytes: of the whole file, and of the parameters in memory.
        tensors: (name, not zero, values, bytes in the file).
        frame_bytes: of the file, what belongs to no tensor.
        seconds: (stage, processor seconds of this process).
        provenance: where, when, with what.
    """

    network: str
    method: str
    seed: int
    settings: dict[str, Any]
    dense_error_percent: float
    pruned_error_percent: float
    error_percent: float
    num_nonzeros: int
    file_bytes: int
    dense_bytes: int
    tensors: list[tuple[str, int, int, int]]
    frame_bytes: int
    seconds: dict[str, float]
    provenance: dict[str, Any]


def dense(
    network: str, recipe: Recipe, seed: int, work: Path
) -> tuple[torch.nn.Module, float]:
    """Return a trained network, from an earlier run if there is one, and its error in percent."""
    how = "distorted" if recipe.distorted else "plain"
    path = work / f"{network}-{how}-{recipe.num_epochs}-{seed}.pt"
    torch.manual_seed(seed)
    model = NETWORKS[network]()
    if path.exists():
        model.load_state_dict(torch.load(path))
    else:
        train(model, mnist("train"), recipe, seed)
        torch.save(model.state_dict(), path)
    return model, error_percent(model, mnist("test"))


def run(network: str, name: str, method: Method, seed: int, work: Path) -> Record:
    """Make a network small and return what came of it."""
    begin = time.process_time()
    seconds = {}

    def lap(stage: str) -> None:
        nonlocal begin
        seconds[stage] = round(time.process_time() - begin, 1)
        begin = time.process_time()

    model, dense_error = dense(network, method.dense, seed, work)
    dense_bytes = sum(parameter.nbytes for parameter in model.parameters())
    lap("dense")
    prune(model, mnist("train"), method, seed + 1000)
    pruned_error = error_percent(model, mnist("test"))
    lap("prune")
    print(f"{network}, {name}, seed {seed}: dense {dense_error:.2f}%, pruned {pruned_error:.2f}%",
          flush=True)
    share(model, mnist("train"), method, seed + 2000)
    lap("share")
    path = _file_of(network, name, seed, work)
    report = compress.save(path, model, coding=method.coding)
    fresh = copy.deepcopy(model)
    for parameter in fresh.parameters():
        torch.nn.init.normal_(parameter)
    compress.load(path, into=fresh)
    lap("file")
    return Record(
        network, name, seed, asdict(method), dense_error, pruned_error,
        error_percent(fresh, mnist("test")),
        sum(int((p != 0).sum()) for p in fresh.parameters()),
        report.file_bytes, dense_bytes,
        _tensors(report),
        report.frame_bytes or 0, seconds,
        provenance(seed, "cpu", f"python -m {MODULE} {shlex.join(sys.argv[1:])}",
                   ("constriction", "kmeans1d")),
    )  # fmt: skip


def recoded(record: Record, work: Path) -> Record:
    """Return a record of the same weights, if they are there, written by the coder as it is now."""
    path = _file_of(record.network, record.method, record.seed, work)
    if not path.exists():
        return record
    report = compress.save(
        path, compress.load(path), coding=compress.inspect(path).coding
    )
    return replace(record, file_bytes=report.file_bytes, tensors=_tensors(report),
                   frame_bytes=report.frame_bytes or 0)  # fmt: skip


def _file_of(network: str, method: str, seed: int, work: Path) -> Path:
    return work / f"{network}-{method.replace(' ', '-')}-{seed}.plc"


def _tensors(report: compress.FileReport) -> list[tuple[str, int, int, int]]:
    return [
        (t.name, t.num_nonzeros or 0, t.num_values or 0, t.file_bytes or 0) for t in report.tensors
    ]


def main() -> int:
    """Run what was asked for, one record after the other."""
    arguments = _parser().parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.recode:
        records = read_lines(arguments.out, Record)
        write_lines(arguments.out, [recoded(record, arguments.work) for record in records])
        return 0
    with tempfile.TemporaryDirectory() as temporary:
        work = arguments.work or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        for seed in arguments.seeds:
            for network in arguments.networks:
                for name, method in METHODS[network].items():
                    if arguments.methods and name not in arguments.methods:
                        continue
                    record = run(network, name, method, seed, work)
                    append_line(arguments.out, record)
                    print(
                        f"{network}, {name}, seed {seed}: {record.file_bytes} bytes, "
                        f"{record.dense_bytes / record.file_bytes:.1f}x, "
                        f"{record.error_percent:.2f}% (dense {record.dense_error_percent:.2f}%), "
                        f"{record.seconds}", flush=True,
                    )  # fmt: skip
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=f"python -m {MODULE}", description=__doc__)
    parser.add_argument("--networks", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--methods", nargs="+", metavar="NAME", help="some; default: all")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--work", type=Path, help="keeps trained networks and files, for reruns")
    parser.add_argument(
        "--recode", action="store_true",
        help="write the files of --work anew and update their records; nothing is trained",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, default=RESULTS)
    return parser


if __name__ == "__main__":
    sys.exit(main())
