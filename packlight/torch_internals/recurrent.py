"""What torch's traced recurrent layers leave out or cannot run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch


@contextmanager
def whole_recurrent_layers() -> Iterator[None]:
    """Trace `nn.RNN`, `nn.GRU` and `nn.LSTM` as eager PyTorch runs them.

    torch's decompositions forget the dropout between layers (a comparison in `_rnn_helper` never
    holds), and take oneDNN's LSTM for inference where inputs want no gradients, though weights do:
    its backward then lacks the workspace.

    Relied upon: both are functions of `torch._decomp.decompositions` that are looked up when they
    are called; hidden states and weights come as a list, by layers, then directions. Where one is
    not there, nothing is changed.
    """
    from torch._decomp import decompositions

    stacked = getattr(decompositions, "_rnn_helper", None)
    select = getattr(decompositions, "select_one_layer_lstm_function", None)
    if stacked is None or select is None:
        yield
        return

    def with_dropout(
        values: torch.Tensor, hidden: Sequence[Any], weights: Sequence[Any], has_biases: bool,
        num_layers: int, dropout: float, train: bool, bidirectional: bool, batch_first: bool,
        layer: Any,
    ) -> tuple[torch.Tensor, list[Any]]:
        values = values.transpose(0, 1) if batch_first else values
        width, final = 2 if bidirectional else 1, []
        for number in range(num_layers):
            if number and dropout and train:
                values = torch.dropout(values, dropout, train)
            here = slice(number * width, (number + 1) * width)
            values, last = stacked(
                values, hidden[here], weights[here], has_biases, 1, 0.0, train, bidirectional,
                False, layer,
            )
            final += last
        return values.transpose(0, 1) if batch_first else values, final

    def for_training(values: torch.Tensor, hidden: Any, weights: Sequence[Any]) -> Any:
        wants = any(weight.requires_grad for weight in chain.from_iterable(weights))
        return decompositions.one_layer_lstm if wants else select(values, hidden, weights)

    decompositions._rnn_helper = with_dropout
    decompositions.select_one_layer_lstm_function = for_training
    try:
        yield
    finally:
        decompositions._rnn_helper = stacked
        decompositions.select_one_layer_lstm_function = select
