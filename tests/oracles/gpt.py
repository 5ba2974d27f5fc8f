"""A GPT-like training step by hand: 12 blocks, 8 sequences of 256 tokens, width 384."""

from __future__ import annotations

from packlight.step import BufferKind, StepGraph
from packlight.step.profile import StepMemory, StepProfile
from tests.oracles.tape import Tape


def gpt_step(num_blocks: int = 12, *, vocabulary: int = 8192) -> StepGraph:
    """Return the step; sizes are those of fp32 tensors, durations those of some slow machine."""
    tape = Tape()
    tokens, width = 8 * 256, 384
    kib = tokens * width * 4 // 1024
    weight = width * width * 4 // 1024
    tape.layer = "wte"
    x = tape.linear(tape.input(16), kib, 2.0, weight=vocabulary * width * 4 // 1024)
    for block in range(num_blocks):
        tape.layer = f"h.{block}.ln_1"
        y = tape.norm(x, 0.7)
        tape.layer = f"h.{block}.attn"
        y = tape.linear(y, 3 * kib, 9.0, weight=3 * weight, split=True)
        y = tape.attention(y, 12.0, workspace=256)
        y = tape.linear(y, kib, 3.0, weight=weight, split=True)
        tape.layer = f"h.{block}"
        x = tape.add(x, y, 0.4)
        tape.layer = f"h.{block}.ln_2"
        y = tape.norm(x, 0.7)
        tape.layer = f"h.{block}.mlp"
        y = tape.linear(y, 4 * kib, 12.0, weight=4 * weight, split=True)
        y = tape.pointwise(y, 2.5)
        y = tape.linear(y, kib, 12.0, weight=4 * weight, split=True)
        tape.layer = f"h.{block}"
        x = tape.add(x, y, 0.4)
    tape.layer = "ln_f"
    x = tape.norm(x, 0.7)
    tape.layer = "lm_head"
    x = tape.linear(x, tokens * vocabulary * 4 // 1024, 40.0, weight=vocabulary * width * 4 // 1024,
                    split=True)
    tape.layer = "loss"
    return tape.finish(x, 15.0)


def gpt_profile(num_blocks: int = 12) -> StepProfile:
    """Return the step with its resident memory: parameters, AdamW's two moments, one batch."""
    graph = gpt_step(num_blocks)
    held = dict.fromkeys(BufferKind, 0)
    for buffer in graph.buffers:
        held[buffer.kind] += buffer.bytes
    parameter_bytes = held[BufferKind.PARAMETER]
    memory = StepMemory(
        parameter_bytes=parameter_bytes,
        state_bytes=0,
        input_bytes=held[BufferKind.INPUT],
        optimizer_bytes=2 * parameter_bytes,
        update_workspace_bytes=0,
        gradient_bytes=parameter_bytes,
    )
    return StepProfile(graph, memory, device_name="a slow CPU", torch_version="2.13.0")
