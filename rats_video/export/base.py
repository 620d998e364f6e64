"""The base of the forms of export, and the student that one of them writes."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from rats_video.assets import HUB, find_hub_id, is_embedded
from rats_video.backbones.base import PipelineBackbone
from rats_video.backbones.stock import StockCall
from rats_video.export.pictures import ExportPictures
from rats_video.inference.student import StudentCard
from rats_video.sound import Sound
from rats_video.types import FreshNoise

BASE = "base"  # folder of the base that an export brings along
FAST = "tokenizer.json"
PACKAGES = ("'diffusers>=0.42'", "'transformers>=5.22'", "accelerate")


@dataclass(frozen=True)
class Clips:
    """N clips, on the CPU.

    Args:
        videos: `[N, T, 3, height, width]` in [0, 1].
        latents: that they were decoded from, N first.
        sounds: of each, where they have one.
    """

    videos: Tensor
    latents: Tensor
    sounds: tuple[Sound, ...] = ()


@dataclass(frozen=True)
class ExportedStudent:
    """A student's facts, for checking and describing its export once its memory is freed.

    Args:
        card: how it must be sampled.
        base: folder of its base pipeline.
        run: name of the run that it is of.
        pipeline: class of that pipeline.
        networks: class of each denoising part.
        stock: the stock pipeline's call.
        sigmas: noise levels by number of steps.
        boundary: share of the noise below which the second of two experts makes the step; None without one.
        is_lora: True if it is an adapter on the base.
        prompts: N prompts of the clips that follow.
        noises: `[1, C, F, H, W]` each, on the CPU.
        clips: our sampler's, the latents as the stock pipeline lays them out; None where nothing is checked.
        makes: what its clips are.
        has_sound: whether they have sound.
        pictures: that the clips start from; None for text to video.
        fresh: what a re-noising sampler draws for each of the clips; empty for Euler.
        free: 1 where latents are sampled and 0 where a frame is given, laid out so; None where all are sampled.
    """

    card: StudentCard
    base: Path
    run: str
    pipeline: str
    networks: Mapping[str, str]
    stock: StockCall
    sigmas: Mapping[int, tuple[float, ...]]
    boundary: float | None
    is_lora: bool
    prompts: tuple[str, ...]
    noises: tuple[Tensor, ...]
    clips: Clips | None
    makes: Literal["video", "image"] = "video"
    has_sound: bool = False
    pictures: ExportPictures | None = None
    free: Tensor | None = None
    fresh: tuple[FreshNoise, ...] = ()

    @property
    def task(self) -> str:
        """As the hub calls it."""
        return f"text-to-{self.makes}" if self.pictures is None else f"image-to-{self.makes}"

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the denoiser."""
        dtype: torch.dtype = getattr(torch, self.card.dtype)
        return dtype

    @property
    def size(self) -> dict[str, int]:
        """`num_frames`, `height` and `width` of the training clips."""
        return {name: int(self.card.clip[name]) for name in ("num_frames", "height", "width")}

    @property
    def asked_size(self) -> dict[str, int]:
        """The same as the pipeline is asked for it: of an image without the number of frames."""
        return {name: size for name, size in self.size.items() if self.makes == "video" or name != "num_frames"}

    @property
    def base_id(self) -> str:
        """The base's name for others: its repository on the hub where its folder is called so, never a path of ours."""
        if hub := find_hub_id(self.card.model):
            return hub.repository
        name = Path(self.card.model).name or self.base.resolve().name  # `.` has none
        return next((repository for repository in HUB if repository.rpartition("/")[2] == name), name)

    @property
    def base_for_us(self) -> str:
        """The base for `rats.json`: `base_id`, at its commit where that is known."""
        return self.card.model if find_hub_id(self.card.model) else self.base_id

    @property
    def base_lora_note(self) -> str:
        """What the user of a LoRA alone must load under it; or nothing."""
        under = ", ".join(f"{Path(lora.path).name} at scale {lora.scale:g}" for lora in self.card.base_loras)
        return f"it was trained over {under}, which belongs under it" if under and self.is_lora else ""

    @property
    def file_stem(self) -> str:
        """A name for its files among those of other students: "Wan2.1-T2V-1.3B-Diffusers-2-4steps-mine"."""
        steps = "-".join(map(str, self.card.num_steps))
        return re.sub(r"[^\w.-]+", "-", f"{self.base_id.rpartition('/')[2]}-{steps}steps-{self.run}")

    @property
    def base_source(self) -> str:
        """Python of the base's place in a snippet whose `folder` is the export's."""
        if self.carries_base:
            return f'folder + "/{BASE}"'
        return repr(self.base_id if "/" in self.base_id else str(self.base))

    @property
    def carries_base(self) -> bool:
        """True if the base is embedded in our package: no other program can have it, so an export brings it along."""
        return is_embedded(self.card.model)

    @property
    def packages(self) -> tuple[str, ...]:
        """What a stock pipeline of it needs, beside what these bring along."""
        tokenizers = [folder for folder in self.base.glob("tokenizer*") if folder.is_dir()]
        slow = any((folder / "spiece.model").is_file() and not (folder / FAST).is_file() for folder in tokenizers)
        cleans = self.pipeline == "WanImageToVideoPipeline"  # it calls ftfy without asking if it is there
        further = {"sentencepiece": slow, "protobuf": slow, "ftfy": cleans, "av": self.has_sound}
        return PACKAGES + tuple(name for name, is_needed in further.items() if is_needed)


