"""Prompts to clips, with exactly the network calls that were asked for."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rats_video.condition import Condition, GivenFrames
from rats_video.config.guidance import AudioVideoGuidance
from rats_video.diffusion.flow import FRESH_SHARES
from rats_video.diffusion.guidance import scale_of
from rats_video.diffusion.rollout import rollout
from rats_video.seeds import seeded
from rats_video.sound import Sound
from rats_video.types import Backbone, ClipSpec, FreshNoise, SamplerKind, guided_calls


@dataclass(frozen=True)
class SamplerSpec:
    """Settings of sampling: solver steps, grid shift, guidance (1 = off), and what guidance leads away from.

    `guidance_scale_2` is the second expert's, of a model that has two; None = the same. `further` is what the family is
    guided by beside the text. `sampler` is how it steps.
    """

    num_steps: int
    shift: float
    guidance_scale: float = 1.0
    negative_prompt: str = ""
    guidance_scale_2: float | None = None
    further: AudioVideoGuidance | None = None
    sampler: SamplerKind = "euler"

    @property
    def nfe(self) -> int:
        """Network evaluations a clip: guidance doubles them, or more."""
        return self.num_steps * guided_calls(self.guidance_scale, self.further)


@dataclass(frozen=True)
class Samples:
    """Clips and what making them took.

    Args:
        videos: `[B, T, 3, height, width]` in [0, 1].
        latents: `[B, C, F, H, W]`.
        prompts: B.
        indices: which clips of all they are.
        seconds_per_clip: of wall time.
        seconds_in_calls: of wall time, for all B clips' network calls.
        first: the pictures `[B, 3, height, width]` in [0, 1] that they start from, if any.
        sound: of the clips, where they have one.
    """

    videos: Tensor
    latents: Tensor
    prompts: tuple[str, ...]
    indices: tuple[int, ...]
    seconds_per_clip: float
    seconds_in_calls: float
    first: Tensor | None = None
    sound: Sound | None = None

    def heard(self, row: int) -> Sound | None:
        """The sound of one of them, in host memory."""
        return None if self.sound is None else self.sound.one(row)


def clip_noise(backbone: Backbone, clip: ClipSpec, seed: int, index: int) -> Tensor:
    """Starting noise `[1, C, F, H, W]` of the `index`-th clip: the same for every model, batch size and machine."""
    return backbone.sample_noise(1, clip, seeded(seed, 2, index))


def fresh_noise(noise: Tensor, clips: Sequence[tuple[int, int]]) -> FreshNoise:
    """What a re-noising sampler draws on the way, like the starting `noise` `[B, C, F, H, W]`.

    It depends on the seed and index of each of the B `clips`, and on the step, alone.
    """

    def draw(step: int) -> Tensor:
        own = [torch.randn(noise.shape[1:], generator=seeded(seed, 2, index, step)) for seed, index in clips]
        return torch.stack(own).to(noise)

    return draw


def picture_seed(seed: int, index: int) -> int:
    """The seed of the picture that the `index`-th clip starts from, likewise."""
    return int(torch.randint(2**62, (1,), generator=seeded(seed, 7, index)))


def draw_pictures(
    backbone: Backbone, prompts: Sequence[str], seed: int, indices: Sequence[int]
) -> tuple[Tensor, Tensor | None] | None:
    """The first and last pictures of clips of these indices; None where clips are made from text alone."""
    if backbone.first_frames is None:
        return None
    return backbone.first_frames(prompts, [picture_seed(seed, index) for index in indices])


@torch.no_grad()
def sample_batch(
    backbone: Backbone,
    prompts: Sequence[str],
    noise: Tensor,
    spec: SamplerSpec,
    advance: Callable[[], None] = lambda: None,
    given: GivenFrames | None = None,
    fresh: FreshNoise | None = None,
) -> tuple[Tensor, Tensor]:
    """Clips `[B, T, 3, height, width]` in [0, 1] and latents of B prompts, from `noise` `[B, C, F, H, W]`.

    `advance` is called before every solver step; what it raises ends the sampling. `given` are the frames that they
    start from, `fresh` what a re-noising sampler draws (`fresh_noise`).
    """
    videos, latents, _ = timed_batch(backbone, prompts, noise, spec, advance, given, fresh)
    return videos, latents


@torch.no_grad()
def sound_of(backbone: Backbone, latents: Tensor) -> Sound | None:
    """The sound of sampled clips, or None of a family whose clips have none."""
    return backbone.decode_sound(latents)


@torch.no_grad()
def timed_batch(
    backbone: Backbone,
    prompts: Sequence[str],
    noise: Tensor,
    spec: SamplerSpec,
    advance: Callable[[], None] = lambda: None,
    given: GivenFrames | None = None,
    fresh: FreshNoise | None = None,
) -> tuple[Tensor, Tensor, tuple[float, float, float]]:
    """As `sample_batch`, and the wall seconds of text, denoiser and decoder; a GPU is waited for after each."""
    draws = spec.sampler != "euler"
    assert fresh is not None or not draws, f"{spec.sampler} needs fresh noise"
    times = [time.perf_counter()]

    def lap() -> None:
        if noise.is_cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter())

    def velocity(latents: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
        advance()
        return backbone.velocity(latents, sigma, condition)

    text = backbone.encode_text(prompts).with_given(given)
    negative = None if spec.guidance_scale == 1.0 else backbone.encode_text([spec.negative_prompt])
    lap()
    path = rollout(
        velocity,
        noise,
        backbone.sigmas(spec.num_steps, spec.shift),
        text,
        negative=negative,
        guidance_scale=scale_of(backbone, spec.guidance_scale, spec.guidance_scale_2),
        guide=backbone.guidance(spec.further),
        fresh=fresh if draws else None,
        share=FRESH_SHARES[spec.sampler],
    )
    lap()
    videos = backbone.decode(path.x0)
    lap()
    return videos, path.x0, (times[1] - times[0], times[2] - times[1], times[3] - times[2])


def sample_videos(
    backbone: Backbone,
    prompts: Sequence[str],
    clip: ClipSpec,
    spec: SamplerSpec,
    *,
    seed: int,
    batch_size: int = 16,
    share: Sequence[int] | None = None,
) -> Iterator[Samples]:
    """Sample one clip a prompt, a batch at a time; clip i starts from the i-th noise of the seed, and picture if any.

    With `share` only the clips of those indices, the same ones as without it.
    """
    share = range(len(prompts)) if share is None else share
    for start in range(0, len(share), batch_size):
        indices = tuple(share[start : start + batch_size])
        batch = tuple(prompts[i] for i in indices)
        began = time.perf_counter()
        noise = torch.cat([clip_noise(backbone, clip, seed, i) for i in indices])
        fresh = fresh_noise(noise, [(seed, index) for index in indices])
        pictures = draw_pictures(backbone, batch, seed, indices)
        given = None if pictures is None else backbone.given_frames(clip, *pictures)
        videos, latents, (_, in_calls, _) = timed_batch(backbone, batch, noise, spec, given=given, fresh=fresh)
        seconds = (time.perf_counter() - began) / len(batch)
        first, sound = None if pictures is None else pictures[0], sound_of(backbone, latents)
        yield Samples(videos, latents, batch, indices, seconds, in_calls, first, sound)
