"""The clips that an export is compared by, and the pictures that those of image to video start from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rats_video.backbones.stock import StockCall, renoising
from rats_video.commands.students import LoadedStudent
from rats_video.datasets.prompts.settings import ShapesPromptsConfig
from rats_video.distillation.pictures import first_frames
from rats_video.distillation.settings import DistillConfig
from rats_video.errors import UserError, warn
from rats_video.export.base import Clips
from rats_video.export.pictures import (
    ExportPictures,
    in_eight_bits,
    plain_picture,
    plain_pictures,
    starts_from_pictures,
)
from rats_video.inference.sampler import SamplerSpec, clip_noise, draw_pictures, fresh_noise, sample_videos
from rats_video.training.batches import encode_pictures
from rats_video.types import FreshNoise

SEED = 0


@dataclass(frozen=True)
class ComparedClips:
    """What the stock pipeline is given, and our sampler's clips; see `ExportedStudent`."""

    stock: StockCall
    pipeline: str
    noises: tuple[Tensor, ...]
    clips: Clips | None
    pictures: ExportPictures | None
    free: Tensor | None
    fresh: tuple[FreshNoise, ...] = ()


def make_clips(
    loaded: LoadedStudent, cfg: DistillConfig | None, prompts: Sequence[str], spec: SamplerSpec, *, verify: bool
) -> ComparedClips:
    """A clip of each prompt; none but what they start from where nothing is to be compared."""
    student, pictures = loaded.student, _pictures(loaded, cfg, prompts)
    stock, pipeline = student.stock_call(spec.num_steps, spec.shift), student.pipelines[0]
    noises, free = torch.cat([clip_noise(student, loaded.clip, SEED, i) for i in range(len(prompts))]), None
    if pictures is not None:
        stock, pipeline = student.picture_call(stock), student.picture_pipeline
        given = encode_pictures(student, loaded.clip, pictures.first, pictures.last)
        free = (stock.seen or stock.latents)(given.free(noises[:1])).cpu()
        noises = given.hold(noises)
    fresh: tuple[FreshNoise, ...] = ()
    if spec.sampler == "cps":
        raise UserError(
            "no scheduler of diffusers or ComfyUI makes its steps", where="student.sampler=cps",
            fix="sample it with rats-video, or distill with student.sampler=euler or renoise",
        )  # fmt: skip
    if spec.sampler == "renoise":
        stock = renoising(stock, pipeline, student.sigmas(spec.num_steps, spec.shift).tolist(), spec.shift)
        fresh = tuple(fresh_noise(noise.cpu(), [(SEED, i)]) for i, noise in enumerate(noises.split(1)))
    clips = None
    if verify:
        samples = list(sample_videos(student, prompts, loaded.clip, spec, seed=SEED, batch_size=1))
        lay_out = stock.seen or stock.latents
        latents = torch.cat([lay_out(each.latents).cpu() for each in samples])
        videos = torch.cat([each.videos.cpu() for each in samples])
        sounds = tuple(sound for each in samples if (sound := each.heard(0)) is not None)
        clips = Clips(videos, latents if free is None else latents * free, sounds)
    return ComparedClips(stock, pipeline, noises.cpu().split(1), clips, pictures, free, fresh)


def _pictures(loaded: LoadedStudent, cfg: DistillConfig | None, prompts: Sequence[str]) -> ExportPictures | None:
    """What the clips start from: the run's own pictures where they are at hand, else a plain one."""
    student, clip = loaded.student, loaded.clip
    if not starts_from_pictures(student, loaded.card):
        return None
    own = None
    if cfg is not None:
        try:
            own = first_frames(cfg, student)
        except UserError as error:  # the list or the cache is gone; the student is still what it is
            warn(f"compared from a plain picture: {error}")
    student.first_frames = in_eight_bits(own or plain_pictures(student, clip))
    drawn = [draw_pictures(student, [prompt], SEED, [index]) for index, prompt in enumerate(prompts)]
    first, last = zip(*filter(None, drawn), strict=True)
    is_rendered = own is not None and cfg is not None and isinstance(cfg.prompts, ShapesPromptsConfig)
    return ExportPictures(
        torch.cat(first).cpu(),
        None if last[0] is None else torch.cat(last).cpu(),
        first[0][0].cpu() if is_rendered else plain_picture(clip),
    )
