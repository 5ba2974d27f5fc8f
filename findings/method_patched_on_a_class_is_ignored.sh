#!/usr/bin/env bash
# torch 2.13.0 (CPU): a method of a module's class that is replaced after compiling goes unseen by the compiled module.
#
# The guess: dynamo guards what it traced through, so patching `Model.scale` (as adapters, quantizers and test doubles do) makes the
#   next call recompile, as setting the same attribute on the instance does.
# What happens: methods found on the class are not guarded. The compiled module keeps calling the old one in silence, while eager
#   PyTorch calls the new one; a method set on the instance is noticed.
# Seen (torch 2.13.0+cpu, backend="eager"): compiled 2.0 where eager gives 30.0 after patching the class; 30.0 after patching the instance.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet torch==2.13.0 numpy==2.4.6
cd "$folder"
cat > patched.py <<'PY'
import torch


def make():
    class Model(torch.nn.Module):
        def scale(self, x):
            return x * 2

        def forward(self, x):
            return self.scale(x)

    return Model()


def results(on_class):
    model = make()
    compiled = torch.compile(model, backend="eager")
    one = torch.ones(())
    assert float(compiled(one)) == 2
    if on_class:
        type(model).scale = lambda self, x: x * 30
    else:
        model.scale = lambda x: x * 30
    return float(compiled(one)), float(model(one))


patched_class, patched_instance = results(True), results(False)
print(torch.__version__, "(compiled, eager) after patching the class:", patched_class, "the instance:", patched_instance)
assert torch.__version__.startswith("2.13.0")
assert patched_class == (2.0, 30.0), "methods of classes are guarded now"
assert patched_instance == (30.0, 30.0)
PY
"$folder/venv/bin/python" patched.py
