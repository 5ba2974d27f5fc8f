#!/usr/bin/env bash
# torch 2.13.0 (CPU): the scalar that some losses return owns memory for every element.
#
# The guess: F.mse_loss(x, y) returns a scalar of 4 bytes, so a list of detached losses costs nothing.
# What happens: mse_loss, smooth_l1_loss, soft_margin_loss and binary_cross_entropy compute all terms into one
#   storage and shrink that to a scalar in place: the result has one element and a storage of all of them.
#   Keeping `loss.detach()` keeps it, and torch.save writes it. huber_loss, l1_loss and
#   binary_cross_entropy_with_logits return 4 bytes.
# Seen (torch 2.13.0+cpu): 1000 x 1000 elements: storages of 4000000 bytes, and a saved file of 4 MB; `clone()` has 4.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet torch==2.13.0 numpy==2.4.6
cd "$folder"
"$folder/venv/bin/python" - <<'PY'
import io

import torch
import torch.nn.functional as F

x, y = torch.rand(1000, 1000), torch.rand(1000, 1000)
large = [F.mse_loss, F.smooth_l1_loss, F.soft_margin_loss, F.binary_cross_entropy]
small = [F.huber_loss, F.l1_loss, F.binary_cross_entropy_with_logits]


def held_bytes(loss):
    return loss.detach().untyped_storage().nbytes()


file = io.BytesIO()
torch.save(F.mse_loss(x, y), file)
found = {f.__name__: held_bytes(f(x, y)) for f in large + small}
print(torch.__version__, found, "saved:", file.tell(), "clone:", held_bytes(F.mse_loss(x, y).clone()))
assert torch.__version__.startswith("2.13.0")
assert all(found[f.__name__] == 4 * x.numel() for f in large), "no longer all elements"
assert all(found[f.__name__] == 4 for f in small)
assert file.tell() > 4 * x.numel() and held_bytes(F.mse_loss(x, y).clone()) == 4
PY
