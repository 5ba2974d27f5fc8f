#!/usr/bin/env bash
# torch 2.13.0 (CPU): looking at a tensor through numpy once makes its storage unshrinkable for good.
#
# The guess: `tensor.detach().numpy()` is a view for as long as somebody holds the array; afterwards the tensor is what it was, and
#   `untyped_storage().resize_(0)` (how sharded and streamed parameters give their memory back) works as before.
# What happens: the look itself marks the storage as not resizable. Letting go of the array does not take that back, nor does a
#   garbage collection; the parameter has to be given another storage.
# Seen (torch 2.13.0+cpu, numpy 2.4.6): resizable() is True before and False ever after, resize_(0) raises "Trying to resize
#   storage that is not resizable"; a clone of the tensor can be shrunk.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet torch==2.13.0 numpy==2.4.6
cd "$folder"
"$folder/venv/bin/python" - <<'PY'
import gc

import torch

weight = torch.nn.Linear(4, 4).weight.detach()
before = weight.untyped_storage().resizable()
array = weight.numpy()
del array
gc.collect()
after = weight.untyped_storage().resizable()
try:
    weight.untyped_storage().resize_(0)
    message = "shrunk"
except RuntimeError as error:
    message = str(error)
copy = weight.clone()
copy.untyped_storage().resize_(0)
print(torch.__version__, "resizable before and after:", before, after, "|", message)
assert torch.__version__.startswith("2.13.0")
assert (before, after) == (True, False), "a look through numpy leaves no trace now"
assert "not resizable" in message and copy.untyped_storage().nbytes() == 0
PY
