"""A reward model in another process: pixels go there, scores and gradients of pixels come back."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from rats_video.errors import UserError
from rats_video.runtime import Runtime
from rats_video.types import Reward, RewardScores


@dataclass(frozen=True)
class RankLink:
    """One end of the connection between a training rank and its reward rank.

    Args:
        group: of the two ranks.
        peer: rank of the other end.
        device: of the tensors sent and received.
    """

    group: dist.ProcessGroup
    peer: int
    device: torch.device

    @staticmethod
    def to_reward(runtime: Runtime) -> RankLink:
        """A training rank's link; several of them may share a reward rank."""
        peer = runtime.trainers + runtime.rank % runtime.reward_ranks
        return RankLink(runtime.links[runtime.rank], peer, runtime.device)

    def tell(self, message: object) -> None:
        """Send a small object."""
        dist.send_object_list([message], self.peer, self.group, self.device)

    def hear(self) -> Any:
        """Receive a small object."""
        heard = [None]
        dist.recv_object_list(heard, self.peer, self.group, self.device)
        return heard[0]

    def send(self, tensor: Tensor) -> None:
        """Send a tensor as float32."""
        dist.send(tensor.detach().to(self.device, torch.float32).contiguous(), self.peer, self.group)

    def receive(self, shape: Sequence[int]) -> Tensor:
        """Receive a float32 tensor."""
        tensor = torch.empty(tuple(shape), device=self.device)
        dist.recv(tensor, self.peer, self.group)
        return tensor


@dataclass(frozen=True)
class _Request:
    """Announces `[B, T, 3, height, width]` pixels of these prompts; `keep` is the number to keep the reply under."""

    prompts: tuple[str, ...]
    shape: tuple[int, ...]
    keep: int | None


@dataclass(frozen=True)
class _Backward:
    """Announces the gradient by the scores of a reply that was kept."""

    kept: int


@dataclass(frozen=True)
class _Layout:
    """Announces `[B, columns]` scores: the clip's, then those of `frames` frames, then one a part."""

    frames: int
    parts: tuple[str, ...]

    @property
    def columns(self) -> int:
        return 1 + self.frames + len(self.parts)


class RemoteReward:
    """The reward on this rank's reward rank, gradients included.

    Each call with gradient is kept there until its backward: a method may score several clips before the first.

    Raises:
        UserError: whatever the reward there raises.
    """

    def __init__(self, link: RankLink) -> None:
        self._link, self._calls = link, itertools.count()
        link.hear()  # the reward is loaded and tested

    def __call__(self, videos: Tensor, prompts: Sequence[str]) -> RewardScores:
        """Score `videos` `[B, T, 3, height, width]` in [0, 1] against their prompts."""
        keep = next(self._calls) if videos.requires_grad and torch.is_grad_enabled() else None
        self._link.tell(_Request(tuple(prompts), tuple(videos.shape), keep))
        self._link.send(videos)
        reply = self._link.hear()
        if isinstance(reply, str):
            raise UserError(reply)
        scores = self._link.receive((len(videos), reply.columns))
        if keep is not None:
            scores = _RemoteScores.apply(videos, scores, self._link, keep)  # type: ignore[no-untyped-call]
        return _unpack(scores, reply)

    def close(self) -> None:
        """Tell the reward rank that this rank is done."""
        self._link.tell(None)


class _RemoteScores(torch.autograd.Function):
    """Connects scores from the reward rank to the autograd graph of the local pixels."""

    @staticmethod
    def forward(ctx: Any, videos: Tensor, scores: Tensor, link: RankLink, kept: int) -> Tensor:
        ctx.link, ctx.kept, ctx.shape, ctx.dtype = link, kept, videos.shape, videos.dtype
        return scores.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        ctx.link.tell(_Backward(ctx.kept))
        ctx.link.send(gradients[0])
        return ctx.link.receive(ctx.shape).to(ctx.dtype), None, None, None


def serve_reward(reward: Reward, runtime: Runtime) -> None:
    """Answer this reward rank's trainers until all of them have closed.

    Each trainer has a thread, because not every backend can wait for several ranks at once; one computes at a time.
    """
    clients = range(runtime.rank - runtime.trainers, runtime.trainers, runtime.reward_ranks)
    ended: SimpleQueue[BaseException | None] = SimpleQueue()
    computing = threading.Lock()
    before, threading.excepthook = threading.excepthook, lambda failure: ended.put(failure.exc_value)
    try:
        for client in clients:
            link = RankLink(runtime.links[client], client, runtime.device)
            threading.Thread(target=answer, args=(reward, link, computing, ended), daemon=True).start()
        for _ in clients:
            if (error := ended.get()) is not None:
                raise error
    finally:
        threading.excepthook = before


def answer(reward: Reward, link: RankLink, computing: threading.Lock, ended: SimpleQueue[BaseException | None]) -> None:
    """Answer one trainer until it closes, then put None."""
    if link.device.type == "cuda":
        torch.cuda.set_device(link.device)  # a thread starts on the first GPU
    link.tell("ready")
    kept: dict[int, tuple[Tensor, Tensor]] = {}
    while (request := link.hear()) is not None:
        if isinstance(request, _Request):
            with_gradient = request.keep is not None
            videos = link.receive(request.shape).requires_grad_(with_gradient)
            try:
                with computing, torch.set_grad_enabled(with_gradient):
                    layout, scores = _pack(reward(videos, request.prompts))
            except UserError as error:
                link.tell(str(error))
                continue
            link.tell(layout)
            link.send(scores)
            if request.keep is not None:
                kept[request.keep] = videos, scores
        else:
            videos, scores = kept.pop(request.kept)
            incoming = link.receive(scores.shape)
            with computing:
                (gradient,) = torch.autograd.grad(scores, videos, incoming)
            link.send(gradient)
    ended.put(None)


def _pack(scores: RewardScores) -> tuple[_Layout, Tensor]:
    frames = [] if scores.frames is None else list(scores.frames.unbind(dim=1))
    layout = _Layout(len(frames), tuple(scores.parts))
    return layout, torch.stack([scores.clip, *frames, *scores.parts.values()], dim=1).float()


def _unpack(scores: Tensor, layout: _Layout) -> RewardScores:
    clip, frames, parts = scores.split([1, layout.frames, len(layout.parts)], dim=1)
    by_name = dict(zip(layout.parts, parts.unbind(dim=1), strict=True))
    return RewardScores(clip[:, 0], frames if layout.frames else None, by_name)
