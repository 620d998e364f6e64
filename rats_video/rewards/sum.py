"""A weighted sum of rewards, each brought to a common scale first."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import add
from pathlib import Path
from typing import Annotated, Literal, Self

import torch
from pydantic import BeforeValidator, Field, model_validator
from torch import Tensor, nn

from rats_video.config.fields import Config, PositiveFloat
from rats_video.errors import UserError
from rats_video.rewards.base import BaseRewardConfig, RewardContext, frames_seen, is_differentiable
from rats_video.rewards.kinds import SingleRewardConfig, word_by_default
from rats_video.sound import Sound, hears, sees
from rats_video.types import LatentScorer, PromptChecker, Reward, RewardScores


class TermConfig(Config):
    """A term of a sum: `weight * (score - mean) / spread`. `rats-video calibrate` measures all three."""

    weight: float = Field(1.0, allow_inf_nan=False, description="0 logs the score and leaves it out of the sum")
    mean: float = Field(0.0, allow_inf_nan=False, description="score that counts as 0")
    spread: PositiveFloat = Field(1.0, description="score difference that counts as 1")
    reward: Annotated[SingleRewardConfig, Field(discriminator="kind"), BeforeValidator(word_by_default)] = Field(
        description="what the term scores"
    )


class SumRewardConfig(BaseRewardConfig):
    """Any of the others together: the sum over terms of weight * (score - mean) / spread."""

    per = "frame"
    source = "its terms"
    folders = ()

    kind: Literal["sum"]
    terms: dict[Annotated[str, Field(pattern=r"^[\w-]+$")], TermConfig] = Field(
        min_length=1, description="named as you like; --set reward.terms.NAME.weight=2 reaches into one"
    )

    def build(self, context: RewardContext) -> SumReward:
        """Load the terms."""
        return SumReward.of(self, context.where, lambda term, key: term.build(context.at(key)))

    def on_meta(self, context: RewardContext) -> SumReward:
        """The same without weights."""
        return SumReward.of(self, context.where, lambda term, key: term.on_meta(context.at(key)))

    def sources(self, where: str) -> list[Path]:
        """Those of the terms."""
        return [path for key, term in self.rewards(where).items() for path in term.sources(key)]

    def rewards(self, where: str) -> dict[str, SingleRewardConfig]:
        """The terms' rewards by dotted key under `where`."""
        return {f"{where}.terms.{name}.reward": term.reward for name, term in self.terms.items()}

    @model_validator(mode="after")
    def _some_term_counts(self) -> Self:
        if not any(term.weight for term in self.terms.values()):
            raise ValueError("every term has weight 0")
        return self


PixelRewardConfig = Annotated[
    SingleRewardConfig | SumRewardConfig, Field(discriminator="kind"), BeforeValidator(word_by_default)
]
"""A reward of pixels: all but a latent one."""


@dataclass(frozen=True)
class Term:
    """A reward that counts `weight * (score - mean) / spread`."""

    reward: Reward
    weight: float = 1.0
    mean: float = 0.0
    spread: float = 1.0

    def count(self, scores: Tensor) -> Tensor:
        """Contribution of scores of any shape to the sum."""
        return self.weight * (scores - self.mean) / self.spread


class SumReward(nn.Module):
    """The sum of its terms, for clips and for frames; each term's own score is a part under its name.

    A term without frame scores adds its clip's score to every frame. A term of weight 0 is scored without gradient and
    does not count.
    """

    def __init__(self, terms: Mapping[str, Term]) -> None:
        super().__init__()
        self.terms = dict(terms)
        self._networks = nn.ModuleList(t.reward for t in terms.values() if isinstance(t.reward, nn.Module))

    @classmethod
    def of(cls, cfg: SumRewardConfig, where: str, build: Callable[[SingleRewardConfig, str], Reward]) -> SumReward:
        """The sum that a configuration names; `build` makes a term's reward, given its dotted key under `where`.

        Raises:
            UserError: a term scores latents, which no other term sees.
        """
        terms = {}
        for (name, term), key in zip(cfg.terms.items(), cfg.rewards(where), strict=True):
            reward = build(term.reward, key)
            if isinstance(reward, LatentScorer):
                raise UserError("scores latents: it cannot be added to scores of pixels", where=key, fix="use it alone")
            terms[name] = Term(reward, term.weight, term.mean, term.spread)
        return cls(terms)

    @property
    def counted(self) -> list[Term]:
        """The terms that the sum depends on."""
        return [term for term in self.terms.values() if term.weight]

    @property
    def differentiable(self) -> bool:
        """True if every term that counts is differentiable."""
        return all(is_differentiable(term.reward) for term in self.counted)

    def looks_at(self, num_frames: int) -> Tensor:
        """Indices of the frames that any term that counts looks at."""
        seen: Tensor = torch.cat([frames_seen(term.reward, num_frames) for term in self.counted]).unique()
        return seen

    @property
    def hears(self) -> bool:
        """True if a term does."""
        return any(hears(term.reward) for term in self.terms.values())

    @property
    def sees(self) -> bool:
        """True if a term does."""
        return any(sees(term.reward) for term in self.terms.values())

    def forward(self, videos: Tensor, prompts: Sequence[str], sound: Sound | None = None) -> RewardScores:
        """Score `[B, T, 3, height, width]` in [0, 1]; parts are the terms' scores and, as `term/part`, their parts."""
        scored: dict[str, RewardScores] = {}
        for name, term in self.terms.items():
            with torch.set_grad_enabled(torch.is_grad_enabled() and term.weight != 0):
                heard = (sound,) if hears(term.reward) else ()
                scored[name] = term.reward(videos, prompts, *heard)
        return add_up(self.terms, scored)

    def check_prompts(self, prompts: Sequence[str]) -> None:
        """Have each term check the prompts, if it can."""
        for term in self.terms.values():
            if isinstance(term.reward, PromptChecker):
                term.reward.check_prompts(prompts)


def add_up(terms: Mapping[str, Term], scored: Mapping[str, RewardScores]) -> RewardScores:
    """The sum's scores from those of its terms, by name; if one judges the sound, also those of each part's own."""
    counted = [(term, scored[name]) for name, term in terms.items() if term.weight]
    clip = reduce(add, [term.count(scores.clip) for term, scores in counted])
    parts_judged = sorted({part for _, scores in counted for part in scores.judged})
    by_part = {
        part: [(term, own) for term, scores in counted if (own := scores.of_part(part)) is not None]
        for part in {"video": None} | dict.fromkeys(parts_judged)
    }
    judged = {
        part: reduce(add, [term.count(own.clip) for term, own in owns])
        for part, owns in by_part.items()
        if owns and parts_judged
    }
    seen = by_part["video"]
    has_frames = any(scores.frames is not None for _, scores in seen)
    frames = reduce(add, [term.count(_of_frames(scores)) for term, scores in seen]) if has_frames else None
    parts: dict[str, Tensor] = {}
    for name, scores in scored.items():
        parts |= {name: scores.clip, **{f"{name}/{part}": values for part, values in scores.parts.items()}}
    return RewardScores(clip, frames, parts, judged)


def _of_frames(scores: RewardScores) -> Tensor:
    """`[B, T]`, or `[B, 1]` that holds for every frame."""
    return scores.clip[:, None] if scores.frames is None else scores.frames


def terms_of(reward: Reward, where: str) -> dict[str, Term]:
    """The terms of a sum by their dotted keys under `where`; any other reward is its own only term."""
    if isinstance(reward, SumReward):
        return {f"{where}.terms.{name}.reward": term for name, term in reward.terms.items()}
    return {where: Term(reward)}
