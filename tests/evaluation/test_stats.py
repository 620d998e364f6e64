"""Means, intervals and paired differences against known answers."""

from __future__ import annotations

import math

import pytest
import torch

from rats_video.evaluation.stats import (
    Estimate,
    clustered_share_ci95,
    intervals_apart,
    mean_ci95,
    paired_difference,
    share_ci95,
    t_quantile95,
)


@pytest.mark.parametrize(
    ("degrees", "expected"),  # printed tables of Student's t, two-sided 95%
    [
        (1, 12.7062047362),
        (2, 4.3026527297),
        (3, 3.1824463053),
        (4, 2.7764451052),
        (5, 2.5705818356),
        (9, 2.2621571628),
        (10, 2.2281388520),
        (30, 2.0422724563),
        (63, 1.9983405417),
        (120, 1.9799304051),
    ],
)
def test_t_quantiles_match_the_tables(degrees: int, expected: float) -> None:
    assert t_quantile95(degrees) == pytest.approx(expected, abs=2e-9)


def test_t_quantile_tends_to_the_normal_one() -> None:
    assert t_quantile95(5001) == pytest.approx(1.959963985, abs=5e-4)
    assert t_quantile95(5001) > 1.959963985


def test_t_quantile_needs_a_degree_of_freedom() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        t_quantile95(0)


def test_mean_and_interval_by_hand() -> None:
    # 1..5: mean 3, s = sqrt(2.5), half-width = 2.77645 * sqrt(2.5 / 5).
    estimate = mean_ci95([1.0, 2.0, 3.0, 4.0, 5.0])
    assert estimate.mean == 3.0
    assert estimate.ci95 == pytest.approx(1.9632432, abs=1e-6)
    assert estimate.num == 5
    assert mean_ci95(torch.arange(1.0, 6.0)) == estimate


def test_seeds_of_one_prompt_count_once() -> None:
    values = [1.0, 3.0, 5.0, 5.0, 6.0]
    estimate = mean_ci95(values, groups=["a", "a", "b", "b", "c"])
    assert estimate == mean_ci95([2.0, 5.0, 6.0])
    assert estimate.num == 3
    assert estimate.mean == pytest.approx(13 / 3)


def test_copies_of_clips_do_not_narrow_the_interval() -> None:
    values, prompts = [0.1, 0.4, 0.3, 0.9], ["a", "b", "c", "d"]
    copies = mean_ci95(values * 8, groups=prompts * 8)
    assert copies.ci95 == pytest.approx(mean_ci95(values).ci95)
    assert mean_ci95(values * 8).ci95 < copies.ci95 / 2  # what ignoring the prompts would have claimed


def test_interval_covers_the_truth_95_times_in_100() -> None:
    generator = torch.Generator().manual_seed(0)
    trials = torch.randn(2000, 5, generator=generator)
    estimates = [mean_ci95(trial) for trial in trials]
    covered = sum(abs(estimate.mean) <= estimate.ci95 for estimate in estimates) / len(estimates)
    assert covered == pytest.approx(0.95, abs=0.015)  # three standard errors; a normal interval covers 0.88


def test_one_prompt_gives_no_interval() -> None:
    assert mean_ci95([0.5]) == Estimate(mean=0.5, ci95=math.inf, num=1)
    assert mean_ci95([0.25, 0.75], groups=[7, 7]) == Estimate(mean=0.5, ci95=math.inf, num=1)


def test_equal_values_have_a_zero_interval() -> None:
    assert mean_ci95([0.1] * 10).ci95 == pytest.approx(0.0, abs=1e-15)


