#!/usr/bin/env bash
# torch 2.13.0 (CPU): one print inside a loop, and torch.compile hands its backend nothing at all of that function.
#
# The guess: a graph break splits a function into pieces, so a loop of three rounds gives three or four graphs; a custom
#   backend sees everything that is computed.
# What happens: a break in straight-line code splits it (two graphs). In a loop, dynamo gives the whole frame up: it runs
#   eagerly, the backend is never called, and unless TORCH_LOGS asks for graph breaks nothing is said.
#   What a submodule or another function does inside the loop is traced as before, in a frame of its own.
# Seen (torch 2.13.0+cpu): graphs handed to the backend: straight line 2, loop 0, loop over a function that computes 1.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet torch==2.13.0 numpy==2.4.6
cd "$folder"
"$folder/venv/bin/python" - <<'PY'
import torch


def straight(x):
    x = x * 2
    print(end="")
    return x * 3


def loop(x):
    for _ in range(3):
        x = x * 2
        print(end="")
    return x


def doubled(x):
    return x * 2


def loop_over_a_function(x):
    for _ in range(3):
        x = doubled(x)
        print(end="")
    return x


def num_graphs(function):
    graphs = []

    def backend(module, inputs):
        graphs.append(module)
        return module.forward

    torch._dynamo.reset()
    x = torch.randn(3)
    assert torch.equal(torch.compile(function, backend=backend)(x), function(x))
    return len(graphs)


found = [num_graphs(f) for f in (straight, loop, loop_over_a_function)]
print(torch.__version__, "graphs: straight line %d, loop %d, loop over a function %d" % tuple(found))
assert torch.__version__.startswith("2.13.0")
assert found == [2, 0, 1], "loops with breaks are traced otherwise now"
PY
