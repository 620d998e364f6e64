"""A reward that is the user's own code: a function, or a class, of any module that can be imported."""

from __future__ import annotations

import functools
import importlib
import inspect
import json
import os
import sys
import traceback
from collections.abc import Sequence
from contextlib import AbstractContextManager
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import torch
from pydantic import Field, JsonValue, field_validator
from torch import Tensor, nn

from rats_video.errors import UserError
from rats_video.rewards.base import RewardContext, RewardKindConfig, free_reward
from rats_video.types import Reward, RewardScores


class CustomRewardConfig(RewardKindConfig):
    """Whatever the user's own code scores, in its own range: a function, or a class, of any module."""

    per = "clip"
    source = "the user's module"
    folders = ()

    kind: Literal["custom"]
    target: str = Field(description="`package.module:Name`; modules of the current directory are found too")
    options: dict[str, JsonValue] = Field(
        {}, description="named arguments: of the class, or of every call of the function"
    )
    differentiable: bool = Field(default=True, description="where its own attribute `differentiable` does not say it")

    def build(self, context: RewardContext) -> CustomReward:
        """Import it."""
        return build_custom(self, context.device, where=context.where)

    def on_meta(self, context: RewardContext) -> Reward:  # noqa: ARG002
        """A free reward in its place: only running the code would tell its cost."""
        return free_reward

    def sources(self, where: str) -> list[Path]:
        """The module and those beside it, which it may import; what it imports from elsewhere is not seen."""
        return sorted(source_file(self.target, where=where).parent.glob("*.py"))

    @field_validator("options")
    @classmethod
    def _can_be_written_down(cls, options: dict[str, Any]) -> dict[str, Any]:
        json.dumps(options, allow_nan=False)  # raises ValueError at infinity, and at integers of thousands of digits
        return options

    @field_validator("target")
    @classmethod
    def _is_module_and_name(cls, target: str) -> str:
        module, _, name = target.partition(":")
        if not all(part.isidentifier() for part in (*module.split("."), name)):
            raise ValueError(f"must be package.module:Name, got {target!r}")
        return target


TRUST = "RATS_VIDEO_TRUST_CODE"
"""Environment variable that lets code of the user's run; processes that are started inherit it."""


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
            with _Blame(self._name, self._source, "fails"):
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

    Code runs with all the user's rights, whoever wrote the configuration that names it: a downloaded one, a run's or a
    latent reward's. So it runs only where the environment says `RATS_VIDEO_TRUST_CODE=1`, and says so.

    Raises:
        UserError: nobody has said so; there is no such module or name; or its code raises something.
    """
    source = source_file(cfg.target, where=where)
    if os.environ.get(TRUST) != "1":
        raise UserError(
            f"{cfg.target} is code, in {source}, and would run with all your rights", where=f"{where}.target",
            fix=f"read it, then start again with {TRUST}=1 in the environment",
        )  # fmt: skip
    _announce(source)
    module_name, _, name = cfg.target.partition(":")
    with _Blame(cfg.target, source, "cannot be imported"):
        module = importlib.import_module(module_name)
    found = getattr(module, name, None)
    if found is None:
        raise UserError(f"no {name!r} in {source}", where=f"{where}.target")
    scorer, options = found, dict(cfg.options)
    if inspect.isclass(found):
        with _Blame(cfg.target, source, "cannot be built"):
            scorer, options = found(**options), {}
    if not callable(scorer):
        raise UserError(
            f"{name} in {source} cannot be called", where=f"{where}.target", fix="name a function or a class"
        )
    if isinstance(scorer, nn.Module):
        scorer.to(device).eval().requires_grad_(requires_grad=False)
    return CustomReward(scorer, cfg.target, source, options, differentiable=cfg.differentiable)


def source_file(target: str, *, where: str) -> Path:
    """The file of a target's module; neither it nor a package above it is run.

    Raises:
        UserError: there is none.
    """
    module = target.partition(":")[0]
    # At the end, so that nothing here hides an installed package; for good, because code may import when it runs.
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.append(here)
    importlib.invalidate_caches()
    names = module.split(".")
    spec: ModuleSpec | None = None
    for end in range(1, len(names) + 1):  # importlib.util.find_spec would import the packages above
        within = None if spec is None else spec.submodule_search_locations
        full = ".".join(names[:end])
        found = None if end > 1 and within is None else (finder.find_spec(full, within) for finder in sys.meta_path)
        spec = next(filter(None, found or ()), None)
    if spec is None or not spec.has_location or spec.origin is None:
        raise UserError(
            f"no module {module!r}, neither in {here} nor installed", where=f"{where}.target",
            fix="start rats-video in the folder that holds it",
        )  # fmt: skip
    return Path(spec.origin)


@functools.cache  # once a process, however often it is built
def _announce(source: Path) -> None:
    print(f"reward: runs code of {source}", file=sys.stderr)  # noqa: T201


class _Blame(AbstractContextManager[None]):
    """Turns whatever the user's code raises into one line, with the exception as its cause."""

    def __init__(self, name: str, source: Path, what: str) -> None:
        self._name, self._source, self._what = name, source, what

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # Memory that ran out is explained elsewhere.
        if not isinstance(error, Exception) or isinstance(error, UserError | torch.OutOfMemoryError):
            return
        lines = [frame.lineno for frame in traceback.extract_tb(trace) if frame.filename == str(self._source)]
        at = f"{self._source.name}, line {lines[-1]}" if lines else ""
        raise UserError(
            f"{self._what}: {type(error).__name__}: {error}".rstrip(": "), where=f"reward {self._name}", fix=at
        ) from error
