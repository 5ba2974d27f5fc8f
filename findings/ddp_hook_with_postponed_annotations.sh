#!/usr/bin/env bash
# torch 2.13.0 (CPU, gloo): the communication hook of DDP's own documentation is refused in a file with postponed annotations.
#
# The guess: `def hook(state: object, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]` is right whether or not the file
#   begins with `from __future__ import annotations`, which changes no behaviour.
# What happens: register_comm_hook compares the annotations with the classes and does not resolve strings: "bucket annotation should be
#   dist.GradBucket", which is what it is. Without annotations the same hook is taken.
# Seen (torch 2.13.0+cpu): ValueError for the annotated one, none for the bare one.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet torch==2.13.0 numpy==2.4.6
cd "$folder"
"$folder/venv/bin/python" - <<'PY'
from __future__ import annotations

import os

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

dist.init_process_group("gloo", init_method="file://" + os.path.abspath("store"), rank=0, world_size=1)


def annotated(state: object, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    future = torch.futures.Future()
    future.set_result(bucket.buffer())
    return future


def bare(state, bucket):
    return annotated(state, bucket)


found = {}
for hook in (annotated, bare):
    try:
        DistributedDataParallel(torch.nn.Linear(2, 1)).register_comm_hook(None, hook)
        found[hook.__name__] = "taken"
    except ValueError as error:
        found[hook.__name__] = str(error)
print(torch.__version__, found)
assert torch.__version__.startswith("2.13.0")
assert "annotation should be dist.GradBucket" in found["annotated"], "strings are resolved now"
assert found["bare"] == "taken"
dist.destroy_process_group()
PY