@pytest.mark.parametrize(
    ("values", "groups", "message"),
    [
        ([], None, "empty"),
        ([1.0, math.nan], None, "NaN"),
        ([1.0, math.inf], None, "NaN or infinity"),
        ([1.0, 2.0], ["a"], "groups must match"),
        (torch.zeros(2, 2), None, r"must be \[N\]"),
    ],
)
def test_refuses_bad_values(values: list[float] | torch.Tensor, groups: list[str] | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mean_ci95(values, groups)


def test_intervals_apart() -> None:
    low = Estimate(mean=0.0, ci95=0.1, num=10)
    assert intervals_apart(low, Estimate(mean=0.31, ci95=0.2, num=10))
    assert intervals_apart(Estimate(mean=0.31, ci95=0.2, num=10), low)
    assert not intervals_apart(low, Estimate(mean=0.29, ci95=0.2, num=10))
    assert not intervals_apart(Estimate(0.0, 0.5, 10), Estimate(1.0, 0.5, 10))  # they touch
    assert not intervals_apart(low, Estimate(mean=99.0, ci95=math.inf, num=1))


def test_pairing_finds_what_separate_intervals_hide() -> None:
    base = [0.0, 10.0, 20.0, 30.0]
    better = [0.9, 11.0, 21.1, 31.0]
    difference = paired_difference(better, base)
    assert difference.mean == pytest.approx(1.0)
    # Differences .9 1 1.1 1: s = sqrt(.02 / 3), half-width = 3.18245 * s / 2.
    assert difference.ci95 == pytest.approx(0.1299228, abs=1e-6)
    assert not intervals_apart(mean_ci95(better), mean_ci95(base))


def test_paired_difference_groups_and_sign() -> None:
    difference = paired_difference(torch.tensor([1.0, 1.0, 5.0]), [2.0, 4.0, 5.0], groups=["a", "a", "b"])
    assert (difference.mean, difference.num) == (-1.0, 2)


def test_paired_values_must_pair() -> None:
    with pytest.raises(ValueError, match="got 2 and 3"):
        paired_difference([1.0, 2.0], [1.0, 2.0, 3.0])


def test_clustered_share_of_one_vote_each_is_the_wilson_interval_of_fewer() -> None:
    votes = [1.0] * 12 + [0.0] * 4
    low, high = clustered_share_ci95(votes, range(16))
    # One vote a prompt: variance p (1 - p) / 15, and t of 15 degrees of freedom for the normal's quantile.
    assert (low, high) == pytest.approx(share_ci95(0.75, 15 * (1.959964 / t_quantile95(15)) ** 2), abs=1e-6)
    assert clustered_share_ci95(votes * 3, [*range(16)] * 3) == pytest.approx((low, high))  # said again: nothing new
    assert clustered_share_ci95(votes, range(16), ["ann"] * 16) == (low, high)  # one person says nothing of others
    assert clustered_share_ci95([1.0] * 16, range(16)) == share_ci95(1.0, 16)
    assert clustered_share_ci95([1.0] * 16, range(16), ["ann", "bob"] * 8) == share_ci95(1.0, 2)
    assert clustered_share_ci95([1.0], ["a"]) == share_ci95(1.0, 1)
    with pytest.raises(ValueError, match="empty"):
        clustered_share_ci95([], [])


def test_clustered_share_covers_what_both_prompts_and_people_vary() -> None:
    """Of 300 ratings by 6 people of 20 prompts, with tastes and hard prompts, about 95% cover the share of all."""
    generator = torch.Generator().manual_seed(0)
    prompts, people = torch.arange(20).repeat(6), torch.arange(6).repeat_interleave(20)
    covered = naive = 0
    for _ in range(300):
        taste, hard = 0.8 * torch.randn(6, generator=generator), 0.8 * torch.randn(20, generator=generator)
        chance = torch.special.ndtr(0.4 + taste[people] + hard[prompts])
        votes = (torch.rand(120, generator=generator) < chance).double().tolist()
        truth = float(torch.special.ndtr(torch.tensor(0.4 / (1 + 2 * 0.8**2) ** 0.5)))
        low, high = clustered_share_ci95(votes, prompts.tolist(), people.tolist())
        covered += low <= truth <= high
        low, high = share_ci95(sum(votes) / 120, 120)
        naive += low <= truth <= high
    assert covered / 300 > 0.92
    assert naive / 300 < 0.75  # as if all votes were independent