class Form(ABC):
    """A form of export; each is a subclass in a file of its own."""

    name: ClassVar[str]
    """The value of `--format`."""
    summary: ClassVar[str]
    """The files, for the card: "This is ..."."""
    relation: ClassVar[str | None] = None
    """The export to its base, as the hub names it; None = an adapter for a LoRA, otherwise finetuned."""
    tags: ClassVar[tuple[str, ...]] = ()
    """Tags of the card beside those of every export."""
    limits: ClassVar[tuple[str, ...]] = ()
    """Limits to state on the card beside those of every export."""
    packages: ClassVar[tuple[str, ...]] = ()
    """What its code needs beside the stock pipeline's packages."""
    loses: ClassVar[bool] = False
    """True if its clips are not the student's: several are made, and scored by the run's measures."""

    def check(  # noqa: B027  # optional
        self, student: Path, base: Path, family: type[PipelineBackbone], scale: float
    ) -> None:
        """Refuse, before anything is loaded, a student that has no such form.

        Args:
            student: its folder.
            base: folder of its base pipeline.
            family: that loads it.
            scale: how many times the student's difference from its base is to be taken.

        Raises:
            UserError: the student, its family or `scale` does not go with it.
        """

    @abstractmethod
    def write(self, student: PipelineBackbone, exported: ExportedStudent, folder: Path) -> None:
        """Write the files; the student is of no more use after it."""

    def finish(self, exported: ExportedStudent, folder: Path) -> list[str]:  # noqa: ARG002
        """Change the files once the student's memory is freed; returns lines for the card."""
        return []

    @abstractmethod
    def load(self, exported: ExportedStudent, device: torch.device, folder: Path) -> Any:
        """The export in the stock pipeline, afresh."""

    @abstractmethod
    def sampling(self, exported: ExportedStudent, name: str) -> str:
        """The card's section on how to sample an export called `name`."""

    def picture_prefix(self, exported: ExportedStudent) -> str:  # noqa: ARG002
        """What stands before the names of the example pictures, in the export's folder."""
        return ""

    @abstractmethod
    def programs(self, exported: ExportedStudent) -> str:
        """The programs that take its files, and those that do not, for the card."""

    def own_card(self, exported: ExportedStudent, folder: Path) -> StudentCard | None:  # noqa: ARG002
        """The card by which rats-video samples the export in `folder`; None where it cannot."""
        return replace(exported.card, model=exported.base_for_us)

    def install(self, exported: ExportedStudent) -> str:
        """The command that installs what its code needs; or nothing."""
        return f"pip install {' '.join((*exported.packages, *self.packages))}"

    def note(self, exported: ExportedStudent) -> str:
        """What its user must pass, because no file can carry it; or nothing."""
        return exported.stock.note

    def hints(self, exported: ExportedStudent) -> list[str]:  # noqa: ARG002
        """Lines to print after an export."""
        return []


def rescale(student: PipelineBackbone, base: PipelineBackbone, scale: float) -> None:
    """Take `scale` times the student's difference from its base: 0 is the base, 1 the student, in place."""
    if student.adapters is not None and student.role is not None:
        student.adapters.rescale(student.role, scale)
    else:
        origin = base.weights
        with torch.no_grad():
            for name, weight in student.weights.items():
                weight.copy_(torch.lerp(origin[name], weight, scale))
