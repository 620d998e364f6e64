"""What people's votes say, in tables: on the terminal, and in RATING/results.md."""

from __future__ import annotations

import itertools
import json
import math
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

from rats_video.commands.rate_rewards import PEOPLE
from rats_video.errors import warn
from rats_video.evaluation.tables import aligned
from rats_video.files import replacing
from rats_video.pretraining.preference import Accuracy
from rats_video.rating.record import CLIPS, PREFERENCES, RESULTS, Rating
from rats_video.rating.results import (
    Ballot,
    WinRate,
    attention,
    ballots,
    bradley_terry,
    of_arm,
    preferences,
    win_rate,
)
from rats_video.rating.votes import read_votes, standing

_MOST_PROMPTS = 12  # rows on the terminal; the file has all


def counted_votes(rating: Rating, folder: Path, least: float) -> tuple[list[Ballot], list[str]]:
    """The votes of those who pass their attention checks, and a line on each person.

    Args:
        rating: what was voted on.
        folder: of the rating.
        least: share of the checks that must be right.
    """
    keys = [pair.key for pair in (*rating.pairs, *rating.checks)]
    votes = standing(read_votes(folder, keys)).values()
    people = attention(rating, votes)
    for person, found in people.items():
        if not found.passes(least):
            what = f"{found.right} of {found.seen} attention checks right, so these votes are left out"
            warn(f"{what} (--min-attention 0 counts them)", where=person)
    lines = [
        f"{person}: {found.right} of {found.seen} attention checks right"
        if found.seen
        else f"{person}: no check seen yet"
        for person, found in people.items()
    ]
    return [vote for vote in ballots(rating, votes) if people[vote.person].passes(least)], lines


def write_preferences(votes: Sequence[Ballot], folder: Path) -> int:
    """Write RATING/preferences.jsonl; returns its number of lines."""
    lines = preferences(votes)
    with replacing(folder / PREFERENCES, "preferences") as aside:
        aside.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
    return len(lines)


def tell_results(
    rating: Rating, votes: Sequence[Ballot], people: Sequence[str], agreements: Mapping[str, Accuracy], folder: Path
) -> list[str]:
    """Write RATING/results.md and RATING/preferences.jsonl, of at least one vote; returns the lines to show."""
    lines = [*_pairwise(rating, votes), "", *_by("person", [vote.person for vote in votes], rating, votes), "", *people]
    if len(rating.arms) > 2:
        lines = [*_strengths(rating, votes), "", *lines]
    by_prompt = _by("prompt", [vote.prompt for vote in votes], rating, votes)
    trust = _trust(agreements)
    with replacing(folder / RESULTS, "results") as aside:
        aside.write_text("\n".join([*lines, "", *by_prompt, *trust]) + "\n", encoding="utf-8")
    shown = by_prompt[: 2 + _MOST_PROMPTS]
    more = [f"{len(by_prompt) - len(shown)} more prompts: {folder / RESULTS}"] if len(by_prompt) > len(shown) else []
    return [*lines, "", *shown, *more, *trust, "", *_next_steps(write_preferences(votes, folder), folder)]


def _pairwise(rating: Rating, votes: Sequence[Ballot]) -> list[str]:
    rows = [["preferred", "to", "win rate (95%, over prompts)", "over prompts and people", "votes", "no difference"]]
    for arms in itertools.combinations(rating.arms, 2):
        if mine := [vote for vote in votes if vote.arms == arms]:
            rate = win_rate(mine, arms[0])
            rows.append([*arms, _rate(rate), _interval(rate.wide), str(rate.votes), str(rate.ties)])
    return aligned(rows, num_texts=2)


def _strengths(rating: Rating, votes: Sequence[Ballot]) -> list[str]:
    """All arms by Bradley-Terry, the strongest first."""
    strengths = bradley_terry(votes, rating.arms)
    rows = [["arm", "Bradley-Terry strength", "win rate against all (95%)", "votes"]]
    for arm in sorted(rating.arms, key=lambda arm: -strengths[arm].mean):
        if mine := of_arm(votes, arm):
            one, rate = strengths[arm], win_rate(mine, arm)
            spread = f"{one.ci95:.2f}" if math.isfinite(one.ci95) else "n/a"
            rows.append([arm, f"{one.mean:+.2f} ± {spread}", _rate(rate), str(rate.votes)])
    return aligned(rows)


def _by(what: str, labels: Sequence[str], rating: Rating, votes: Sequence[Ballot]) -> list[str]:
    """Win rates of each arm by what each vote is labelled with; of two arms those of the first."""
    arms = rating.arms[:1] if len(rating.arms) == 2 else rating.arms
    rows = [[what, *arms, "votes"]]
    for label in dict.fromkeys(labels):
        mine = [vote for vote, own in zip(votes, labels, strict=True) if own == label]
        cells = [_rate(win_rate(of, arm)) if (of := of_arm(mine, arm)) else "-" for arm in arms]
        rows.append([label, *cells, str(len(mine))])
    return aligned(rows)


def _trust(agreements: Mapping[str, Accuracy]) -> list[str]:
    """Which reward ranks clips as people do."""
    if not agreements:
        return []
    rows = [["reward", "agrees with people (95%)", "choices", "prompts"]]
    for name, one in agreements.items():
        share = f"{one.share:.3f} {_interval((one.low, one.high))}"
        rows.append([name, share, str(one.num_pairs), str(one.num_sources)])
    ranked = {name: one for name, one in agreements.items() if name != PEOPLE}
    good = next((name for name, one in ranked.items() if one.beats_chance), None)
    bad = [name for name, one in ranked.items() if one.high < 0.5]
    verdict = "trust none yet: no reward agrees more often than chance" if good is None else f"trust most: {good}"
    warned = [f"do not distill with {name}: people prefer what it does not" for name in bad]
    return ["", *aligned(rows), verdict, *warned]


def _next_steps(num: int, folder: Path) -> list[str]:
    if not num:
        return [f"no preferences: each pair is even ({folder / PREFERENCES})"]
    clips, lines, cache, reward = (shlex.quote(str(folder / name)) for name in (CLIPS, PREFERENCES, "cache", "reward"))
    return [
        f"{num} preferences: {folder / PREFERENCES}. To train a reward on them:",
        f"  rats-video prepare {clips} --output {cache}",
        f"  rats-video train reward --data {cache} --preferences {lines} --output {reward}",
    ]


def _rate(rate: WinRate) -> str:
    return f"{rate.share:.3f} {_interval((rate.low, rate.high))}"


def _interval(ends: tuple[float, float] | None) -> str:
    return "-" if ends is None else f"({ends[0]:.3f} to {ends[1]:.3f})"
