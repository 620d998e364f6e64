"""Distances of two sets, against closed forms."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from rats_video.evaluation.frechet import Gaussian, frechet_distance, jackknife, kernel_distance
from rats_video.seeds import seeded


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=seeded(seed), dtype=torch.float64)


def test_equal_sets_are_at_zero() -> None:
    a = random(40, 7)
    assert frechet_distance(Gaussian.of(a), Gaussian.of(a.flip(0))) == pytest.approx(0, abs=1e-12)


def test_a_shift_counts_by_its_square() -> None:
    a = random(40, 3)
    shift = torch.tensor([3.0, 0.0, -4.0])
    assert frechet_distance(Gaussian.of(a), Gaussian.of(a + shift)) == pytest.approx(25, rel=1e-12)


def test_commuting_covariances_have_a_closed_form() -> None:
    a = Gaussian(torch.zeros(3), torch.diag(torch.tensor([1.0, 2.0, 3.0])))
    b = Gaussian(torch.zeros(3), torch.diag(torch.tensor([4.0, 2.0, 0.0])))  # singular: no trouble
    assert frechet_distance(a, b) == pytest.approx((1 - 4) ** 2 + 0 + 3**2)


def test_general_covariances_as_by_a_matrix_root() -> None:
    a, b = random(50, 4, seed=1) @ random(4, 4, seed=2), random(60, 4, seed=3) @ random(4, 4, seed=4) + 1
    values, vectors = torch.linalg.eig(torch.cov(a.T) @ torch.cov(b.T))
    root = (vectors @ torch.diag(values.sqrt()) @ torch.linalg.inv(vectors)).real
    wanted = (a.mean(0) - b.mean(0)).square().sum() + (torch.cov(a.T) + torch.cov(b.T) - 2 * root).trace()
    assert frechet_distance(Gaussian.of(a), Gaussian.of(b)) == pytest.approx(float(wanted), rel=1e-9)


def test_a_set_scaled_has_a_closed_form_where_features_outnumber_clips() -> None:
    a = random(5, 30)
    a -= a.mean(0)
    spread = float(a.square().sum() / 4)  # trace of the covariance
    assert frechet_distance(Gaussian.of(a), Gaussian.of(3 * a)) == pytest.approx((3 - 1) ** 2 * spread, rel=1e-9)


def test_float32_features_are_compared_in_float64() -> None:
    a = 1e4 + random(30, 5)
    distance = frechet_distance(Gaussian.of(a.float()), Gaussian.of(a.float()))
    assert distance == pytest.approx(0, abs=1e-9)


def test_one_clip_has_no_covariance() -> None:
    with pytest.raises(ValueError, match="two rows"):
        Gaussian.of(torch.zeros(1, 3))


def test_small_samples_are_too_far_by_frechet_and_not_by_kernel() -> None:
    """The bias that has the docs ask for N: mean over 40 pairs of sets of one distribution."""
    frechet: dict[int, float] = {}
    kernel: dict[int, list[float]] = {}
    for num in (20, 80):
        pairs = [(random(num, 6, seed=2 * i), random(num, 6, seed=2 * i + 1)) for i in range(40)]
        frechet[num] = sum(frechet_distance(Gaussian.of(a), Gaussian.of(b)) for a, b in pairs) / 40
        kernel[num] = [kernel_distance(a, b, range(num), range(num, 2 * num)) for a, b in pairs]
    assert frechet[20] > 3 * frechet[80] > 0.3
    for values in kernel.values():
        mean = sum(values) / 40
        error = (sum((value - mean) ** 2 for value in values) / 39 / 40) ** 0.5
        assert abs(mean) < 3 * error
        assert min(values) < 0


def test_kernel_distance_by_hand() -> None:
    a, b = torch.tensor([[0.0], [1.0]]), torch.tensor([[2.0], [3.0]])
    # (x y + 1)^3: within a 1, within b 343, between 1, 1, 27, 64
    assert kernel_distance(a, b, "ab", "cd") == pytest.approx(1 + 343 - 2 * (1 + 1 + 27 + 64) / 4)
    assert kernel_distance(a, b, "ab", "ab") == pytest.approx(1 + 343 - 2 * (1 + 27) / 2)  # not with its own prompt


def test_prompts_given_twice_do_not_bias_the_kernel_distance() -> None:
    """Clips of a prompt are near one another; only pairs of different prompts are compared."""
    values = []
    for i in range(60):
        centres = 2 * random(8, 3, seed=3 * i)
        a = centres + 0.1 * random(8, 3, seed=3 * i + 1)
        b = centres.repeat(4, 1) + 0.1 * random(32, 3, seed=3 * i + 2)
        values.append(kernel_distance(a, b, range(8), [*range(8)] * 4))
    mean = sum(values) / 60
    assert abs(mean) < 3 * (sum((value - mean) ** 2 for value in values) / 59 / 60) ** 0.5


def test_kernel_distance_needs_two_prompts() -> None:
    with pytest.raises(ValueError, match="more than one prompt"):
        kernel_distance(torch.zeros(2, 1), torch.ones(2, 1), "aa", "bc")


def test_jackknife_of_a_mean_is_the_usual_interval() -> None:
    values = torch.tensor([1.0, 2.0, 3.0, 6.0])
    found = jackknife(lambda index: float(values[index].mean()), "abcd")
    assert (found.mean, found.num) == (3.0, 4)
    assert found.ci95 == pytest.approx(3.182446 * (14 / 3 / 4) ** 0.5)  # as in test_sweep


def test_jackknife_leaves_out_whole_prompts() -> None:
    seen: list[list[int]] = []

    def statistic(index: Tensor) -> float:
        seen.append(index.tolist())
        return float(len(index))

    assert jackknife(statistic, "abca").mean == 4
    assert seen == [[0, 1, 2, 3], [1, 2], [0, 2, 3], [0, 1, 3]]
    assert math.isinf(jackknife(statistic, "aab").ci95)
