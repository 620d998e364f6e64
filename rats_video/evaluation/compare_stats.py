"""From scores of clips to a comparison: a row a student, means over seeds, win rates."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from rats_video.evaluation.compare_result import BASE, ComparedRow, Cost, CurvePoint, Difference, MethodMean, WinRate
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
    wins = []
    for method, nfe in _method_counts(scored):
        for other in (rival, BASE, TEACHER):
            for name, pairs in _paired(scored, method, other, nfe).items():
                found = crossed_ci95([wins_of(*pair) for pair in pairs], scored[0].scores.prompts)
                wins.append(
                    WinRate(
                        method=method, against=other, nfe=nfe, metric=name, rate=found.mean, ci95=_known(found.ci95)
                    )
                )
    return wins


def differences(scored: Sequence[StudentScores]) -> list[Difference]:
    """The first method's lead over each other one, the base model at the same NFE and the teacher, by metric."""
    counts = _method_counts(scored)
    methods = list(dict.fromkeys(method for method, _ in counts))
    found = []
    for nfe in [nfe for method, nfe in counts if method == methods[0]]:
        for other in (*methods[1:], BASE, TEACHER):
            for name, pairs in _paired(scored, methods[0], other, nfe).items():
                leads = [[a - b for a, b in zip(*pair, strict=True)] for pair in pairs]
                lead = crossed_ci95(leads, scored[0].scores.prompts)
                found.append(
                    Difference(
                        method=methods[0], against=other, nfe=nfe, metric=name, mean=lead.mean, ci95=_known(lead.ci95)
                    )
                )
    return found


def _method_counts(scored: Sequence[StudentScores]) -> list[tuple[str, int]]:
    """Each method with each NFE of its students, in order of first appearance."""
    return list(dict.fromkeys((each.method, each.scores.spec.nfe) for each in scored if each.seed is not None))


def _paired(
    scored: Sequence[StudentScores], method: str, against: str, nfe: int
) -> dict[str, list[tuple[Sequence[float], Sequence[float]]]]:
    """By metric of which more is better, a method's scores beside another's: clip by clip, a pair a seed."""
    by_key = {(each.method, each.seed, each.scores.spec.nfe): each.scores for each in scored}
    alone = {BASE: by_key.get((BASE, None, nfe))}
    alone[TEACHER] = next((each.scores for each in scored if each.method == TEACHER), None)
    pairs = []
    for (who, seed, count), ours in by_key.items():
        theirs = alone[against] if against in alone else by_key.get((against, seed, nfe))
        if (who, count) == (method, nfe) and theirs is not None and method != against:
            pairs.append((ours, theirs))
    return {
        name: [(ours.metrics[name], theirs.metrics[name]) for ours, theirs in pairs]
        for name in (pairs[0][0].metrics if pairs else ())
        if better(name) == "higher" and all(name in scores.metrics for scores in itertools.chain(*pairs))
    }


def _known(ci95: float) -> float | None:
    return ci95 if math.isfinite(ci95) else None


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
