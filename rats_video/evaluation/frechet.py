"""Distances of two sets of clips: Frechet distance, and a kernel distance without its bias."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rats_video.evaluation.stats import Estimate, t_quantile95


@dataclass(frozen=True)
class Gaussian:
    """A normal distribution of D features.

    Args:
        mean: `[D]`.
        root: `[R, D]` with `root.T @ root` the covariance; R is any number.
    """

    mean: Tensor
    root: Tensor

    @staticmethod
    def of(features: Tensor) -> Gaussian:
        """The one with mean and (unbiased) covariance of `[N, D]`; raises ValueError for fewer than two rows."""
        if len(features) < 2:
            raise ValueError(f"a covariance needs two rows, got {len(features)}")
        rows = features.double()
        mean = rows.mean(dim=0)
        # A triangular factor of the rows themselves: the covariance, whose condition is squared, is never formed.
        root: Tensor = torch.linalg.qr((rows - mean) / math.sqrt(len(rows) - 1), mode="r")[1]
        return Gaussian(mean, root)


def frechet_distance(a: Gaussian, b: Gaussian) -> float:
    """`|mean_a - mean_b|^2 + tr(A) + tr(B) - 2 tr((A B)^(1/2))` of covariances A and B, in float64, at least 0.

    The distance of FID (arXiv 1706.08500) and FVD (arXiv 1812.01717), squared as usual. With roots,
    `A = R^T R` and `B = S^T S`, the eigenvalues of `A B` are the squared singular values of `R S^T`: their sum is the
    last trace, without a square root of a matrix that rounding may have made indefinite, and with covariances that are
    singular.

    Of two finite samples of one distribution it is above 0, and grows with D and as the samples shrink: compare only
    values from the same number of clips, and see `kernel_distance`.
    """
    means = (a.mean - b.mean).square().sum()
    overlap = torch.linalg.svdvals(a.root @ b.root.T).sum()
    return max(0.0, float(means + a.root.square().sum() + b.root.square().sum() - 2 * overlap))


def kernel_distance(a: Tensor, b: Tensor, a_groups: Sequence[Hashable], b_groups: Sequence[Hashable]) -> float:
    """Unbiased squared maximum mean discrepancy with KID's kernel `(x . y / D + 1)^3` (arXiv 1801.01401).

    Clips of one prompt are not independent, so all three means skip pairs of the same prompt. Of two sets drawn alike
    for the same prompts it is then 0 on average, whatever their sizes, and may well be below 0.

    Args:
        a: features `[N, D]`.
        b: features `[M, D]`.
        a_groups: N labels: the prompts.
        b_groups: M labels.

    Raises:
        ValueError: a set has fewer than two prompts, or both together have only one.
    """
    a_labels, b_labels = _numbered(a_groups, b_groups)
    a, b = a.double(), b.double()
    within = _mean_kernel(a, a, a_labels, a_labels) + _mean_kernel(b, b, b_labels, b_labels)
    return within - 2 * _mean_kernel(a, b, a_labels, b_labels)


def jackknife(statistic: Callable[[Tensor], float], groups: Sequence[Hashable]) -> Estimate:
    """A statistic of a set with its 95% interval, from how it changes as each group is left out (Tukey, 1958).

    Args:
        statistic: of the members at indices `[K]`.
        groups: N labels, e.g. prompts.
    """
    (labels,) = _numbered(groups)
    num = int(labels.max()) + 1
    whole = statistic(torch.arange(len(labels)))
    if num < 3:  # without one of two groups nothing is left to compare
        return Estimate(whole, math.inf, num)
    without = [statistic((labels != group).nonzero()[:, 0]) for group in range(num)]
    centre = math.fsum(without) / num
    variance = (num - 1) / num * math.fsum((value - centre) ** 2 for value in without)
    return Estimate(whole, t_quantile95(num - 1) * math.sqrt(variance), num)


def _mean_kernel(a: Tensor, b: Tensor, a_labels: Tensor, b_labels: Tensor) -> float:
    """Mean over pairs of different labels."""
    others = (a_labels[:, None] != b_labels[None]).double()
    if not others.any():
        raise ValueError("a kernel distance needs clips of more than one prompt")
    return float(((a @ b.T / a.shape[1] + 1) ** 3 * others).sum() / others.sum())


def _numbered(*groups: Sequence[Hashable]) -> tuple[Tensor, ...]:
    """The labels as numbers 0, 1, ... in order of first appearance, the same label the same number in each."""
    numbers: dict[Hashable, int] = {}
    return tuple(torch.tensor([numbers.setdefault(label, len(numbers)) for label in each]) for each in groups)
