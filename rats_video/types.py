"""The dimension legend and the value objects that travel between modules.

Dimensions: B clips in a batch, C latent channels, F latent frames, T pixel frames, L text tokens, D text width,
K horizons, N solver steps. Latents are `[B, C, F, H, W]`; pixels `[B, T, 3, height, width]` in [0, 1].
`sigma` is the noise level in [0, 1], 1 = pure noise; `velocity = noise - x0 = d latents / d sigma`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, Protocol, runtime_checkable

from torch import Generator, Tensor, device, nn

from rats_video.condition import Condition, GivenFrames
from rats_video.sound import Sound


@dataclass(frozen=True)
class ClipSpec:
    """Size of a clip in pixels: `num_frames` frames of `height` x `width`, shown at `fps` frames a second."""

    num_frames: int
    height: int
    width: int
    fps: float


SamplerKind = Literal["euler", "renoise", "cps"]
"""How a step gets to the next noise level: along the velocity, or by its predicted clean clip and fresh noise."""

FreshNoise = Callable[[int], Tensor]
"""`step (0 ... N - 2) -> standard normal [B, C, F, H, W]` that a re-noising sampler puts on that step's clean clip."""

Rows = slice | Tensor
"""Some clips of a batch: a slice, which copies nothing, or their indices `[A]`."""


@dataclass(frozen=True)
class Trajectory:
    """The kept latents of a rollout.

    Args:
        sigmas: the K noise levels kept, falling; the last is 0 when the clip itself is kept.
        latents: K tensors `[B, C, F, H, W]`, one a kept sigma.
        nfe: network evaluations a clip that the rollout cost.
        predictions: the clean clips that some of its calls predict, `x0 = latents - sigma * velocity`, at the noise
            levels of those calls; None where nobody asked.
    """

    sigmas: tuple[float, ...]
    latents: tuple[Tensor, ...]
    nfe: int
    predictions: Trajectory | None = None

    @property
    def x0(self) -> Tensor:
        """The final latents `[B, C, F, H, W]` (sigma 0)."""
        return self.latents[-1]

    def take(self, rows: Rows) -> Trajectory:
        """The same of some clips."""
        predictions = None if self.predictions is None else self.predictions.take(rows)
        return Trajectory(self.sigmas, tuple(latents[rows] for latents in self.latents), self.nfe, predictions)


@dataclass(frozen=True)
class RewardScores:
    """Higher is better. `clip` is `[B]`, `frames` is `[B, T]` or None, `parts` are named `[B]` scores for the log.

    `judged` has the `[B]` scores of what judges each part of the latents (`Backbone.split`), `video` or `audio`; it is
    empty of rewards that only see.
    """

    clip: Tensor
    frames: Tensor | None = None
    parts: Mapping[str, Tensor] = field(default_factory=dict)
    judged: Mapping[str, Tensor] = field(default_factory=dict)

    def take(self, rows: Rows) -> RewardScores:
        """The scores of some clips."""
        frames = None if self.frames is None else self.frames[rows]
        parts, judged = ({name: part[rows] for name, part in each.items()} for each in (self.parts, self.judged))
        return RewardScores(self.clip[rows], frames, parts, judged)

    def of_part(self, part: str) -> RewardScores | None:
        """The scores of what judges that part of the latents; None if nothing does."""
        if not self.judged:
            return self if part == "video" else None
        if part not in self.judged:
            return None
        return RewardScores(self.judged[part], self.frames if part == "video" else None, self.parts)


@dataclass(frozen=True)
class PromptBatch:
    """Prompts and noise that teacher and student both start from.

    Args:
        index: which batch of the run this is.
        prompts: B prompts.
        noise: `[B, C, F, H, W]`.
        num_steps: the student's solver steps on this batch.
        grad_frames: latent frames whose pixels carry gradient to the reward; None = all of them.
        micro_batch: index of the micro-batch that this is.
        seeds: one a prompt, for its other random numbers; the same in every micro-batch and process.
        asked: for each prompt, if the teacher is rolled out for it (probability: `asked_share`); None = for all.
        picture_seeds: one a prompt, for the picture that its clip starts from; the same for all updates of the batch.
        given: the frames that each clip starts from, for image to video.
    """

    index: int
    prompts: tuple[str, ...]
    noise: Tensor
    num_steps: int
    grad_frames: range | None = None
    micro_batch: int = 0
    seeds: tuple[int, ...] = ()
    asked: tuple[bool, ...] | None = None
    asked_share: float = 1.0
    picture_seeds: tuple[int, ...] = ()
    given: GivenFrames | None = None

    @property
    def asked_rows(self) -> tuple[int, ...]:
        """The clips whose teacher is asked."""
        return tuple(row for row in range(len(self.prompts)) if self.asked is None or self.asked[row])

    @property
    def of_asked(self) -> PromptBatch:
        """These clips alone."""
        return self if self.asked is None else self.take(self.asked_rows)

    def condition(self, backbone: Backbone) -> Condition:
        """The batch's prompts, encoded, and its given frames."""
        return backbone.encode_text(self.prompts).with_given(self.given)

    def take(self, rows: Sequence[int]) -> PromptBatch:
        """Some clips of the batch, with what belongs to each of them."""
        return replace(
            self,
            prompts=tuple(self.prompts[row] for row in rows),
            noise=self.noise[list(rows)],
            seeds=tuple(self.seeds[row] for row in rows) if self.seeds else (),
            asked=None if self.asked is None else tuple(self.asked[row] for row in rows),
            picture_seeds=tuple(self.picture_seeds[row] for row in rows) if self.picture_seeds else (),
            given=None if self.given is None else self.given.map(lambda part: part[list(rows)]),
        )


