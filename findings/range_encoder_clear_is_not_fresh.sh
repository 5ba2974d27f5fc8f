#!/usr/bin/env bash
# constriction 0.5.0: RangeEncoder.clear() does not make the encoder what a new one is.
#
# The guess: after clear() an encoder is empty (is_empty() is True, num_bits() is 0), so one encoder can serve
#   message after message.
# What happens: what the carry of the message before left behind goes into the next one: some messages come out as
#   other words than a new encoder gives, and decode to another message. No error.
# Seen (constriction 0.5.0, numpy 2.4.6): 54 of 2000 short messages.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet constriction==0.5.0 numpy==2.4.6
cd "$folder"
"$folder/venv/bin/python" - <<'PY'
from importlib.metadata import version

import constriction
import numpy as np

queue, bernoulli = constriction.stream.queue, constriction.stream.model.Bernoulli(perfect=False)
num_other, num_wrong = 0, 0
for seed in range(2000):
    draw = np.random.default_rng(seed)
    likely = np.full(int(draw.integers(1, 60)), 0.3)
    first, second = ((draw.random(len(likely)) < 0.3).astype(np.int32) for _ in range(2))
    used, new = queue.RangeEncoder(), queue.RangeEncoder()
    used.encode(first, bernoulli, likely)
    used.clear()
    assert used.is_empty() and used.num_bits() == 0
    for encoder in (used, new):
        encoder.encode(second, bernoulli, likely)
    words = used.get_compressed()
    num_other += not np.array_equal(words, new.get_compressed())
    num_wrong += not np.array_equal(queue.RangeDecoder(words).decode(bernoulli, likely), second)
print(version("constriction"), f"{num_other} of 2000 have other words, {num_wrong} decode to another message")
assert version("constriction") == "0.5.0"
assert num_other == num_wrong == 54, "this changed"
PY
