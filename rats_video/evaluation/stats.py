"""Means with honest intervals: clips of one prompt are not independent, so prompts are counted."""

from __future__ import annotations

import functools
import math
from collections import defaultdict
from dataclasses import dataclass
from statistics import NormalDist
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Hashable, Sequence

_LEVEL = 0.95


@dataclass(frozen=True)
class Estimate:
    """A mean and its interval.

    Args:
        mean: the mean.
        ci95: half the width of its 95% Student-t interval; infinite when one unit alone gives no spread.
        num: independent units behind it (groups where groups were given, else values).
    """

    mean: float
    ci95: float
    num: int


def mean_ci95(values: Sequence[float] | Tensor, groups: Sequence[Hashable] | None = None) -> Estimate:
    """Mean over prompts with its 95% interval.

    With `groups`, values are first averaged within each group and the interval is that of the group means. Counting
    several seeds of one prompt as separate prompts would make the interval too narrow.

    Args:
        values: N scores, `[N]` if a tensor.
        groups: N labels, one a value, e.g. the prompt; None treats all values as independent.

    Raises:
        ValueError: there is no value, one is not finite, or the lengths differ.
    """
    numbers = _finite_floats(values)
    if groups is not None:
        numbers = _group_means(numbers, groups)
    num = len(numbers)
    mean = math.fsum(numbers) / num
    if num == 1:
        return Estimate(mean=mean, ci95=math.inf, num=1)
    variance = math.fsum((number - mean) ** 2 for number in numbers) / (num - 1)
    return Estimate(mean=mean, ci95=t_quantile95(num - 1) * math.sqrt(variance / num), num=num)


def paired_difference(
    a_values: Sequence[float] | Tensor,
    b_values: Sequence[float] | Tensor,
    groups: Sequence[Hashable] | None = None,
) -> Estimate:
    """Mean of `a - b` with its 95% interval, the two scored on the same prompts and noise in the same order.

    Pairing removes what the two share (a hard prompt is hard for both), so it finds differences that separate intervals
    hide. The difference is distinguishable from zero when `abs(mean) > ci95`.

    Args:
        a_values: N scores, `[N]` if a tensor.
        b_values: N scores of the other arm, pair by pair.
        groups: as in `mean_ci95`.

    Raises:
        ValueError: as `mean_ci95`, or the two differ in length.
    """
    a_numbers, b_numbers = _finite_floats(a_values), _finite_floats(b_values)
    if len(a_numbers) != len(b_numbers):
        raise ValueError(f"paired values must match: got {len(a_numbers)} and {len(b_numbers)}")
    return mean_ci95([a - b for a, b in zip(a_numbers, b_numbers, strict=True)], groups)


def crossed_ci95(runs: Sequence[Sequence[float] | Tensor], groups: Sequence[Hashable] | None = None) -> Estimate:
    """Mean over runs that were all scored on the same clips, with its 95% interval over both prompts and runs.

    Another set of prompts would give another mean, and so would another training. This is the two-way layout without
    replication, both factors random. With the mean squares of prompts, runs and their interaction the variance of the
    grand mean is `(MS_prompts + MS_runs - MS_interaction) / (runs * prompts)`, here at least that of either factor
    alone; degrees of freedom by Satterthwaite. A single run says nothing of others, so it is treated as `mean_ci95`.

    Args:
        runs: S times N scores, clip by clip in the same order: one row a training seed.
        groups: as in `mean_ci95`.

    Raises:
        ValueError: as `mean_ci95`, or the rows differ in length.
    """
    rows = [_finite_floats(run) for run in runs]
    if len({len(row) for row in rows}) != 1:
        raise ValueError(f"runs must be scored on the same clips: got {[len(row) for row in rows]}")
    if groups is not None:
        rows = [_group_means(row, groups) for row in rows]
    if len(rows) == 1:
        return mean_ci95(rows[0])
    num_runs, num_prompts = len(rows), len(rows[0])
    of_runs = [math.fsum(row) / num_prompts for row in rows]
    of_prompts = [math.fsum(column) / num_runs for column in zip(*rows, strict=True)]
    mean = math.fsum(of_runs) / num_runs
    if num_prompts == 1:
        return Estimate(mean=mean, ci95=math.inf, num=1)
    runs_ms = num_prompts * math.fsum((value - mean) ** 2 for value in of_runs) / (num_runs - 1)
    prompts_ms = num_runs * math.fsum((value - mean) ** 2 for value in of_prompts) / (num_prompts - 1)
    both = (num_runs - 1) * (num_prompts - 1)
    both_ms = math.fsum(
        (row[i] - of_run - of_prompts[i] + mean) ** 2
        for row, of_run in zip(rows, of_runs, strict=True)
        for i in range(num_prompts)
    ) / both  # fmt: skip
    total = max(prompts_ms + runs_ms - both_ms, prompts_ms, runs_ms)
    if total == 0:
        return Estimate(mean=mean, ci95=0.0, num=num_prompts)
    spread = prompts_ms**2 / (num_prompts - 1) + runs_ms**2 / (num_runs - 1) + both_ms**2 / both
    degrees = max(1, int(total**2 / spread))
    half = t_quantile95(degrees) * math.sqrt(total / (num_runs * num_prompts))
    return Estimate(mean=mean, ci95=half, num=num_prompts)


