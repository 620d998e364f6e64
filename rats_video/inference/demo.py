"""Clips for the demo page: one at a time, by the student or its teacher, from the same noise."""

from __future__ import annotations

import base64
import binascii
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

import torch

from rats_video.backbones.base import PipelineBackbone
from rats_video.datasets.prompts.split import check_prompt
from rats_video.datasets.video.pictures import read_sent_picture
from rats_video.errors import UserError
from rats_video.inference.sampler import SamplerSpec, clip_noise, fresh_noise, sample_batch, sound_of
from rats_video.inference.video import write_mp4
from rats_video.methods.scoring import score_pixels
from rats_video.types import ClipSpec, PromptChecker, Reward, SamplerKind

MAX_PROMPT = 500  # characters
MAX_SEED = 2**32 - 1
MAX_PICTURE = 2**23  # bytes of the file
TOO_LARGE = "too large"  # what the page sends in the place of a larger one
Role = Literal["student", "teacher"]


@dataclass(frozen=True)
class DemoRequest:
    """A visitor's request, within bounds; `picture` is a file's bytes."""

    prompt: str
    nfe: int
    seed: int
    picture: bytes | None = None


@dataclass(frozen=True)
class DemoClip:
    """A clip as an mp4 file's bytes, what it cost, the reward's score where there is a reward, whether it has sound."""

    role: Role
    mp4: bytes
    num_steps: int
    nfe: int
    seconds: float
    reward: float | None
    has_sound: bool = False


@dataclass(frozen=True)
class DemoModels:
    """A student beside its teacher.

    Args:
        student: the distilled model.
        base: the model it came from, which with many guided steps is its teacher.
        clip: size of the clips.
        shift: of the student's sigma grid.
        trained: NFE the student was trained for.
        teacher: how the teacher is sampled.
        reward: what scores the clips, if anything does.
        sampler: how the student steps.
    """

    student: PipelineBackbone
    base: PipelineBackbone
    clip: ClipSpec
    shift: float
    trained: tuple[int, ...]
    teacher: SamplerSpec
    reward: Reward | None
    sampler: SamplerKind = "euler"

    @property
    def nfe_range(self) -> tuple[int, int]:
        """Fewest and most network evaluations of the student: 3 to 8, and what it was trained for."""
        return min(3, *self.trained), max(8, *self.trained)

    @property
    def takes_pictures(self) -> bool:
        """True if clips may start from a picture."""
        return self.student.pictures != "none"

    def accept(self, prompt: object, nfe: object, seed: object, picture: object = None) -> DemoRequest:
        """A browser's request, if it is within bounds; nothing is taken for granted.

        Raises:
            UserError: it is not, or the model cannot follow the prompt.
        """
        if not isinstance(prompt, str):
            raise UserError("the prompt must be text")
        prompt = " ".join(prompt.split())
        if len(prompt) > MAX_PROMPT:
            raise UserError(f"the prompt has {len(prompt)} characters, {MAX_PROMPT} at most")
        wish = DemoRequest(
            prompt,
            _whole("the number of calls", nfe, *self.nfe_range),
            _whole("the seed", seed, 0, MAX_SEED),
            self._accept_picture(picture),
        )
        check_prompt(prompt, self.student, where="")
        if lost := self.student.truncation_note(prompt):
            raise UserError(f"the prompt is {lost}")
        if isinstance(self.reward, PromptChecker):
            self.reward.check_prompts([prompt])
        return wish

    def _accept_picture(self, picture: object) -> bytes | None:
        """The bytes of a data URL, once they were read as a picture."""
        if not picture:
            if self.student.pictures == "needed":
                raise UserError("this model makes videos from a picture: choose one")
            return None
        if not self.takes_pictures:
            raise UserError("this model makes videos from text alone")
        if picture == TOO_LARGE or (isinstance(picture, str) and len(picture) > 4 * MAX_PICTURE // 3 + 100):
            raise UserError(f"the picture has more than {MAX_PICTURE // 2**20} MiB", fix="make it smaller")
        if not isinstance(picture, str) or ";base64," not in picture[:100]:
            raise UserError("the picture must be a file")
        try:
            sent = base64.b64decode(picture.partition(";base64,")[2], validate=True)
        except (binascii.Error, ValueError) as error:
            raise UserError("the picture must be a file") from error
        _fitted(sent, self.clip)
        return sent

    def spec(self, role: Role, nfe: int) -> SamplerSpec:
        """The sampler of a role."""
        return self.teacher if role == "teacher" else SamplerSpec(nfe, self.shift, sampler=self.sampler)

    @torch.no_grad()
    def make(self, role: Role, wish: DemoRequest, advance: Callable[[], None]) -> DemoClip:
        """Make a clip; `advance` is called before every solver step. No file of it stays."""
        backbone = self.base if role == "teacher" else self.student
        spec = self.spec(role, wish.nfe)
        began = time.perf_counter()
        noise = clip_noise(self.base, self.clip, wish.seed, 0)
        first = None if wish.picture is None else _fitted(wish.picture, self.clip)[None]
        given = None if first is None else backbone.given_frames(self.clip, first)
        fresh = fresh_noise(noise, [(wish.seed, 0)])
        videos, latents = sample_batch(backbone, [wish.prompt], noise, spec, advance, given, fresh)
        sound = sound_of(backbone, latents)
        seconds = time.perf_counter() - began
        score = None if self.reward is None else float(score_pixels(self.reward, videos, [wish.prompt], sound).clip)
        with tempfile.TemporaryDirectory(prefix="rats-video-") as folder:
            path = Path(folder) / "clip.mp4"
            write_mp4(videos[0].cpu(), path, fps=self.clip.fps, sound=sound)
            return DemoClip(role, path.read_bytes(), spec.num_steps, spec.nfe, seconds, score, sound is not None)


def _whole(name: str, value: object, low: int, high: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high or value % 1:
        raise UserError(f"{name} must be a whole number from {low} to {high}")
    return int(value)


_fitted = lru_cache(maxsize=4)(read_sent_picture)  # decoded once for the check and for both roles