VelocityFn = Callable[[Tensor, Tensor, Condition], Tensor]
"""`(latents [B, C, F, H, W], sigma [B], text) -> velocity [B, C, F, H, W]`: one call is one network evaluation."""

GuideFn = Callable[[Tensor, Tensor, float | Tensor], Tensor]
"""`(with the prompt, with the negative prompt, scale) -> velocity`, all `[B, C, F, H, W]`: the guided one.
The scale may be `[B, 1, 1, 1, 1]`."""


@dataclass(frozen=True)
class Guide:
    """How a family guides a call.

    Args:
        join: `(with the prompt, with the negative prompt, scale, latents, sigma, condition) -> velocity`, the guided
            one; the last three are what the first was made of, for formulas that need them or make further calls.
        calls: network evaluations of a guided call, a clip.
    """

    join: Callable[[Tensor, Tensor, float | Tensor, Tensor, Tensor, Condition], Tensor]
    calls: int = 2

    @staticmethod
    def of(formula: GuideFn) -> Guide:
        """By a formula of the two velocities."""
        return Guide(lambda cond, uncond, scale, *_: formula(cond, uncond, scale))


class FurtherGuidance(Protocol):
    """Settings of a family's guidance beside the scale of the text."""

    @property
    def calls(self) -> int:
        """Network evaluations of a guided step beside the two of the text."""
        ...


def guided_calls(scale: float, further: FurtherGuidance | None) -> int:
    """Network evaluations of one step of a clip: one without guidance, which a scale of 1 switches off."""
    return 1 if scale == 1.0 else 2 + (0 if further is None else further.calls)


FirstFrames = Callable[[Sequence[str], Sequence[int]], tuple[Tensor, Tensor | None]]
"""`(B prompts, B seeds) -> pictures [B, 3, height, width]` in [0, 1] that clips of these prompts start from, and those
that they end at, if they do."""

VelocityAndFeatures = Callable[[Tensor, Tensor, Condition], tuple[Tensor, Tensor]]
"""`(latents, sigma, text) -> velocity [B, C, F, H, W], features [B, tokens, D]` in one call of the denoiser."""


class Reward(Protocol):
    """Scores clips. Differentiable rewards carry gradient from the scores to every frame they look at.

    Optional attributes: `differentiable` (default True) and `looks_at(num_frames)`, the indices of the frames that are
    scored (default all).
    """

    def __call__(self, videos: Tensor, prompts: Sequence[str]) -> RewardScores:
        """Score `videos` `[B, T, 3, height, width]` in [0, 1] against their prompts."""
        ...


@runtime_checkable
class LatentScorer(Protocol):
    """A reward that needs no pixels."""

    def score_latents(self, latents: Tensor, prompts: Sequence[str]) -> RewardScores:
        """Score clean latents `[B, C, F, H, W]` against their prompts; frame scores are one a pixel frame, `[B, T]`."""
        ...


@runtime_checkable
class PromptChecker(Protocol):
    """A reward that can tell beforehand which prompts it cannot score."""

    def check_prompts(self, prompts: Sequence[str]) -> None:
        """Raise UserError for a prompt that cannot be scored; warn of those that are scored in part."""
        ...


class Backbone(Protocol):
    """One family of video models in one role, as the method and the samplers see it: text in, latents, pixels out."""

    @property
    def denoiser(self) -> nn.Module:
        """The network (or the experts) whose calls are counted as NFE."""
        ...

    @property
    def weights(self) -> dict[str, nn.Parameter]:
        """The trained weights, all of the denoiser or one adapter: they make this role differ from the base."""
        ...

    @property
    def device(self) -> device:
        """The device that the model computes on."""
        ...

    @property
    def first_frames(self) -> FirstFrames | None:
        """Where pictures come from, if clips start from them."""
        ...

    def given_frames(self, clip: ClipSpec, first: Tensor, last: Tensor | None = None) -> GivenFrames:
        """What the model is told of clips that start from frames `[B, 3, height, width]` in [0, 1]."""
        ...

    def encode_text(self, prompts: Sequence[str]) -> Condition:
        """Encode B prompts."""
        ...

    def sample_noise(self, batch: int, clip: ClipSpec, generator: Generator) -> Tensor:
        """Standard normal `[B, C, F, H, W]`, drawn on the generator's device and moved to the model's."""
        ...

    def sigmas(self, num_steps: int, shift: float) -> Tensor:
        """`[num_steps + 1]` noise levels, 1 ... 0, that the model can be called at."""
        ...

    def nearest_levels(self, sigma: Tensor) -> Tensor:
        """The noise levels `[B]` nearest to these that the model can be called at."""
        ...

    def guidance_by_level(self, scale: float, scale_2: float) -> Callable[[Tensor], Tensor]:
        """`noise levels [B] -> guidance scales [B]`, the second one where the second of two experts owns the level."""
        ...

    def velocity(self, latents: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
        """Predicted `noise - x0`, `[B, C, F, H, W]`, at noise levels `sigma` `[B]`."""
        ...

    def guidance(self, further: FurtherGuidance | None = None) -> Guide:
        """The guidance of the family, beyond the text by `further`."""
        ...

    def split(self, latents: Tensor) -> Mapping[str, Tensor]:
        """The named parts of latents, `[B, C, F, H, W]` each: `video`, and `audio` for clips with sound."""
        ...

    def decode_sound(self, latents: Tensor) -> Sound | None:
        """The sound of clips, differentiable; None of a family whose clips have none."""
        ...

    def decode(self, latents: Tensor, grad_frames: range | None = None) -> Tensor:
        """Pixels `[B, T, 3, height, width]` in [0, 1], differentiable.

        With `grad_frames` only the pixels of those latent frames carry gradient, and only to those frames; a VAE that
        decodes several at once widens them to whole chunks.
        """
        ...
