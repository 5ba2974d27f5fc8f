#!/usr/bin/env bash
# torch 2.13.0 (CPU): a traced nn.LSTM, nn.GRU or nn.RNN has no dropout between its layers, in training mode, too.
#
# The guess: torch.export of nn.GRU(..., num_layers=3, dropout=0.5).train(), once decomposed, has two dropouts between its
#   layers, and so has what torch.compile(backend="aot_eager") makes of it: eager PyTorch runs them, and traced nn.Dropout is there.
# What happens: the decomposition of the stacked layers sets the probability to 0 in its first turn unless the number of
#   layers is less than the layer's own minus one, which never holds. No warning: what is trained that way is not regularised.
#   (torch.compile leaves recurrent layers to eager PyTorch unless torch._dynamo.config.allow_rnn says otherwise; make_fx
#   without the Python dispatcher decomposes them elsewhere, and keeps both dropouts.)
# Seen (torch 2.13.0+cpu), for nn.RNN, nn.GRU and nn.LSTM: two eager runs differ; exported, no random operator; two compiled
#   runs are equal.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet torch==2.13.0 numpy==2.4.6
cd "$folder"
cat > seen.py <<'PY'
import torch
from torch import nn

torch._dynamo.config.allow_rnn = True
torch.manual_seed(0)
x = torch.randn(5, 2, 4)
for kind in (nn.RNN, nn.GRU, nn.LSTM):
    net = kind(4, 4, num_layers=3, dropout=0.5).train()
    exported = torch.export.export(net, (x,)).run_decompositions()
    names = [str(node.target) for node in exported.graph.nodes]
    drawn = [n for n in names if "dropout" in n or "rand" in n or "bernoulli" in n]
    torch._dynamo.reset()
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    given = x.clone().requires_grad_()
    eager_repeats = torch.equal(net(given)[0], net(given)[0])
    compiled_repeats = torch.equal(compiled(given)[0], compiled(given)[0])
    print(torch.__version__, kind.__name__, "random operators exported:", len(drawn),
          "eager repeats:", eager_repeats, "compiled repeats:", compiled_repeats)
    assert not drawn and not eager_repeats and compiled_repeats
print("as described")
PY
"$folder/venv/bin/python" -W ignore seen.py