def share_ci95(share: float, num: float) -> tuple[float, float]:
    """The 95% interval of a share seen in `num` independent units (Wilson, 1927); it has a width even at 0 and 1."""
    z = NormalDist().inv_cdf((1 + _LEVEL) / 2)
    centre = (share + z * z / (2 * num)) / (1 + z * z / num)
    half = z / (1 + z * z / num) * math.sqrt(share * (1 - share) / num + z * z / (4 * num * num))
    return max(0.0, centre - half), min(1.0, centre + half)


def clustered_share_ci95(values: Sequence[float], *labels: Sequence[Hashable]) -> tuple[float, float]:
    """The 95% interval of a share of votes of which those under one label are not independent.

    The variance counts clusters, of two sets of labels (prompts and people, say) as Cameron, Gelbach and Miller (2011):
    that of either, less that of both together, at least that of either alone; degrees of freedom by Satterthwaite, as
    in `crossed_ci95`. It gives the votes that so many independent ones would equal (Korn and Graubard, 1998), of which
    `share_ci95` makes the interval. Where all say the same, the fewest clusters of any set are counted.

    Args:
        values: N votes in [0, 1], half for no difference.
        labels: one or two sets of N labels. A set of one label says nothing of others and is left out where there is
            another.

    Raises:
        ValueError: as `mean_ci95`.
    """
    numbers = _finite_floats(values)
    sets = [each for each in labels if len(set(each)) > 1] or [labels[0]]
    share, fewest = math.fsum(numbers) / len(numbers), min(len(set(each)) for each in sets)
    if fewest == 1 or len(set(numbers)) == 1:
        return share_ci95(share, fewest)
    both = [*zip(*sets, strict=True)]
    parts = [_cluster_variance(numbers, share, each) for each in sets]
    degrees = [len(set(each)) - 1 for each in sets]
    total, spread = max(parts), sum(part**2 / degree for part, degree in zip(parts, degrees, strict=True))
    if len(sets) == 2:
        shared = _cluster_variance(numbers, share, both)
        total = max(total, math.fsum(parts) - shared)
        spread += shared**2 / math.prod(degrees)
    if total == 0:
        return share_ci95(share, fewest)
    normal = NormalDist().inv_cdf((1 + _LEVEL) / 2)
    ratio = normal / t_quantile95(max(1, int(total**2 / spread)))
    return share_ci95(share, min(len(numbers), share * (1 - share) / total * ratio**2))


def _cluster_variance(numbers: Sequence[float], mean: float, labels: Sequence[Hashable]) -> float:
    """The variance of a mean, from the sums of what each cluster adds to it."""
    sums: defaultdict[Hashable, float] = defaultdict(float)
    for number, label in zip(numbers, labels, strict=True):
        sums[label] += number - mean
    num = len(sums)
    return num / (num - 1) * math.fsum(value**2 for value in sums.values()) / len(numbers) ** 2


def finite(values: Sequence[float]) -> list[float]:
    """The values that are finite."""
    return [value for value in values if math.isfinite(value)]


def intervals_apart(a: Estimate, b: Estimate) -> bool:
    """True if the two 95% intervals do not touch: sufficient for a difference, not necessary."""
    return abs(a.mean - b.mean) > a.ci95 + b.ci95


@functools.lru_cache(maxsize=256)
def t_quantile95(degrees: int) -> float:
    """The t with `P(|T| < t) = 0.95` for Student's t with `degrees` degrees of freedom (12.706 for 1, 1.960 at last).

    Solved by bisection on the closed form for whole degrees of freedom (Abramowitz and Stegun 26.7.3-4), in the angle
    `theta = atan(t / sqrt(degrees))`: exact to rounding, and no SciPy.

    Raises:
        ValueError: `degrees` is below 1.
    """
    if degrees < 1:
        raise ValueError(f"degrees of freedom must be at least 1, got {degrees}")
    low, high = 0.0, math.pi / 2
    while (middle := (low + high) / 2) not in (low, high):  # until no float lies between
        if _central_probability(middle, degrees) < _LEVEL:
            low = middle
        else:
            high = middle
    return math.sqrt(degrees) * math.tan(high)


def _central_probability(theta: float, degrees: int) -> float:
    """`P(|T| < sqrt(degrees) * tan(theta))`."""
    sine, cosine_squared = math.sin(theta), math.cos(theta) ** 2
    odd = degrees % 2
    term = math.cos(theta) if odd else 1.0
    total = 0.0
    for power in range(odd, degrees - 1, 2):
        total += term
        term *= cosine_squared * (power + 1) / (power + 2)
    return 2 / math.pi * (theta + sine * total) if odd else sine * total


def _finite_floats(values: Sequence[float] | Tensor) -> list[float]:
    """The values as Python floats, or a ValueError."""
    if isinstance(values, Tensor):
        if values.ndim != 1:
            raise ValueError(f"values must be [N], got {list(values.shape)}")
        values = values.tolist()
    numbers = [float(value) for value in values]
    if not numbers:
        raise ValueError("values are empty")
    if not all(map(math.isfinite, numbers)):
        raise ValueError("values hold NaN or infinity")
    return numbers


def _group_means(numbers: Sequence[float], groups: Sequence[Hashable]) -> list[float]:
    """The mean of each group, in order of first appearance."""
    if len(groups) != len(numbers):
        raise ValueError(f"groups must match the values: got {len(groups)} and {len(numbers)}")
    members: defaultdict[Hashable, list[float]] = defaultdict(list)
    for number, group in zip(numbers, groups, strict=True):
        members[group].append(number)
    return [math.fsum(member) / len(member) for member in members.values()]
