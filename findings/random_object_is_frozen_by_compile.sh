#!/usr/bin/env bash
# torch 2.13.0 (CPU): in a compiled function a random.Random object gives its first number again and again.
#
# The guess: dynamo leaves a call of random.Random.random() to Python, as it does with random.random(), or breaks there.
# What happens: random.random() draws a new number in every call, the module's state being taken along. A method of an object
#   of random.Random is run once, while tracing, and its number is a constant of the graph: every call of the compiled function
#   multiplies by the same one, without a word.
# Seen (torch 2.13.0+cpu): three calls give 0.844, 0.844, 0.844 where eager calls give 0.844, 0.758, 0.421.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet torch==2.13.0 numpy==2.4.6
cd "$folder"
"$folder/venv/bin/python" - <<'PY'
import random

import torch


def drawn_thrice(source, function):
    source.seed(0)
    return [round(float(function(torch.ones(1))), 3) for _ in range(3)]


mine = random.Random()


def by_object(x):
    return x * mine.random()


def by_module(x):
    return x * random.random()


found = {}
for source, function in ((mine, by_object), (random, by_module)):
    compiled = torch.compile(function, backend="eager")
    found[function.__name__] = drawn_thrice(source, function), drawn_thrice(source, compiled)
print(torch.__version__, "(eager, compiled):", found)
assert torch.__version__.startswith("2.13.0")
eager, compiled = found["by_object"]
assert len(set(eager)) == 3 and compiled == [eager[0]] * 3, "the object is no longer frozen"
eager, compiled = found["by_module"]
assert eager == compiled, "the module's numbers differ now"
PY
