#!/usr/bin/env bash
# torch 2.13.0 (CPU): a parameter that is given data of another length cannot be trained while an old loss is alive.
#
# The guess: after `w.data = shorter` (sparse training, growing networks, pruning) the next forward makes a graph of its own; what
#   a loop still holds in `loss` from the step before does not matter.
# What happens: the old graph keeps the parameter's gradient accumulator alive, with the old shape, and the new graph uses it. Setting
#   `.data` drops the accumulator only where dtype or device change, not where the shape does.
# Seen (torch 2.13.0+cpu): backward raises "returned an invalid gradient at index 0 - got [3] but expected shape compatible with [4]";
#   after `del loss` it works, and so it does if `.data` passes through another dtype.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet torch==2.13.0 numpy==2.4.6
cd "$folder"
"$folder/venv/bin/python" - <<'PY'
import torch


def trains_after_resizing(keeps_loss, through_other_dtype):
    w = torch.nn.Parameter(torch.ones(4))
    loss = (w * torch.ones(4)).sum()
    loss.backward()
    if not keeps_loss:
        del loss
    w.grad = None
    if through_other_dtype:
        w.data = torch.empty(0, dtype=torch.float64)
    w.data = torch.ones(3)
    try:
        (w * torch.ones(3)).sum().backward()
    except RuntimeError as error:
        assert "got [3] but expected shape compatible with [4]" in str(error), error
        return False
    return w.grad.shape == (3,)


seen = [trains_after_resizing(*case) for case in ((True, False), (False, False), (True, True))]
print(torch.__version__, "loss kept, loss deleted, loss kept but through float64:", seen)
assert torch.__version__.startswith("2.13.0")
assert seen == [False, True, True], "resized parameters train with an old loss alive now"
PY
