"""A reward that is the user's own code: a function, or a class, of any module that can be imported."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from rats_video.errors import UserError
from rats_video.rewards.base import RewardKindConfig
from rats_video.types import RewardScores
from rats_video.user_code import Blame, Options, Target, load_code


class CustomRewardConfig(RewardKindConfig):
    """Whatever the user's own code scores, in its own range: a function, or a class, of any module."""

    per = "clip"
    source = "the user's module"
    folders = ()

    kind: Literal["custom"]
    target: Target = Field(description="`package.module:Name`; modules of the current directory are found too")
    options: Options = Field({}, description="named arguments: of the class, or of every call of the function")
    differentiable: bool = Field(default=True, description="where its own attribute `differentiable` does not say it")


class CustomReward:
    """Checks what the user's code returns, and names it when it fails.

    Args:
        scorer: `(videos [B, T, 3, height, width] in [0, 1], prompts, **options) -> Tensor [B]` (a score a clip),
            `Tensor [B, T]` (a score a frame, of which the clip's is the mean) or `RewardScores`. What it says of itself
            as `differentiable`, `looks_at` or `check_prompts` holds, as in the `Reward` protocol.
        name: of the target, for messages.
        source: the file of its code.
        options: named arguments of every call.
        differentiable: where it does not say so itself. One that is not is called without gradient.
    """

    def __init__(
        self,
        scorer: Any,
        name: str,
        source: Path,
        options: dict[str, Any] | None = None,
        *,
        differentiable: bool = True,
    ) -> None:
        self._scorer, self._options, self._name, self._source = scorer, options or {}, name, source
        self.differentiable = bool(getattr(scorer, "differentiable", differentiable))
        for say in ("looks_at", "check_prompts"):
            if hasattr(scorer, say):
                setattr(self, say, getattr(scorer, say))

    def __call__(self, videos: Tensor, prompts: Sequence[str]) -> RewardScores:
        """Score `videos` `[B, T, 3, height, width]` in [0, 1]; float32 on their device.

        Raises:
            UserError: the code raises anything, or returns something else than scores of these clips.
        """
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.differentiable):
            with Blame(f"reward {self._name}", self._source, "fails"):
                result = self._scorer(videos if self.differentiable else videos.detach(), prompts, **self._options)
            scores = self._scores(result, *videos.shape[:2])
            return _each(scores, lambda score: self._plain(score, videos.device))

    def _scores(self, result: object, clips: int, frames: int) -> RewardScores:
        match result:
            case Tensor(ndim=1):
                scores = RewardScores(result)
            case Tensor(ndim=2):
                scores = RewardScores(result.float().mean(dim=1), result)
            case RewardScores():
                scores = result
            case _:
                what = f"a tensor {list(result.shape)}" if isinstance(result, Tensor) else f"a {type(result).__name__}"
                raise self._wrong(what, clips, frames)
        for what, score, shape in (
            ("clip scores", scores.clip, (clips,)),
            ("frame scores", scores.frames, (clips, frames)),
            *((f"part {name!r}", part, (clips,)) for name, part in scores.parts.items()),
        ):
            if score is not None and not (isinstance(score, Tensor) and score.shape == shape):
                found = list(score.shape) if isinstance(score, Tensor) else type(score).__name__
                raise self._wrong(f"{what} {found}", clips, frames)
        return scores

    def _wrong(self, what: str, clips: int, frames: int) -> UserError:
        fix = f"of {clips} clips of {frames} frames, return a tensor [{clips}] or [{clips}, {frames}], or RewardScores"
        return UserError(f"returned {what}", where=f"reward {self._name}", fix=fix)

    def _plain(self, score: Tensor, device: torch.device) -> Tensor:
        score = score.to(device, torch.float32)
        return score if self.differentiable else score.detach()


def _each(scores: RewardScores, change: Any) -> RewardScores:
    frames = None if scores.frames is None else change(scores.frames)
    return RewardScores(change(scores.clip), frames, {name: change(part) for name, part in scores.parts.items()})


def build_custom(cfg: CustomRewardConfig, device: torch.device, *, where: str) -> CustomReward:
    """Import the target; a class is built with the options, and frozen and moved to the device if it is a module.

    Raises:
        UserError: the code is not trusted or raises something, or there is no such module or name.
    """
    found, source = load_code(cfg.target, kind="reward", where=where)
    scorer, options = found, dict(cfg.options)
    if inspect.isclass(found):
        with Blame(f"reward {cfg.target}", source, "cannot be built"):
            scorer, options = found(**options), {}
    if not callable(scorer):
        raise UserError(
            f"{cfg.target.partition(':')[2]} in {source} cannot be called",
            where=f"{where}.target", fix="name a function or a class",
        )  # fmt: skip
    if isinstance(scorer, nn.Module):
        scorer.to(device).eval().requires_grad_(requires_grad=False)
    return CustomReward(scorer, cfg.target, source, options, differentiable=cfg.differentiable)
