"""A finished student, its run and its prompts, for the commands that use them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from rats_video.assets import is_embedded, resolve_folder
from rats_video.backbones.base import PipelineBackbone
from rats_video.backbones.kinds import BackboneConfig, load_backbone
from rats_video.config.load import load_config
from rats_video.datasets.prompts.files import read_prompts
from rats_video.datasets.prompts.split import check_prompt
from rats_video.distillation.settings import DistillConfig
from rats_video.errors import UserError, warn
from rats_video.inference.sampler import SamplerSpec
from rats_video.inference.student import CARD, ITSELF, StudentCard, load_card
from rats_video.training.run_folder import RunFolder
from rats_video.types import ClipSpec

DEFAULT_STUDENT = "tiny-wan-student"
EXAMPLE_PROMPTS = (
    "a fast red circle moving left on a gray background",
    "a slow blue square moving up on a white background",
    "a fast yellow triangle moving right on a black background",
)


@dataclass(frozen=True)
class LoadedStudent:
    """A student and the base model it came from.

    Args:
        folder: the student's own.
        model: the base's.
        card: how it is sampled.
        base: the base model.
        student: the student, on the base or with a denoiser of its own.
    """

    folder: Path
    model: Path
    card: StudentCard
    base: PipelineBackbone
    student: PipelineBackbone

    @property
    def clip(self) -> ClipSpec:
        """The clip size it was trained at."""
        size = self.card.clip
        return ClipSpec(int(size["num_frames"]), int(size["height"]), int(size["width"]), size["fps"])

    def spec(self, nfe: int) -> SamplerSpec:
        """The student's sampler at `nfe` calls; warns on stderr where it was trained for other counts.

        Raises:
            UserError: it is guided, which takes two calls a step, and `nfe` is odd.
        """
        calls = 1 if self.card.guidance_scale == 1.0 else 2
        if nfe % calls:
            raise UserError("guidance takes two calls a step", where=f"--nfe {nfe}", fix="give an even number")
        if nfe // calls not in self.card.num_steps:
            trained = ", ".join(str(calls * steps) for steps in self.card.num_steps)
            warn(f"this student was trained for {trained}; quality may drop", where=f"--nfe {nfe}")
        return SamplerSpec(nfe // calls, self.card.shift, self.card.guidance_scale)


def load_student(folder: Path, device: torch.device, base: Path | None = None) -> LoadedStudent:
    """Load a run's student, or a student folder itself; `base` is where its base pipeline is now.

    Raises:
        UserError: there is no student, or no base of its.
    """
    folder = folder if (folder / CARD).is_file() else folder / "student"
    card = with_base(load_card(folder), folder, base)
    is_whole = card.model == ITSELF
    model = folder if is_whole else resolve_folder(card.model, where="--base")
    loaded = load_base(model, device, card.dtype, card.clip["fps"], card.embedded_guidance, card.backbone)
    return LoadedStudent(folder, model, card, loaded, loaded if is_whole else loaded.load_role(folder))


def with_base(card: StudentCard, folder: Path, base: Path | None) -> StudentCard:
    """The card with its base where it is now: as it says, or at `base`.

    Raises:
        UserError: it is not there, or the student in `folder` is a whole pipeline, which has no base.
    """
    if base is not None:
        if card.model == ITSELF:
            raise UserError(f"{folder} is a whole pipeline and needs no base", where="--base", fix="leave it out")
        found = resolve_folder(str(base), where="--base").resolve()
        return replace(card, model=str(base) if is_embedded(str(base)) else str(found))
    if card.model != ITSELF and not is_embedded(card.model) and not Path(card.model).expanduser().is_dir():
        raise UserError(
            f"no such folder: {card.model}", where=f"{folder / CARD}: model",
            fix="it is the student's base: where it has moved to, say --base DIR",
        )  # fmt: skip
    return card


def load_base(
    model: Path, device: torch.device, dtype: str, fps: float, embedded_guidance: float, kind: BackboneConfig
) -> PipelineBackbone:
    """A base model that is told the frames a second of its clips, and its guidance if it takes that as an input."""
    base = load_backbone(model, device, getattr(torch, dtype), kind)
    base.fps, base.embedded_guidance = fps, embedded_guidance
    return base


def load_run(folder: Path) -> tuple[RunFolder, DistillConfig]:
    """A finished run and its configuration; raises UserError if the folder is none."""
    run = RunFolder(folder)
    if not run.config.is_file():
        raise UserError(
            "not a run: it has no config.resolved.yaml",
            where=str(folder),
            fix="give the folder of a `rats-video distill`",
        )
    run.check_entries()
    return run, load_config(DistillConfig, str(run.config.resolve()), group="distill")


def checked_prompts(
    given: Sequence[str], file: Path | None, fallback: Sequence[str], backbone: PipelineBackbone
) -> list[str]:
    """The prompts given, those of the file, or else the fallback; refuses prompts that the model cannot follow."""
    prompts = list(given) or (list(read_prompts(file)) if file else list(fallback))
    for prompt in prompts:
        check_prompt(prompt, backbone.unknown_words)
    return prompts


def cycle(prompts: Sequence[str], count: int | None) -> list[str]:
    """`count` prompts, taken in turn; None takes each once."""
    return [prompts[i % len(prompts)] for i in range(len(prompts) if count is None else count)]
