"""The agreement of rewards with people, by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from rats_video.commands import rate_rewards
from rats_video.commands.rate_rewards import PEOPLE, agreement
from rats_video.errors import UserError
from rats_video.rating.results import Ballot
from rats_video.rewards.temporal import SaturationConfig

SCORES = {"a/0": 2.0, "b/0": 1.0, "a/1": 0.0, "b/1": 3.0, "a/2": 5.0, "b/2": 5.0, "a/3": 9.0, "b/3": 0.0}
CPU = torch.device("cpu")


def ballot(person: str, place: int, score: float) -> Ballot:
    return Ballot(person, f"prompt {place}", ("a", "b"), (f"a/{place}", f"b/{place}"), score)


VOTES = [
    ballot("ann", 0, 1.0),  # as the reward: 2 > 1
    ballot("bob", 0, 1.0),  # again
    ballot("cem", 0, 0.0),  # against it
    ballot("ann", 1, 1.0),  # against it: 0 < 3
    ballot("ann", 2, 0.0),  # the reward is tied: half right
    ballot("ann", 3, 0.5),  # no choice: left out
]


@pytest.fixture(autouse=True)
def scored(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rewards by name: `theirs` as above, `turned` its negative, `broken` none."""

    def scores(_cfg: object, prompt_of: dict[str, str], *_: object, where: str) -> dict[str, float]:
        if where == "broken":
            raise UserError("its weights are not here", where=where)
        return {file: SCORES[file] if where == "theirs" else -SCORES[file] for file in prompt_of}

    monkeypatch.setattr(rate_rewards, "_scores", scores)


def test_known_answer_with_ties_and_interval(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """(1 + 1 + 0 + 0 + 0.5) / 5 = 0.5 of 3 prompts: by Wilson 0.5 +- z / (2 sqrt(3 + z^2)), z = 1.959964."""
    kinds = dict.fromkeys(("turned", "broken", "theirs"), SaturationConfig(kind="saturation", at_most=1))
    found = agreement([*VOTES, ballot("dee", 0, 1.0)], kinds, CPU, tmp_path)
    assert [*found] == ["theirs", "turned", PEOPLE]  # the best first
    assert capsys.readouterr().err == "warning: broken: left out: its weights are not here\n"
    theirs = found["theirs"]  # a fourth on prompt 0: 3.5 of 6
    assert (theirs.share, theirs.num_pairs, theirs.num_sources) == (3.5 / 6, 6, 3)
    assert found["turned"].share == 2.5 / 6
    assert theirs.margin == pytest.approx((1 + 1 - 1 - 3 + 0 + 1) / 6)
    even = agreement(VOTES, {"theirs": kinds["theirs"]}, CPU, tmp_path)["theirs"]
    assert even.share == 0.5
    assert (even.low, even.high) == pytest.approx((0.5 - 0.374666, 0.5 + 0.374666), abs=1e-5)
    assert not even.beats_chance


def test_people_among_themselves(tmp_path: Path) -> None:
    """On prompt 0: ann and bob alike, either against cem; on prompt 1 ann and bob alike: 2 of 4, 2 prompts."""
    found = agreement([*VOTES[:4], ballot("bob", 1, 1.0)], {}, CPU, tmp_path)[PEOPLE]
    assert (found.share, found.num_pairs, found.num_sources) == (0.5, 4, 2)


def test_nobody_chose(tmp_path: Path) -> None:
    assert agreement([VOTES[-1]], {}, CPU, tmp_path) == {}
