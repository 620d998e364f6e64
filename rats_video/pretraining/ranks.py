"""Statistics of ranks: area under the ROC curve and Spearman's correlation."""

from __future__ import annotations

import torch
from torch import Tensor


def auc(scores: Tensor, truth: Tensor) -> float | None:
    """Area under the ROC curve, from the rank sum of the true cases; None where only one kind occurs."""
    positive, negative = int(truth.sum()), int((~truth).sum())
    if not positive or not negative:
        return None
    wins = float(_ranks(scores)[truth].sum()) - positive * (positive - 1) / 2
    return wins / (positive * negative)


def rank_correlation(one: Tensor, other: Tensor) -> float:
    """Spearman's, of two scores `[N]` of the same things: 1 where they rank alike; NaN where one never differs."""
    return float(torch.corrcoef(torch.stack([_ranks(one), _ranks(other)]))[0, 1])


def _ranks(values: Tensor) -> Tensor:
    """Ranks from 0, ties sharing their mean rank, as Spearman's correlation wants them."""
    return (values[:, None] > values).sum(dim=1) + ((values[:, None] == values).sum(dim=1) - 1) / 2
