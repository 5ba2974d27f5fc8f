#!/usr/bin/env bash
# torch 2.13.0 (CPU): an in-place activation after nn.Linear on sequences takes more memory, not less.
#
# The guess: nn.ReLU(inplace=True) saves a buffer, so a training step peaks lower than with nn.ReLU().
# What happens: with a bias and a 3-D input the layer's result is a view (addmm's matrix looked at in three
#   dims). Writing to it in place makes autograd put an operation between that copies the whole gradient.
#   Forward and backward of 16 MiB then peak at 80 MiB instead of 32. With a 2-D input, where the result is
#   no view, both peak alike.
# Seen (torch 2.13.0+cpu): 3-D out of place 32.0 MiB, in place 80.0 MiB; 2-D 32.0 MiB and 32.0 MiB.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet torch==2.13.0 numpy==2.4.6
cd "$folder"
KINETO_LOG_LEVEL=9 OMP_NUM_THREADS=1 "$folder/venv/bin/python" - <<'PY'
import torch


def peak_mib(step):
    step()  # what is allocated once and for all
    with torch.autograd.profiler.profile(profile_memory=True, use_kineto=True) as profiler:
        step()
    events = profiler.kineto_results.events()
    sizes = [(e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"]
    live = highest = 0
    for _, size in sorted(sizes, key=lambda pair: pair[0]):
        live += size
        highest = max(highest, live)
    return highest / 2**20


def measured(shape, activation):
    layer, x = torch.nn.Linear(256, 256), torch.randn(*shape)

    def step():
        activation(layer(x)).sum().backward()
        layer.zero_grad()

    return peak_mib(step)


sequences, rows = (64, 256, 256), (64 * 256, 256)
peaks = [measured(s, a) for s in (sequences, rows) for a in (torch.relu, torch.relu_)]
print(torch.__version__, "3-D: %.1f and %.1f MiB; 2-D: %.1f and %.1f MiB" % tuple(peaks))
out_of_place, in_place, flat_out_of_place, flat_in_place = peaks
assert torch.__version__.startswith("2.13.0")
assert in_place > 2 * out_of_place, "in place no longer takes more than twice the peak"
assert abs(flat_in_place - flat_out_of_place) < 1, "in two dims they no longer peak alike"
PY
