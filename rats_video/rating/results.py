"""What the votes say: win rates, strengths, and who can be trusted. Numbers only."""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from rats_video.evaluation.stats import clustered_share_ci95, t_quantile95
from rats_video.rating.record import Rating, mirrored
from rats_video.rating.votes import Vote


@dataclass(frozen=True)
class Ballot:
    """A vote on two arms: `score` is 1 where the first is preferred, 0 where the second is, half for no difference."""

    person: str
    prompt: str
    arms: tuple[str, str]
    files: tuple[str, str]
    score: float

    def of(self, arm: str) -> float:
        """The same from the side of one of the two arms."""
        return self.score if arm == self.arms[0] else 1 - self.score


@dataclass(frozen=True)
class Attention:
    """A person's attention checks: how many were seen, and how many of them got the known answer."""

    seen: int = 0
    right: int = 0

    def passes(self, least: float) -> bool:
        """True if at least that share was right; one slip is forgiven unless all must be."""
        wrong = self.seen - self.right
        return wrong <= (1 - least) * self.seen or (wrong == 1 and least < 1)


@dataclass(frozen=True)
class WinRate:
    """The share of votes for one side, half of those for no difference, with its 95% interval.

    Args:
        share: in [0, 1].
        low: where the interval over prompts begins, or over people where there is one prompt alone.
        high: where it ends.
        wide: the interval over prompts and people, which counts that others might vote otherwise; None of one person.
        votes: behind it.
        ties: of them said no difference.
        prompts: behind them.
        people: behind them.
    """

    share: float
    low: float
    high: float
    wide: tuple[float, float] | None
    votes: int
    ties: int
    prompts: int
    people: int


def ballots(rating: Rating, votes: Iterable[Vote]) -> list[Ballot]:
    """The votes on pairs of arms, the arms in the order of the rating."""
    arms = rating.arm_of
    prompts = {pair.key: pair for pair in rating.pairs}
    found = []
    for vote in votes:
        if pair := prompts.get(vote.key):
            score = 0.5 if vote.choice == "same" else float((vote.choice == "left") == (vote.left == pair.left))
            sides = arms[pair.left], arms[pair.right]
            found.append(Ballot(vote.person, pair.prompt, sides, (pair.left, pair.right), score))
    return found


def attention(rating: Rating, votes: Iterable[Vote]) -> dict[str, Attention]:
    """Each person's checks."""
    checks = {check.key: check for check in rating.checks}
    found: defaultdict[str, Attention] = defaultdict(Attention)
    for vote in votes:
        before = found[vote.person]
        if check := checks.get(vote.key):
            said = vote.choice if vote.left == check.left else mirrored(vote.choice)
            is_right = said == check.answer
            found[vote.person] = replace(before, seen=before.seen + 1, right=before.right + is_right)
    return dict(found)


def win_rate(votes: Sequence[Ballot], arm: str) -> WinRate:
    """How often an arm is preferred, of at least one vote on pairs that it is in."""
    scores = [vote.of(arm) for vote in votes]
    prompts, people = [vote.prompt for vote in votes], [vote.person for vote in votes]
    low, high = clustered_share_ci95(scores, prompts if len(set(prompts)) > 1 else people)
    several = len(set(people)) > 1 and len(set(prompts)) > 1
    return WinRate(
        math.fsum(scores) / len(scores), low, high,
        clustered_share_ci95(scores, prompts, people) if several else None,
        len(scores), scores.count(0.5), len(set(prompts)), len(set(people)),
    )  # fmt: skip


def of_arm(votes: Iterable[Ballot], arm: str) -> list[Ballot]:
    """The votes on pairs with an arm."""
    return [vote for vote in votes if arm in vote.arms]


@dataclass(frozen=True)
class Strength:
    """A Bradley-Terry strength: log-odds against an arm of mean strength, and half of its 95% interval."""

    mean: float
    ci95: float


def bradley_terry(votes: Sequence[Ballot], arms: Sequence[str]) -> dict[str, Strength]:
    """The strength of each arm: `P(a over b) = sigmoid(strength_a - strength_b)`, their mean 0.

    Fitted by Hunter's MM iteration (2004), no difference as half a win each, with half a win either way added to every
    two arms, so that one that always wins stays finite. Intervals are by the jackknife over prompts; infinite of one.
    """
    fitted = _fit(votes, arms)
    prompts = sorted({vote.prompt for vote in votes})
    num = len(prompts)
    if num < 2:
        return {arm: Strength(fitted[arm], math.inf) for arm in arms}
    without = [_fit([vote for vote in votes if vote.prompt != prompt], arms) for prompt in prompts]
    found = {}
    for arm in arms:
        values = [each[arm] for each in without]
        centre = math.fsum(values) / num
        variance = (num - 1) / num * math.fsum((value - centre) ** 2 for value in values)
        found[arm] = Strength(fitted[arm], t_quantile95(num - 1) * math.sqrt(variance))
    return found


def _fit(votes: Iterable[Ballot], arms: Sequence[str]) -> dict[str, float]:
    wins = dict.fromkeys(itertools.permutations(arms, 2), 0.5)
    for vote in votes:
        first, second = vote.arms
        wins[first, second] += vote.score
        wins[second, first] += 1 - vote.score
    strength = dict.fromkeys(arms, 1.0)
    for _ in range(10_000):
        before = strength
        strength = {}
        for arm in arms:
            others = [other for other in arms if other != arm]
            met = sum((wins[arm, o] + wins[o, arm]) / (before[arm] + before[o]) for o in others)
            strength[arm] = sum(wins[arm, other] for other in others) / met
        level = math.exp(math.fsum(map(math.log, strength.values())) / len(arms))
        strength = {arm: value / level for arm, value in strength.items()}
        if all(abs(math.log(strength[arm] / before[arm])) < 1e-9 for arm in arms):
            break
    return {arm: math.log(value) for arm, value in strength.items()}


def among_people(votes: Iterable[Ballot]) -> list[tuple[float, str]]:
    """For every two people who both chose on a pair, 1 if they chose alike, else 0; with the prompt."""
    by_pair: defaultdict[tuple[str, str], list[Ballot]] = defaultdict(list)
    for vote in votes:
        if vote.score != 0.5:
            by_pair[vote.files].append(vote)
    return [
        (float(one.score == other.score), one.prompt)
        for each in by_pair.values()
        for one, other in itertools.combinations(each, 2)
    ]


def preferences(votes: Iterable[Ballot]) -> list[dict[str, str]]:
    """Lines for `train reward --data`: of each pair its majority, as often as it leads; what is even is left out.

    Names are those of sources below RATING/clips.
    """
    leads: defaultdict[tuple[tuple[str, str], str], float] = defaultdict(float)
    for vote in votes:
        leads[vote.files, vote.prompt] += 2 * vote.score - 1
    lines = []
    for (files, prompt), lead in leads.items():
        first, second = (file.partition("/")[2] for file in files)
        preferred, rejected = (first, second) if lead > 0 else (second, first)
        line = {"preferred": preferred, "rejected": rejected, "caption": prompt}
        lines += [line] * round(abs(lead))
    return lines
