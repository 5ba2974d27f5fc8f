#!/usr/bin/env bash
# torch 2.13.0 (CPU): a traced multilabel_margin_loss takes the places behind a row's -1 for labels of class 0.
#
# The guess: backend="aot_eager" runs eager PyTorch's kernels, and exported programs compute what the module does:
#   F.multilabel_margin_loss looks at a row's labels up to the first -1 and at nothing behind that.
# What happens: its decomposition is used wherever AOTAutograd or torch.export traces. It gathers the score of class 0 for
#   every place that holds no label, and does not leave those out of the sum: another loss, and gradients of another size.
# Seen (torch 2.13.0+cpu), 4 rows of 5 classes with labels [3, 1, -1, 0, 0]: eager 1.3023, compiled and exported 4.5803;
#   gradients differ by up to 0.3.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet torch==2.13.0 numpy==2.4.6
cd "$folder"
cat > seen.py <<'PY'
import torch
from torch import nn
from torch.nn import functional as F

torch.manual_seed(0)
scores = torch.randn(4, 5, requires_grad=True)
labels = torch.tensor([[3, 1, -1, 0, 0]] * 4)


def loss(scores):
    return F.multilabel_margin_loss(scores, labels)


class Loss(nn.Module):
    def forward(self, scores):
        return loss(scores)


eager = loss(scores)
compiled = torch.compile(loss, backend="aot_eager")(scores)
exported = torch.export.export(Loss(), (scores.detach(),)).run_decompositions().module()(scores.detach())
(first,) = torch.autograd.grad(eager, scores)
(second,) = torch.autograd.grad(compiled, scores)
by_hand = sum(
    max(0.0, 1 - float(row[label]) + float(row[other])) / 5
    for row in scores.detach() for label in (3, 1) for other in (0, 2, 4)
) / 4
print(torch.__version__, f"by hand {by_hand:.4f} eager {eager:.4f} compiled {compiled:.4f} exported {exported:.4f}",
      f"gradients differ by up to {(first - second).abs().max():.2g}")
assert abs(eager.item() - by_hand) < 1e-5
assert abs(compiled.item() - by_hand) > 0.1 and abs(exported.item() - by_hand) > 0.1
print("as described")
PY
"$folder/venv/bin/python" -W ignore seen.py
