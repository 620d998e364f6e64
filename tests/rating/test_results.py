"""What votes say: known answers."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from ratings import PROMPTS, rating_of

from rats_video.rating.record import Rating, ShownPair
from rats_video.rating.results import (
    Attention,
    Ballot,
    among_people,
    attention,
    ballots,
    bradley_terry,
    of_arm,
    preferences,
    win_rate,
)
from rats_video.rating.votes import Vote


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Rating, Path]:
    return rating_of(tmp_path_factory.mktemp("rating"), {"one": 0.2, "two": 0.5})


@pytest.fixture(scope="module")
def rating(made: tuple[Rating, Path]) -> Rating:
    return made[0]


def vote(pair: ShownPair, person: str, choice: str, *, turned: bool = False) -> Vote:
    left, right = (pair.right, pair.left) if turned else (pair.left, pair.right)
    return Vote.model_validate({"person": person, "left": left, "right": right, "choice": choice})


def test_sides_are_turned_back(rating: Rating) -> None:
    pair, *_ = rating.pairs
    cast = [
        vote(pair, "ann", "left"), vote(pair, "bob", "left", turned=True), vote(pair, "cem", "same"),
        vote(pair, "dee", "right", turned=True), vote(rating.checks[0], "ann", "left"),
    ]  # fmt: skip
    found = ballots(rating, cast)
    assert [one.score for one in found] == [1.0, 0.0, 0.5, 1.0]
    assert {one.arms for one in found} == {("one", "two")}
    assert [one.of("two") for one in found] == [0.0, 1.0, 0.5, 0.0]
    rate = win_rate(found, "one")
    assert (rate.share, rate.votes, rate.ties, rate.prompts, rate.people) == (0.625, 4, 1, 1, 4)


def test_attention_checks_know_their_answer_from_either_side(rating: Rating) -> None:
    damaged, same = rating.checks
    assert damaged.right.startswith("checks/")
    cast = [
        vote(damaged, "ann", "left"), vote(same, "ann", "same"),
        vote(damaged, "bob", "right", turned=True), vote(same, "bob", "left"),
        vote(damaged, "cem", "same"), vote(rating.pairs[0], "dee", "left"),
    ]  # fmt: skip
    found = attention(rating, cast)
    assert found == {"ann": Attention(2, 2), "bob": Attention(2, 1), "cem": Attention(1, 0), "dee": Attention(0, 0)}
    assert Attention(8, 6).passes(0.75)
    assert not Attention(8, 5).passes(0.75)
    assert Attention(2, 1).passes(0.75)  # one slip
    assert not Attention(2, 1).passes(1.0)
    assert not Attention(2, 0).passes(0.75)
    assert Attention(2, 0).passes(0)


def cast(outcomes: dict[tuple[str, str], list[float]], person: str = "ann") -> list[Ballot]:
    return [
        Ballot(person, f"prompt {place}", arms, (f"clips/{arms[0]}/{place}", f"clips/{arms[1]}/{place}"), score)
        for arms, scores in outcomes.items()
        for place, score in enumerate(scores)
    ]


def test_bradley_terry_has_the_log_odds_of_its_wins() -> None:
    # Odds 3 : 1 and 3 : 1 in a row make 9 : 1: with half a win either way added, 30 of 40 become 30.5 and 10.5.
    wins = [1.0] * 30 + [0.0] * 10
    votes = cast({("a", "b"): wins, ("b", "c"): wins, ("a", "c"): [1.0] * 36 + [0.0] * 4})
    found = bradley_terry(votes, ("a", "b", "c"))
    assert math.fsum(one.mean for one in found.values()) == pytest.approx(0, abs=1e-9)
    assert found["a"].mean - found["b"].mean == pytest.approx(math.log(3), abs=0.06)
    assert found["a"].mean - found["c"].mean == pytest.approx(math.log(9), abs=0.1)
    assert found["a"].ci95 < 1
    # Exactly, for two arms.
    two = bradley_terry(cast({("a", "b"): wins}), ("a", "b"))
    assert two["a"].mean - two["b"].mean == pytest.approx(math.log(30.5 / 10.5), abs=1e-6)
    # One that never loses is finite; no difference counts half.
    always = bradley_terry(cast({("a", "b"): [1.0] * 5}), ("a", "b"))
    assert always["a"].mean == pytest.approx(math.log(5.5 / 0.5) / 2)
    assert bradley_terry(cast({("a", "b"): [0.5] * 5}), ("a", "b"))["a"].mean == pytest.approx(0)
    assert bradley_terry(cast({("a", "b"): [1.0]}), ("a", "b"))["a"].ci95 == math.inf


def test_win_rates_of_one_and_of_several_people() -> None:
    alone = cast({("a", "b"): [1.0] * 12 + [0.0] * 4})
    rate = win_rate(alone, "a")
    assert (rate.share, rate.wide) == (0.75, None)
    assert rate.low < 0.55 < rate.high < 0.92
    both = [*alone, *cast({("a", "b"): [1.0] * 12 + [0.0] * 4}, "bob")]
    same = win_rate(both, "a")
    assert same.low == pytest.approx(rate.low)  # the same prompts again say nothing new of prompts
    opposed = win_rate([*alone, *cast({("a", "b"): [0.0] * 16}, "bob")], "a")
    assert opposed.wide is not None
    assert opposed.wide[0] < opposed.low
    assert opposed.wide[1] > opposed.high  # people differ, so others may too
    assert win_rate(of_arm(alone, "b"), "b").share == 0.25


def test_preferences_are_the_majority_as_often_as_it_leads() -> None:
    def said(person: str, place: int, score: float) -> Ballot:
        return Ballot(person, f"p{place}", ("a", "b"), (f"clips/a/{place}.mp4", f"clips/b/{place}.mp4"), score)

    votes = [said(person, 0, score) for person, score in zip("vwxyz", (1, 1, 1, 0, 0.5), strict=True)]
    votes += [said("v", 1, 1.0), said("w", 1, 0.0), said("v", 2, 0.0), said("v", 3, 0.5)]
    assert preferences(votes) == [
        {"preferred": "a/0.mp4", "rejected": "b/0.mp4", "caption": "p0"},
        {"preferred": "a/0.mp4", "rejected": "b/0.mp4", "caption": "p0"},
        {"preferred": "b/2.mp4", "rejected": "a/2.mp4", "caption": "p2"},
    ]
    together = among_people(votes)
    assert sorted(together) == [(0.0, "p0")] * 3 + [(0.0, "p1")] + [(1.0, "p0")] * 3


def test_a_damaged_copy_is_plain_to_see(made: tuple[Rating, Path]) -> None:
    from rats_video.inference.video import read_mp4

    rating, folder = made
    check = rating.checks[0]
    whole, damaged = (read_mp4(folder / file)[0] for file in (check.left, check.right))
    assert float((whole - damaged).abs().mean()) > 0.15
    assert len({(*pair.key,) for pair in rating.checks}) == 2
    assert len(PROMPTS) == len(rating.clips)
    assert torch.equal(whole, read_mp4(folder / rating.clips[0].files["one"])[0])
