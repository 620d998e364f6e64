"""The dimension legend and the value objects that travel between modules.

Dimensions: B clips in a batch, C latent channels, F latent frames, T pixel frames, L text tokens, D text width,
K horizons, N solver steps. Latents are `[B, C, F, H, W]`; pixels `[B, T, 3, height, width]` in [0, 1].
`sigma` is the noise level in [0, 1], 1 = pure noise; `velocity = noise - x0 = d latents / d sigma`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol, runtime_checkable

from torch import Generator, Tensor, cat, device, nn


@dataclass(frozen=True)
class ClipSpec:
    """Size of a clip in pixels: `num_frames` frames of `height` x `width`, shown at `fps` frames a second."""

    num_frames: int
    height: int
    width: int
    fps: float


@dataclass(frozen=True)
class GivenFrames:
    """What is known of the frames of B clips before they are made: the picture that a video starts from.

    A family takes it in one of two ways, or both: as latents that are held while the others are denoised, or as further
    channels of the denoiser's input.

    Args:
        held: latents `[B, C, F, H, W]` that hold the given frames; what is in the others counts for nothing.
        is_held: for each of the F latent frames, if it is one of them.
        channels: `[B, C', F, H, W]`, put behind the noisy latents' own.
        image: `[B, L, D]`, features of an image encoder that the denoiser attends to (Wan 2.1's CLIP).
    """

    held: Tensor | None = None
    is_held: tuple[bool, ...] = ()
    channels: Tensor | None = None
    image: Tensor | None = None

    def map(self, change: Callable[[Tensor], Tensor]) -> GivenFrames:
        """The same with every tensor changed, e.g. moved or expanded along the batch."""
        held, channels, image = (
            None if part is None else change(part) for part in (self.held, self.channels, self.image)
        )
        return GivenFrames(held, self.is_held, channels, image)

    @property
    def held_frames(self) -> list[int]:
        """The latent frames that are held."""
        return [frame for frame, is_held in enumerate(self.is_held) if is_held]


@dataclass(frozen=True)
class Condition:
    """What B clips are made of: encoded prompts, and given frames where a video starts from a picture.

    Args:
        embeds: `[B, L, D]`, padded to one length as the backbone's own pipeline pads them.
        mask: `[B, L]`, 1 where there is a token; None for models that attend to padding as well.
        pooled: `[B, P]`, for models that also take one vector a prompt (HunyuanVideo's CLIP).
        given: frames that are known; None makes a video from text alone.
    """

    embeds: Tensor
    mask: Tensor | None = None
    pooled: Tensor | None = None
    given: GivenFrames | None = None

    def __len__(self) -> int:
        return self.embeds.shape[0]

    def map(self, change: Callable[[Tensor], Tensor]) -> Condition:
        """The same with every tensor changed, e.g. moved or expanded along the batch."""
        return Condition(
            change(self.embeds),
            None if self.mask is None else change(self.mask),
            None if self.pooled is None else change(self.pooled),
            None if self.given is None else self.given.map(change),
        )

    @staticmethod
    def of_text(parts: Mapping[str, Tensor]) -> Condition:
        """Encoded prompts by the names of their parts, as files have them; raises TypeError where one is unknown."""
        if unknown := parts.keys() - {"embeds", "mask", "pooled"}:
            raise TypeError(f"{min(unknown)!r} is no part of an encoded prompt")
        if "embeds" not in parts:
            raise TypeError("an encoded prompt needs 'embeds'")
        return Condition(parts["embeds"], parts.get("mask"), parts.get("pooled"))

    def with_given(self, given: GivenFrames | None) -> Condition:
        """The same prompts with frames that are known."""
        return replace(self, given=given)

    def hold(self, latents: Tensor) -> Tensor:
        """The latents `[B, C, F, H, W]` with the given frames in them, free of noise."""
        if self.given is None or self.given.held is None:
            return latents
        frames = self.given.held_frames
        latents = latents.clone()
        latents[:, :, frames] = self.given.held[:, :, frames].to(latents.dtype)
        return latents

    def at_rest(self, velocity: Tensor) -> Tensor:
        """The velocity `[B, C, F, H, W]` without that of given frames: they stay as they are."""
        if self.given is None or self.given.held is None:
            return velocity
        velocity = velocity.clone()
        velocity[:, :, self.given.held_frames] = 0
        return velocity

    def levels(self, sigma: Tensor) -> Tensor:
        """The noise levels `[B]` as they are or, where frames are given, one a latent frame: `[B, F]`, 0 for those."""
        if self.given is None or self.given.held is None:
            return sigma
        free = sigma.new_tensor([not is_held for is_held in self.given.is_held])
        return sigma[:, None] * free

    @staticmethod
    def cat(parts: Sequence[Condition]) -> Condition:
        """All prompts of all parts in one batch; shorter ones are padded with zero rows, which the mask skips.

        All parts have given frames of one kind, or none has.
        """
        length = max(part.embeds.shape[1] for part in parts)
        masks = [_pad_rows(part.mask, length) for part in parts if part.mask is not None]
        pooled = [part.pooled for part in parts if part.pooled is not None]
        return Condition(
            cat([_pad_rows(part.embeds, length) for part in parts]),
            cat(masks) if masks else None,
            cat(pooled) if pooled else None,
            _cat_given([part.given for part in parts if part.given is not None]),
        )


def _cat_given(parts: Sequence[GivenFrames]) -> GivenFrames | None:
    def joined(tensors: Sequence[Tensor | None]) -> Tensor | None:
        there = [tensor for tensor in tensors if tensor is not None]
        return cat(there) if there else None

    if not parts:
        return None
    held, channels, image = zip(*((part.held, part.channels, part.image) for part in parts), strict=True)
    return GivenFrames(joined(held), parts[0].is_held, joined(channels), joined(image))


def _pad_rows(rows: Tensor, length: int) -> Tensor:
    return (
        rows
        if rows.shape[1] == length
        else cat([rows, rows.new_zeros(len(rows), length - rows.shape[1], *rows.shape[2:])], dim=1)
    )


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

    def take(self, rows: Tensor) -> Trajectory:
        """The same of some clips, by their indices `[A]`."""
        predictions = None if self.predictions is None else self.predictions.take(rows)
        return Trajectory(self.sigmas, tuple(latents[rows] for latents in self.latents), self.nfe, predictions)


@dataclass(frozen=True)
class RewardScores:
    """Higher is better. `clip` is `[B]`, `frames` is `[B, T]` or None, `parts` are named `[B]` scores for the log."""

    clip: Tensor
    frames: Tensor | None = None
    parts: Mapping[str, Tensor] = field(default_factory=dict)

    def take(self, rows: Tensor) -> RewardScores:
        """The scores of some clips, by their indices `[A]`."""
        frames = None if self.frames is None else self.frames[rows]
        return RewardScores(self.clip[rows], frames, {name: part[rows] for name, part in self.parts.items()})


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
        asked: for each prompt, if the teacher is rolled out for it; None = for all.
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
    given: GivenFrames | None = None

    @property
    def asked_rows(self) -> tuple[int, ...]:
        """The clips whose teacher is asked."""
        asked = (True,) * len(self.prompts) if self.asked is None else self.asked
        return tuple(row for row, is_asked in enumerate(asked) if is_asked)

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
            given=None if self.given is None else self.given.map(lambda part: part[list(rows)]),
        )


VelocityFn = Callable[[Tensor, Tensor, Condition], Tensor]
"""`(latents [B, C, F, H, W], sigma [B], text) -> velocity [B, C, F, H, W]`: one call is one network evaluation."""

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

    def velocity(self, latents: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
        """Predicted `noise - x0`, `[B, C, F, H, W]`, at noise levels `sigma` `[B]`."""
        ...

    def decode(self, latents: Tensor, grad_frames: range | None = None) -> Tensor:
        """Pixels `[B, T, 3, height, width]` in [0, 1], differentiable.

        With `grad_frames` only the pixels of those latent frames carry gradient, and only to those frames; a VAE that
        decodes several at once widens them to whole chunks.
        """
        ...
