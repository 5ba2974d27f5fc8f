#!/usr/bin/env bash
# torch 2.13.0 (CPU): a forward hook that is registered after the first compiled call is never called.
#
# The guess: torch.compile guards what it traced; a new hook on a submodule leads to a recompilation.
# What happens: hooks are guarded only where torch._dynamo.config.skip_nnmodule_hook_guards is False, and it is True.
#   The compiled model goes on without the hook, while the model itself runs it: they return different numbers.
#   Hooks on parameters do run, since autograd calls those.
# Seen (torch 2.13.0+cpu): a hook that zeroes a layer's output changes the model's result, not the compiled one's; with
#   the option off it changes both.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet torch==2.13.0 numpy==2.4.6
cd "$folder"
"$folder/venv/bin/python" - <<'PY'
import torch
from torch import nn


def is_called(skips_guards):
    torch._dynamo.reset()
    torch._dynamo.config.skip_nnmodule_hook_guards = skips_guards
    model, x = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), torch.randn(2, 4)
    compiled = torch.compile(model, backend="eager")
    compiled(x)
    before = model(x)
    model[0].register_forward_hook(lambda module, inputs, output: output * 0)
    assert not torch.equal(model(x), before), "the model calls its hook"
    return torch.equal(compiled(x), model(x))


default = torch._dynamo.config.skip_nnmodule_hook_guards
called = is_called(default), is_called(False)
print(torch.__version__, "skips guards:", default, "hook called by default, with guards:", called)
assert torch.__version__.startswith("2.13.0")
assert default is True and called == (False, True), "late hooks are noticed now"
PY
