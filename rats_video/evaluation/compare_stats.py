"""From scores of clips to a comparison: a row a student, means over seeds, win rates."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from rats_video.evaluation.compare_result import BASE, ComparedRow, Cost, CurvePoint, MethodMean, WinRate
from rats_video.evaluation.stats import crossed_ci95, mean_ci95
from rats_video.evaluation.sweep import ArmScores
from rats_video.evaluation.tables import TEACHER, MetricValue, better

IMITATION = "imitation"


@dataclass(frozen=True)
class StudentScores:
    """The scores of one student, of the teacher or of the base model, at one NFE."""

    method: str
    seed: int | None
    scores: ArmScores
    cost: Cost | None = None

    @property
    def row(self) -> ComparedRow:
        """Means over prompts."""
        row = self.scores.row()
        return ComparedRow(
            method=self.method,
            nfe=row.nfe,
            num_steps=row.num_steps,
            seed=self.seed,
            metrics=row.metrics,
            cost=self.cost,
        )


def method_means(scored: Iterable[StudentScores]) -> list[MethodMean]:
    """Means over the seeds of each method at each NFE, in order of first appearance."""
    groups: dict[tuple[str, int], list[StudentScores]] = {}
    for each in scored:
        groups.setdefault((each.method, each.scores.spec.nfe), []).append(each)
    return [_mean(group) for group in groups.values()]


def curve_points(scored: Iterable[StudentScores]) -> list[CurvePoint]:
    """Means of each method's students over their training, point by point; all of them have their cost."""
    groups: dict[tuple[str, int], list[StudentScores]] = {}
    for each in scored:
        assert each.cost is not None
        groups.setdefault((each.method, each.cost.updates), []).append(each)
    return [CurvePoint(**_mean(group).model_dump(), cost=mean_cost(_costs_of(group))) for group in groups.values()]


def _costs_of(group: Sequence[StudentScores]) -> list[Cost]:
    return [each.cost for each in group if each.cost is not None]


def mean_cost(found: Sequence[Cost]) -> Cost:
    """The mean cost of one or more students; memory is their maximum."""
    peaks = [cost.peak_bytes for cost in found if cost.peak_bytes is not None]
    return Cost(
        updates=round(sum(cost.updates for cost in found) / len(found)),
        evaluations=math.fsum(cost.evaluations for cost in found) / len(found),
        seconds=math.fsum(cost.seconds for cost in found) / len(found),
        peak_bytes=max(peaks, default=None),
    )


def _mean(group: Sequence[StudentScores]) -> MethodMean:
    first = group[0].scores
    metrics = {
        name: MetricValue.of(crossed_ci95([each.scores.metrics[name] for each in group], first.prompts))
        for name in first.metrics
        if all(name in each.scores.metrics for each in group)
    }
    of_sets = [{k: v for k, v in each.row.metrics.items() if k not in each.scores.metrics} for each in group]
    for name in of_sets[0]:
        if all(name in values for values in of_sets):
            metrics[name] = _mean_of_sets([values[name] for values in of_sets])
    return MethodMean(
        method=group[0].method,
        nfe=first.spec.nfe,
        num_steps=first.spec.num_steps,
        num_seeds=sum(each.seed is not None for each in group),
        metrics=metrics,
    )


def _mean_of_sets(values: Sequence[MetricValue]) -> MetricValue:
    """The mean of a metric of whole sets of clips: the interval is over seeds, or a single seed's own."""
    return values[0] if len(values) == 1 else MetricValue.of(mean_ci95([v.mean for v in values]))


def win_rates(scored: Sequence[StudentScores], rival: str = IMITATION) -> list[WinRate]:
    """Win rates of each method against `rival`, the base model at the same NFE and the teacher, by metric."""
    by_key = {(each.method, each.seed, each.scores.spec.nfe): each.scores for each in scored}
    teacher = next((each.scores for each in scored if each.method == TEACHER), None)
    students = [each for each in scored if each.seed is not None]
    wins = []
    for method, nfe in dict.fromkeys((each.method, each.scores.spec.nfe) for each in students):
        ours = {each.seed: each.scores for each in students if (each.method, each.scores.spec.nfe) == (method, nfe)}
        against = {
            rival: {seed: by_key.get((rival, seed, nfe)) for seed in ours},
            BASE: dict.fromkeys(ours, by_key.get((BASE, None, nfe))),
            TEACHER: dict.fromkeys(ours, teacher),
        }
        for name, theirs in against.items():
            pairs = [(ours[seed], other) for seed, other in theirs.items() if other is not None]
            wins += [] if name == method or not pairs else _rates(method, name, nfe, pairs)
    return wins


def _rates(method: str, against: str, nfe: int, pairs: Sequence[tuple[ArmScores, ArmScores]]) -> list[WinRate]:
    shared = [
        name for name in pairs[0][0].metrics
        if better(name) == "higher" and all(name in scores.metrics for scores in itertools.chain(*pairs))
    ]  # fmt: skip
    rates = []
    for name in shared:
        won = [wins_of(ours.metrics[name], theirs.metrics[name]) for ours, theirs in pairs]
        found = crossed_ci95(won, pairs[0][0].prompts)
        ci95 = found.ci95 if math.isfinite(found.ci95) else None
        rates.append(WinRate(method=method, against=against, nfe=nfe, metric=name, rate=found.mean, ci95=ci95))
    return rates


def wins_of(ours: Sequence[float], theirs: Sequence[float]) -> list[float]:
    """1 if ours is higher, 0.5 if they are equal, else 0; raises ValueError if they do not pair up."""
    return [0.5 * ((a > b) + (a >= b)) for a, b in zip(ours, theirs, strict=True)]


def costs(rows: Iterable[ComparedRow]) -> Mapping[str, list[Cost]]:
    """The costs of each method's students, one a seed."""
    found: dict[str, dict[int | None, Cost]] = {}
    for row in rows:
        if row.cost is not None:
            found.setdefault(row.method, {})[row.seed] = row.cost
    return {method: list(by_seed.values()) for method, by_seed in found.items()}
