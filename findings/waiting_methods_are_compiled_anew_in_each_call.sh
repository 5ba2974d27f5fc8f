#!/usr/bin/env bash
# torch 2.13.0 (CPU): with nested graph breaks, found.append(layer(x)) is compiled again in every call where layer breaks.
#
# The guess: with torch._dynamo.config.nested_graph_breaks a break inside of a called function cuts the caller, too, and
#   what follows in the caller is compiled once, as behind x = layer(x).
# What happens: where the call's result is an argument of a container's method (found.append, found.update), the bound method
#   waits on the stack. Behind the break it is made again (a new object in each call), and what follows is guarded by its
#   identity: every call compiles everything behind the break again, until recompile_limit ends that.
# Seen (torch 2.13.0+cpu): graphs after calls 1 to 4: 3, 3, 3, 3 for x = layer(x); 3, 6, 9, 12 for found.append(layer(x)).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet torch==2.13.0 numpy==2.4.6
cd "$folder"
cat > net.py <<'PY'
import torch
from torch import nn


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        torch._dynamo.graph_break()
        return self.linear(x)


class Net(nn.Module):
    def __init__(self, collects):
        super().__init__()
        self.first, self.second, self.third = Layer(), Layer(), Layer()
        self.collects = collects

    def forward(self, x):
        found = []
        if self.collects:
            found.append(self.first(x))
            found.append(self.second(found[-1]))
            found.append(self.third(found[-1]))
            return found[-1].sum()
        x = self.first(x)
        x = self.second(x)
        return self.third(x).sum()
PY
cat > seen.py <<'PY'
import torch
from net import Net
from torch._dynamo.testing import CompileCounter

torch._dynamo.config.nested_graph_breaks = True
torch._dynamo.config.recompile_limit = 100
for collects in (False, True):
    torch._dynamo.reset()
    counter = CompileCounter()
    run = torch.compile(Net(collects), backend=counter)
    graphs = []
    for _ in range(4):
        run(torch.ones(2, 4))
        graphs.append(counter.frame_count)
    print(torch.__version__, "append:", collects, "graphs:", graphs)
    assert (len(set(graphs)) == 4) is collects and (len(set(graphs)) == 1) is not collects
print("as described")
PY
"$folder/venv/bin/python" -W ignore seen.py
