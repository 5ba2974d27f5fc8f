#!/usr/bin/env bash
# torch 2.13.0 (CPU), torch.distributed with gloo: is_completed() of a message is False until somebody waits for it.
#
# The guess: work = dist.irecv(tensor, src) may be polled: work.is_completed() turns True when the message is there, as it
#   does for work = dist.all_reduce(tensor, async_op=True), so that a loop can look after other things meanwhile.
# What happens: of isend and irecv it stays False, also when the tensor holds what was sent. wait() then returns at once, and
#   only after that it is True. Whoever polls waits for ever; a thread that waits, and an event, do the same.
# Seen (torch 2.13.0+cpu), a second after both ranks started: rank 1 has the other's values, is_completed() False on both;
#   an all_reduce started after it True; after wait() all True.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet torch==2.13.0 numpy==2.4.6
cd "$folder"
cat > seen.py <<'PY'
import sys
import time

import torch
import torch.distributed as dist

rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=rank, world_size=2)
values = torch.full((4,), float(rank + 1))
message = dist.irecv(values, 0) if rank else dist.isend(values, 1)
collective = dist.all_reduce(torch.ones(1), async_op=True)
time.sleep(1)
print(torch.__version__, "rank", rank, values.tolist(), "message:", message.is_completed(),
      "all_reduce:", collective.is_completed(), flush=True)
assert torch.__version__.startswith("2.13.0")
assert values.tolist() == [1.0] * 4, "the message is there"
assert collective.is_completed() and not message.is_completed(), "messages say so now"
message.wait()
collective.wait()
assert message.is_completed()
dist.barrier()
PY
"$folder/venv/bin/python" seen.py 0 "$folder/store" &
other=$!
"$folder/venv/bin/python" seen.py 1 "$folder/store"
wait "$other"
