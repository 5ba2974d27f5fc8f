"""The CUDA kernel against the CPU's: on a GPU where there is one, else in Triton's interpreter."""

from __future__ import annotations

import copy
import os

import pytest
import torch
from torch import nn

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when kernels are defined
pytest.importorskip("triton", reason="Triton is not installed; torch's CUDA builds bring it")

from packlight.optim import STATE_FORMATS, WEIGHT_FORMATS, LowBit, backend, cuda_kernel
from tests.test_optim import RULES, gradients, run, started

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


# Each rule, each way to store states (with a second moment and without) and each for weights.
CASES = [
    *((name, "8bit", "fp32") for name in RULES),
    *(("adamw", states, "fp32") for states in STATE_FORMATS),
    *(("lion", states, "bf16-kahan") for states in STATE_FORMATS),
    *(("adamw", "8bit", weights) for weights in WEIGHT_FORMATS),
]


@pytest.mark.parametrize(("name", "states", "weights"), dict.fromkeys(CASES))
def test_the_cuda_kernel_does_what_the_cpus_does(
    name: str, states: str, weights: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rule, _ = RULES[name]
    here, there = started(weights), nn.Parameter(started(weights).detach().to(DEVICE))
    optimizer = LowBit([here], rule, states, weights, seed=5)
    run(optimizer, here, gradients(2))
    other = LowBit([there], rule, states, weights, seed=5)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    there.data.copy_(here.data)
    start = here.detach().float().clone()
    run(optimizer, here, gradients(3)[2:])
    monkeypatch.setitem(backend._KERNELS, DEVICE, cuda_kernel.step_on_cuda)
    run(other, there, [gradient.to(DEVICE) for gradient in gradients(3)[2:]])
    update = (here.float() - start).abs().max()
    # A last place decides which way some elements are rounded, so a few are a level off.
    off = (here.float() - there.cpu().float()).abs()
    assert (off > 1e-5 * update).float().mean() <= 0.002
    for key, value in optimizer.state[here].items():
        if isinstance(value, torch.Tensor):
            theirs = other.state[there][key].cpu()
            differs = (value.float() - theirs.float()).abs() > 1e-5 * value.float().abs()
            # The rest of a rounding in 8 bits is cut at ties.
            assert differs.float().mean() <= (0.01 if key == "residual" else 0.002), key
