#!/usr/bin/env bash
# torch 2.13.0 (CPU): behind a graph break, a gradient is copied into the strides of the result it belongs to.
#
# The guess: backend="aot_eager" runs eager PyTorch's kernels in eager PyTorch's order, so that a model without random
#   numbers has eager's gradients in every bit, with a graph break or without.
# What happens: AOTAutograd traces a backward before it sees a gradient and guesses that it will have the result's
#   strides. Of a transposed result the gradient is usually contiguous; it is copied into the guessed strides, and what
#   comes next (batch norm's sums, the convolution's gradients) runs other kernels. Without the break, or with
#   torch._functorch.config.guess_tangent_strides_as_outputs = False, all bits are eager's. (With that switch off it is
#   the other way round where a gradient does arrive transposed.)
# Seen (torch 2.13.0+cpu): with a break 4 of 6 gradients differ, by up to 1.9e-8; none without, none with the switch off.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet torch==2.13.0 numpy==2.4.6
cd "$folder"
cat > net.py <<'PY'
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self, breaks):
        super().__init__()
        self.conv, self.norm = nn.Conv1d(16, 16, 3, padding=1), nn.BatchNorm1d(16)
        self.head, self.breaks = nn.Linear(16, 5), breaks

    def forward(self, x):
        x = self.norm(self.conv(x.transpose(1, 2))).transpose(1, 2)
        if self.breaks:
            torch._dynamo.graph_break()
        return self.head(x)
PY
cat > seen.py <<'PY'
import torch
import torch._functorch.config as config
from net import Net

torch.set_num_threads(1)
torch.manual_seed(0)
x = torch.randn(4, 6, 16)


def gradients(breaks, compiled):
    torch.manual_seed(0)
    net = Net(breaks)
    torch._dynamo.reset()
    run = torch.compile(net, backend="aot_eager") if compiled else net
    run(x).square().mean().backward()
    return [p.grad for p in net.parameters()]


def num_different(breaks):
    pairs = list(zip(gradients(breaks, False), gradients(breaks, True), strict=True))
    print(torch.__version__, "break:", breaks, "guess:", config.guess_tangent_strides_as_outputs,
          "largest difference:", max(float((a - b).abs().max()) for a, b in pairs))
    return sum(not torch.equal(a, b) for a, b in pairs)


assert torch.__version__.startswith("2.13.0") and config.guess_tangent_strides_as_outputs
assert num_different(False) == 0
assert num_different(True) == 4, "the guess no longer changes bits"
with config.patch(guess_tangent_strides_as_outputs=False):
    assert num_different(True) == 0
PY
"$folder/venv/bin/python" seen.py
