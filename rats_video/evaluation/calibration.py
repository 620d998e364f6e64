"""Scales of a reward, a gate and a loss from scores of teacher and base. Numbers only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, cat

from rats_video.evaluation.stats import Estimate, paired_difference

GATE_AT_START = 0.88
"""The gate's sigmoid at the base's typical distance from the teacher, sigmoid(2); at no distance it is 0.5."""


@dataclass(frozen=True)
class ScoreGap:
    """The gap of one score between the teacher's clips and the base's, from the same prompts and noise.

    Args:
        mean: of both arms' clips together.
        spread: their standard deviation, the range that a student moves in.
        lead: teacher - base, with its 95% interval over prompts.
        typical_lead: median of |teacher - base|.
        wins: share of the clips on which the teacher scores higher.
    """

    mean: float
    spread: float
    lead: Estimate
    typical_lead: float
    wins: float

    @property
    def sees_teacher(self) -> bool:
        """True if the teacher's lead is above 0 beyond doubt."""
        return self.lead.mean > self.lead.ci95


def compare(teacher: Tensor, base: Tensor, prompts: Sequence[str]) -> ScoreGap:
    """Compare scores `[N]` of two arms, clip by clip.

    Raises:
        ValueError: fewer than one clip, or a score that is not finite.
    """
    both, leads = cat([teacher, base]).double(), (teacher - base).double()
    return ScoreGap(
        mean=float(both.mean()),
        spread=float(both.std()),
        lead=paired_difference(teacher, base, prompts),
        typical_lead=float(leads.abs().quantile(0.5)),
        wins=float((leads > 0).double().mean()),
    )


def tau_for(typical_lead: float) -> float:
    """The gate's tau with `sigmoid(typical_lead / tau) = sigmoid(2)`.

    The gate falls from 0.88 to 0.5 while a student that starts as the base closes a typical lead, and to 0.12 when the
    student is as far ahead.
    """
    return typical_lead / 2


def unit_weights(weights: Mapping[str, float], scores: Mapping[str, Tensor]) -> dict[str, float]:
    """The weights scaled so that `sum of weight * score` has standard deviation 1 over clips.

    Args:
        weights: of the terms, at least one not 0.
        scores: of the terms, `[N]`, each on its own scale of mean 0 and spread 1.
    """
    total = sum(weight * scores[name].double() for name, weight in weights.items())
    assert isinstance(total, Tensor)
    return {name: weight / float(total.std()) for name, weight in weights.items()}


def opposed_frames(teacher: Tensor, base: Tensor) -> float:
    """Share of frames, of scores `[N, T]`, on which another arm leads than on the mean of the clip's frames."""
    leads = (teacher - base).double()
    return float((leads.sign() * leads.mean(dim=1, keepdim=True).sign() < 0).double().mean())


def significant(value: float, digits: int = 3) -> float:
    """A number rounded to that many significant digits."""
    return float(f"{value:.{digits}g}")
