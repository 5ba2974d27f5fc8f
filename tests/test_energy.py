"""Energy is counted operations times prices: every count by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from packlight.cli import main
from packlight.costs.energy import Energy, count_multiply_adds, inference_energy, step_energy
from packlight.step import BufferKind, Phase
from packlight.step.builder import GraphBuilder

EXAMPLE = """
import torch
from torch import nn

def model():
    return nn.Linear(10, 1000)

def loss(model, batch):
    return model(batch).square().mean()

def optimizer(model):
    return torch.optim.SGD(model.parameters(), lr=0.1)

def batches(split="train"):
    while True:
        yield torch.ones(100, 10)
"""


def test_a_dram_access_costs_6400_integer_additions() -> None:
    energy = Energy(multiply_adds=10**12, traffic_bytes=4 * 10**12)
    assert energy.compute_joules == pytest.approx(4.6)
    assert energy.memory_joules == pytest.approx(640)
    assert (energy + energy).joules == pytest.approx(2 * 644.6)


def test_a_backward_multiplies_twice_as_often_as_its_forward() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2))
    inputs = torch.ones(5, 4, requires_grad=True)
    forward = count_multiply_adds(lambda: model(inputs))
    both = count_multiply_adds(lambda: model(inputs).sum().backward())
    assert (forward, both) == (5 * (32 + 16), 3 * 5 * (32 + 16))


def test_inference_reads_weights_and_passes_activations_on() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8, 3))
    energy = inference_energy(model, (torch.ones(1, 1, 4, 4),))
    assert energy.multiply_adds == 4 * 2 * 9 + 8 * 3
    assert energy.traffic_bytes == 4 * (18 + 2 + 24 + 3) + 2 * 4 * (8 + 8 + 8 + 3)


def test_a_step_counts_what_its_operations_touch() -> None:
    build = GraphBuilder()
    weight = build.buffer(100, BufferKind.PARAMETER)
    (hidden,) = build.operation("forward", [weight], [20])
    (gradient,) = build.operation("backward", [weight, hidden], [100], phase=Phase.BACKWARD)
    build.operation(
        "update", [gradient], [], phase=Phase.UPDATE, mutates=[weight], can_recompute=False
    )
    graph = build.finish(num_forward=1, forward_outputs=[hidden], outputs=[])
    energy = step_energy(graph, 7, 14, update_bytes=3)
    assert energy == {
        Phase.FORWARD: Energy(7, 120),
        Phase.BACKWARD: Energy(14, 220),
        Phase.UPDATE: Energy(0, 203),
    }


def test_the_command_prints_phases(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "example.py"
    file.write_text(EXAMPLE)
    assert main(["profile", str(file), "--energy"]) == 0
    shown = capsys.readouterr().out
    assert "Energy of the plain step" in shown and "1e+06" in shown
