"""What members say together: means, votes, how much they disagree, how far they can be believed."""

from __future__ import annotations

import torch


def mean_probabilities(logits: torch.Tensor) -> torch.Tensor:
    """Return the mean over members of their probabilities.

    Args:
        logits: [members, ..., classes].

    Returns:
        [..., classes].
    """
    return logits.softmax(dim=-1).mean(dim=0)


def vote(logits: torch.Tensor) -> torch.Tensor:
    """Return the class that most members would choose, the more probable one of several.

    Args:
        logits: [members, ..., classes].

    Returns:
        int64 [...].
    """
    num_classes = logits.shape[-1]
    counts = torch.nn.functional.one_hot(logits.argmax(dim=-1), num_classes).sum(dim=0)
    # Means lie between 0 and 1: half of one decides only where counts are equal.
    return (counts + 0.5 * mean_probabilities(logits)).argmax(dim=-1)


def disagreement(logits: torch.Tensor) -> torch.Tensor:
    """Return for what share of pairs of members, over all examples, their classes differ.

    Args:
        logits: [members, ..., classes], of two members or more.

    Returns:
        A scalar between 0 and 1.
    """
    num_members = logits.shape[0]
    if num_members < 2:
        raise ValueError("one member agrees with itself: disagreement takes two or more")
    chosen = torch.nn.functional.one_hot(logits.argmax(dim=-1), logits.shape[-1]).sum(dim=0)
    agreeing = (chosen * (chosen - 1)).sum(dim=-1).double()
    return 1 - (agreeing / (num_members * (num_members - 1))).mean()


def mutual_information(logits: torch.Tensor) -> torch.Tensor:
    """Return the entropy of the mean less the mean entropy, in nats: what members do not share.

    Args:
        logits: [members, ..., classes].

    Returns:
        [...], at least 0. (Depeweg et al. 2018, arXiv 1710.07283.)
    """
    probabilities = logits.softmax(dim=-1)

    def entropy(p: torch.Tensor) -> torch.Tensor:
        terms: torch.Tensor = torch.special.xlogy(p, p)
        return -terms.sum(dim=-1)

    return (entropy(probabilities.mean(dim=0)) - entropy(probabilities).mean(dim=0)).clamp(min=0)


def calibration_error(
    probabilities: torch.Tensor, labels: torch.Tensor, num_bins: int = 15
) -> torch.Tensor:
    """Return the expected calibration error: how far confidence is from accuracy.

    Examples are put in bins of equal width by the probability p of their class; the error is the
    sum over bins of |accuracy - mean p|, weighted by the bins' shares.

    Args:
        probabilities: [examples, classes].
        labels: int64 [examples].
        num_bins: of equal width between 0 and 1.

    Returns:
        A scalar. (Guo et al. 2017, arXiv 1706.04599.)

    >>> calibration_error(torch.tensor([[0.8, 0.2], [0.8, 0.2]]), torch.tensor([0, 1])).item()
    0.30000001192092896
    """
    confidence, chosen = probabilities.max(dim=-1)
    gap = (chosen == labels).to(confidence.dtype) - confidence
    bins = (confidence * num_bins).ceil().long().clamp(1, num_bins) - 1
    sums = torch.zeros(num_bins, dtype=gap.dtype, device=gap.device).index_add_(0, bins, gap)
    return sums.abs().sum() / len(labels)
