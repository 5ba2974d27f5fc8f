#!/usr/bin/env bash
# torch 2.13.0 (CPU, gloo): an exception that a DDP communication hook puts into its future is taken for its result.
#
# The guess: a hook that returns a torch.futures.Future may end it with `set_exception(error)`, as the class documents, and the
#   backward raises that error, or one that names it.
# What happens: the exception is stored as the future's value, unwrapped by Python's `wait()` and `value()` alone. DDP, in C++, casts
#   it to a tensor: "Unable to cast ... to Tensor", a RuntimeError without the class or trace of what failed. A future made by
#   `future.then(lambda done: done.value())` raises inside the callback, and DDP then reports class, words and place.
# Seen (torch 2.13.0+cpu): "RuntimeError: Unable to cast the disk is full to Tensor"; with `then`: "RuntimeError: Got the
#   following error when running the callback: OSError: the disk is full".
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet torch==2.13.0 numpy==2.4.6
cd "$folder"
"$folder/venv/bin/python" - <<'PY'
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

dist.init_process_group("gloo", init_method="file://" + __import__("os").path.abspath("store"), rank=0, world_size=1)


def said_by(finish):
    def hook(state, bucket):
        future = torch.futures.Future()
        future.set_exception(OSError("the disk is full"))
        return finish(future)

    model = DistributedDataParallel(torch.nn.Linear(2, 1))
    model.register_comm_hook(None, hook)
    try:
        model(torch.ones(1, 2)).sum().backward()
    except Exception as error:
        return f"{type(error).__name__}: {error}".splitlines()[0]


plain = said_by(lambda future: future)
chained = said_by(lambda future: future.then(lambda done: done.value()))
print(torch.__version__, repr(plain), repr(chained))
assert torch.__version__.startswith("2.13.0")
assert "Unable to cast" in plain and "OSError" not in plain, "the exception is raised now"
assert "OSError: the disk is full" in chained
dist.destroy_process_group()
PY
