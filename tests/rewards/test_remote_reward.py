"""A reward at the other end of a line gives the scores and gradients that it gives here."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from queue import SimpleQueue
from typing import Any

import pytest
import torch
from torch import Tensor

from rats_video.errors import UserError
from rats_video.rewards.remote import RemoteReward, answer
from rats_video.types import Reward, RewardScores


class Line:
    """Stands in for the link between two processes: what one end puts in comes out at the other."""

    device = torch.device("cpu")

    def __init__(self, out: SimpleQueue[Any], into: SimpleQueue[Any]) -> None:
        self._out, self._into = out, into
        self.hear = into.get

    def tell(self, message: object) -> None:
        self._out.put(message)

    def send(self, tensor: Tensor) -> None:
        self._out.put(tensor.detach().clone())

    def receive(self, shape: Sequence[int]) -> Tensor:
        tensor: Tensor = self._into.get(timeout=10)
        assert tensor.shape == torch.Size(shape)
        return tensor


class Fussy:
    """Scores clips without frames or parts, and knows some prompts only."""

    def __call__(self, videos: Tensor, prompts: Sequence[str]) -> RewardScores:
        if "nonsense" in prompts:
            raise UserError("the reward knows no word of it", where="prompt")
        return RewardScores(videos.square().mean(dim=(1, 2, 3, 4)))


@pytest.fixture(params=["color", "fussy"])
def local(request: pytest.FixtureRequest, color_reward: Reward) -> Reward:
    return color_reward if request.param == "color" else Fussy()


@pytest.fixture
def remote(local: Reward) -> Iterator[RemoteReward]:
    ask: SimpleQueue[Any] = SimpleQueue()
    reply: SimpleQueue[Any] = SimpleQueue()
    ended: SimpleQueue[BaseException | None] = SimpleQueue()
    end: Any = Line(reply, ask)
    threading.Thread(target=answer, args=(local, end, threading.Lock(), ended), daemon=True).start()
    line: Any = Line(ask, reply)
    reward = RemoteReward(line)
    yield reward
    reward.close()
    assert ended.get(timeout=10) is None


def test_scores_and_gradients_are_the_local_ones(local: Reward, remote: RemoteReward) -> None:
    prompts = ("a", "bb")
    gradients = []
    for reward in (local, remote):
        videos = torch.rand(2, 3, 3, 4, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
        scores = reward(videos, prompts)
        with torch.no_grad():  # the teacher's, between the student's and its backward
            assert torch.equal(reward(videos + 1, prompts).clip, local(videos + 1, prompts).clip)
        loss = (scores.clip * torch.tensor([1.0, 3.0])).sum()
        loss = loss if scores.frames is None else loss + scores.frames[:, 1].sum()
        (gradient,) = torch.autograd.grad(loss, videos)
        gradients.append((gradient, scores))
    (expected, theirs), (ours, mine) = gradients
    assert torch.equal(ours, expected)
    assert torch.equal(mine.clip, theirs.clip)
    assert (mine.frames is None) == (theirs.frames is None)
    if mine.frames is not None and theirs.frames is not None:
        assert torch.equal(mine.frames, theirs.frames)
    assert mine.parts.keys() == theirs.parts.keys()


def test_without_gradient_there_is_none(remote: RemoteReward) -> None:
    videos = torch.rand(1, 2, 3, 4, 4, requires_grad=True)
    with torch.no_grad():
        assert not remote(videos, ["a"]).clip.requires_grad
    assert not remote(videos.detach(), ["a"]).clip.requires_grad


@pytest.mark.parametrize("local", ["fussy"], indirect=True)
def test_its_mistakes_are_told_here(remote: RemoteReward) -> None:
    with pytest.raises(UserError, match=r"^prompt: the reward knows no word of it$"):
        remote(torch.rand(1, 2, 3, 4, 4), ["nonsense"])
    assert remote(torch.ones(1, 2, 3, 4, 4), ["sense"]).clip.tolist() == [1.0]
