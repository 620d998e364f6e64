"""Clips of a batch of requests, and the pictures that they start from: looked at before anything is made."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path

import torch
from torch import Tensor

from rats_video.commands.students import LoadedStudent
from rats_video.condition import GivenFrames
from rats_video.datasets.video.pictures import find_picture, picture_digest, read_picture
from rats_video.errors import UserError, warn
from rats_video.inference.requests import Request
from rats_video.inference.sampler import SamplerSpec, clip_noise, fresh_noise, sample_batch, sound_of
from rats_video.sound import Sound

_KEPT = 64  # pictures between the check of a request and its batch


class Pictures:
    """The pictures of a student's clips.

    Args:
        loaded: the student.
        prompts_file: the list whose rows name them, from its own folder; None: `--image` does.
    """

    def __init__(self, loaded: LoadedStudent, prompts_file: Path | None) -> None:
        self._loaded, self._list = loaded, prompts_file
        self._digests: dict[str, str] = {}
        self._fitted = lru_cache(_KEPT)(partial(read_picture, clip=loaded.clip))
        self.refused: list[UserError] = []  # what was wrong with the requests that `usable` left out

    def usable(self, requests: Sequence[Request]) -> list[Request]:
        """The requests whose pictures can be read; of a list the others are warned of and left out.

        A table of images has prompts for a model that takes no picture, too: there the pictures do without.

        Raises:
            UserError: one that the command line names cannot.
        """
        found = []
        model = self._loaded.student
        if self._list is not None and model.pictures == "none" and any(request.image for request in requests):
            warn(
                f"this {model.family} makes {model.makes}s from text alone, so no picture is used",
                where=str(self._list),
            )
            requests = [replace(request, image=None, last_image=None) for request in requests]
        for request in requests:
            try:
                self.check(request)
                found.append(request)
            except UserError as error:
                if self._list is None:
                    raise
                self.refused.append(error)
                warn(str(error))
        return found

    def check(self, request: Request) -> None:
        """Refuse a request whose picture is missing, too many or cannot be read; raises UserError."""
        model, family = self._loaded.student, self._loaded.student.family
        if request.image is None:
            if request.last_image is not None:
                raise UserError("a last picture needs a first one", where=self._where(request, "last_image"))
            if model.pictures == "needed":
                what = f"this {family} makes videos from a picture, and none is given"
                raise UserError(what, where=self._where(request, "image"), fix="name a picture")
            return
        if model.pictures == "none":
            what = f"this {family} makes {model.makes}s from text alone"
            raise UserError(what, where=self._where(request, "image"), fix="leave the picture out")
        if request.last_image is not None and not model.takes_last_picture:
            what = f"this {family} takes a first picture alone"
            raise UserError(what, where=self._where(request, "last_image"), fix="leave it out")
        for kind in ("image", "last_image"):
            if getattr(request, kind) is not None:
                self._read(request, kind)

    def give(self, requests: Sequence[Request]) -> GivenFrames | None:
        """What the model is told of the clips, of which all start from pictures or none does."""
        first, last = (
            torch.stack([self._read(request, kind) for request in requests]) if getattr(requests[0], kind) else None
            for kind in ("image", "last_image")
        )
        return None if first is None else self._loaded.student.given_frames(self._loaded.clip, first, last)

    def digests(self, request: Request) -> dict[str, str | None]:
        """What tells the pictures' bytes from others, for the manifest."""
        return {kind: self._digest(request, kind) for kind in ("image", "last_image")}

    def _digest(self, request: Request, kind: str) -> str | None:
        name: str | None = getattr(request, kind)
        if name is None:
            return None
        if name not in self._digests:
            self._digests[name] = picture_digest(self._path(request, kind))
        return self._digests[name]

    def _read(self, request: Request, kind: str) -> Tensor:
        return self._fitted(self._path(request, kind), where=self._where(request, kind))

    def _path(self, request: Request, kind: str) -> Path:
        name = str(getattr(request, kind))
        if self._list is None:
            return Path(name).expanduser()
        return find_picture(name, self._list.parent, where=self._where(request, kind))

    def _where(self, request: Request, kind: str) -> str:
        option = f"--{kind.replace('_', '-')}"
        return option if self._list is None else f"{self._list}, row {request.index + 1}: {kind}"


def make_clips(
    loaded: LoadedStudent, requests: Sequence[Request], spec: SamplerSpec, pictures: Pictures
) -> tuple[Tensor, Sound | None]:
    """Clips `[B, T, 3, H, W]` in [0, 1] of requests with the same kind of picture, sampled together; their sound."""
    noise = torch.cat([clip_noise(loaded.student, loaded.clip, each.seed, each.noise) for each in requests])
    prompts, given = [each.prompt for each in requests], pictures.give(requests)
    fresh = fresh_noise(noise, [(each.seed, each.noise) for each in requests])
    videos, latents = sample_batch(loaded.student, prompts, noise, spec, given=given, fresh=fresh)
    return videos, sound_of(loaded.student, latents)
