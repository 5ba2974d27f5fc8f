"""Loss heads in parts: each rank has some words of a vocabulary, and no rank has all logits.

Of other ranks, cross entropy needs three numbers for each token: the largest logit, the sum of
exponentials, and the logit of the word that follows (Shoeybi et al. 2019, arXiv 1909.08053).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from packlight.errors import UnsupportedModelError
from packlight.torch_internals.collectives import reduced


def split_head(model: nn.Module, mesh: DeviceMesh) -> str:
    """Give each rank its words of a causal language model's head, and the model a loss that knows.

    Args:
        model: of transformers; changed in place.
        mesh: of one dimension.

    Returns:
        The path of the head, whose parameters are DTensors then.

    Raises:
        UnsupportedModelError: it has no such head, or one that is an embedding, too; nothing is
            changed.
    """
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    path = head_of(model, mesh.size())
    head = model.get_submodule(path)
    parallelize_module(head, mesh, ColwiseParallel())
    model.loss_function = PartOfLoss(mesh)  # type: ignore[assignment]
    return path


def head_of(model: nn.Module, num_ranks: int) -> str:
    """Return the path of a head that can be split.

    Raises:
        UnsupportedModelError: there is none.
    """
    name = type(model).__name__
    find = getattr(model, "get_output_embeddings", None)
    head = None if find is None else find()
    # (A model without a type of loss has that of causal models.)
    is_causal = getattr(model, "loss_type", None) in (None, "ForCausalLM")
    has_encoder = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    if not isinstance(head, nn.Linear) or not is_causal or has_encoder:
        raise UnsupportedModelError(
            f"{name} has no linear head of a causal language model\nhint: leave splits_head= out"
        )
    path: str
    (path,) = [path for path, module in model.named_modules() if module is head]
    shared = [n for n, p in model.named_parameters(remove_duplicate=False) if p is head.weight]
    if len(shared) > 1:
        raise UnsupportedModelError(
            f"{path}.weight is {shared[0]}, too: an embedding reads all words\n"
            "hint: tie_word_embeddings=False in the config, or leave splits_head= out"
        )
    if head.out_features % num_ranks:
        raise UnsupportedModelError(
            f"{path} has {head.out_features} words, of which {num_ranks} ranks cannot have as many "
            "each\nhint: a vocabulary padded to a multiple"
        )
    return path


class PartOfLoss:
    """The loss of a causal language model, of logits for this rank's words.

    Args:
        mesh: of the ranks that have the others.
    """

    def __init__(self, mesh: DeviceMesh) -> None:
        self._rank, self._group = mesh.get_local_rank(), str(mesh.get_group().group_name)

    def __call__(
        self, logits: torch.Tensor, labels: torch.Tensor, ignore_index: int = -100, **_: Any
    ) -> torch.Tensor:
        """Return the mean loss of all tokens but the first, and of those that count.

        Args:
            logits: for the words that this rank has, of shape (rows, tokens, words).
            labels: tokens, of shape (rows, tokens).
            ignore_index: label of those that do not count.
        """
        following = F.pad(labels, (0, 1), value=ignore_index)[..., 1:].flatten()
        losses = self._of_tokens(logits.float().flatten(0, -2), following)
        counts = following != ignore_index
        return torch.where(counts, losses, 0.0).sum() / counts.sum()

    def _of_tokens(self, logits: torch.Tensor, words: torch.Tensor) -> torch.Tensor:
        largest = reduced(logits.detach().amax(-1), "max", self._group)
        logits = logits - largest[:, None]
        total = _summed(logits.exp().sum(-1), self._group)
        place = words - self._rank * logits.shape[-1]
        is_mine = (place >= 0) & (place < logits.shape[-1])
        own = logits.gather(-1, torch.where(is_mine, place, 0)[:, None]).squeeze(-1)
        of_word = _summed(torch.where(is_mine, own, 0.0), self._group)
        return total.log() - of_word


class _Sum(torch.autograd.Function):
    """Adds up over ranks that go on with the same: each has the whole gradient of its part."""

    @staticmethod
    def forward(ctx: Any, value: torch.Tensor, group: str) -> torch.Tensor:
        return reduced(value.contiguous(), "sum", group)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        return gradient, None


def _summed(value: torch.Tensor, group: str) -> torch.Tensor:
    summed: torch.Tensor = _Sum.apply(value, group)  # type: ignore[no-untyped-call]
    return summed
