"""The benchmark of small files counts what was written, and its page shows what was measured."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

import packlight.compress as compress
from benchmarks.common import read_lines
from benchmarks.compress.__main__ import FOLDER, RESULTS, Record, recoded
from benchmarks.compress.data import Digits
from benchmarks.compress.lenets import Recipe, error_percent, lenet_5, lenet_300_100
from benchmarks.compress.recipes import METHODS, prune, share
from benchmarks.compress.report import tables


def digits(num: int = 64) -> Digits:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(num, 1, 28, 28, generator=generator)
    return Digits(images, torch.randint(10, (num,), generator=generator))


def num_parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def test_the_networks_are_those_of_the_papers() -> None:
    assert num_parameters(lenet_300_100()) == 266_610
    assert num_parameters(lenet_5()) == 431_080


@pytest.mark.parametrize("network", ["lenet-300-100", "lenet-5"])
def test_a_method_prunes_and_shares_as_it_says(network: str) -> None:
    torch.manual_seed(0)
    short = Recipe(26, batch=32)
    method = replace(METHODS[network]["small"], pruning=short, sharing=Recipe(1, batch=32))
    model = lenet_300_100() if network == "lenet-300-100" else lenet_5()
    dense = num_parameters(model)
    prune(model, digits(), method, 0)
    if network == "lenet-5":
        assert num_parameters(model) < 0.2 * dense, "channels are gone"
    weights = [p for p in model.parameters() if p.dim() > 1]
    kept = sum(int((weight != 0).sum()) for weight in weights)
    assert kept == round(method.densities * sum(weight.numel() for weight in weights))
    share(model, digits(), method, 0)
    for weight in weights:
        assert len(torch.unique(weight[weight != 0])) <= method.num_values


def test_results_are_what_files_hold_and_the_page_shows_them(tmp_path: Path) -> None:
    records = read_lines(RESULTS, Record)
    assert {record.network for record in records} >= {"lenet-300-100"}
    for record in records:
        in_tensors = sum(size for _, _, _, size in record.tensors)
        assert in_tensors + record.frame_bytes == record.file_bytes
        assert sum(nonzeros for _, nonzeros, _, _ in record.tensors) <= record.num_nonzeros
    page = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert all(line in page for line in tables(records))


def test_a_file_written_anew_is_the_same_network(tmp_path: Path) -> None:
    model = nn.Linear(30, 20)
    with torch.no_grad():
        model.weight[torch.rand(20, 30) < 0.9] = 0
    path = tmp_path / "net-a-method-3.plc"
    compress.save(path, model)
    record = Record("net", "a method", 3, {}, 1.0, 1.0, 1.0, 0, 10**6, 4, [], 0, {}, {})
    again = recoded(record, tmp_path)
    assert again.file_bytes == path.stat().st_size
    assert torch.equal(compress.load(path)["weight"], model.weight)


def test_errors_are_counted_in_percent() -> None:
    images = Digits(torch.zeros(10_000, 1, 28, 28), torch.arange(10_000) % 10)
    always_three = nn.Sequential(nn.Flatten(), nn.Linear(784, 10))
    with torch.no_grad():
        always_three[1].bias[3] = 100.0
    assert error_percent(always_three, images) == 90.0
