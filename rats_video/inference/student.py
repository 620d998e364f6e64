"""The student as an artifact: a denoiser and the card that says how it must be sampled."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter

from rats_video.backbones.base import PipelineBackbone
from rats_video.backbones.kinds import AUTO, BackboneConfig
from rats_video.config.fields import ClipConfig, NonNegativeInt, PositiveFloat, Seed, SolverSteps
from rats_video.config.guidance import AudioVideoGuidance
from rats_video.errors import UserError
from rats_video.files import replacing, write_json
from rats_video.hub import CARD
from rats_video.inference.style import BaseLoraConfig
from rats_video.reading import DAMAGED, read_json
from rats_video.types import SamplerKind, guided_calls

ITSELF = "."  # as a card's model
EULER: SamplerKind = "euler"
_RARE: Mapping[str, object] = {"guidance_scale_2": None, "first_frame": False, "sampler": EULER}
_KINDS = ("backbone", "base_loras", "further_guidance")


@dataclass(frozen=True)
class StudentCard:
    """The settings a student must be sampled with: wrong sigmas ruin a few-step model, so they travel with it.

    Args:
        model: the base pipeline, by embedded name or path; `.` where the student's own folder is a whole pipeline.
        num_steps: step counts it was trained for.
        shift: of its sigma grid.
        clip: frames, height, width and fps it was trained at.
        steps: optimizer steps of its training.
        seed: of its training.
        embedded_guidance: scale its calls were told in training, for models that take it as an input.
        dtype: the base's precision in training.
        guidance_scale: with which it is sampled; 1 = off, as all but teachers are.
        backbone: the family that loads the base; written only if it is the user's own.
        guidance_scale_2: of the second expert, where it has a scale of its own; written only then.
        first_frame: True if it was trained on clips that start from pictures; written only then.
        base_loras: LoRAs that are part of the base; written only if there are any.
        further_guidance: of LTX-2, beside the scale of the text; written only then.
        sampler: how it steps; written only if it re-noises.
    """

    model: str
    num_steps: Annotated[tuple[SolverSteps, ...], Field(min_length=1)]
    shift: PositiveFloat
    clip: dict[str, float]
    steps: NonNegativeInt
    seed: Seed
    embedded_guidance: PositiveFloat = 6.0
    dtype: Literal["float32", "bfloat16"] = "float32"
    guidance_scale: PositiveFloat = 1.0
    backbone: BackboneConfig = AUTO
    guidance_scale_2: PositiveFloat | None = None
    first_frame: bool = False
    base_loras: tuple[BaseLoraConfig, ...] = ()
    further_guidance: AudioVideoGuidance | None = None
    sampler: SamplerKind = EULER

    @property
    def calls(self) -> int:
        """Network evaluations of one of its steps, a clip."""
        return guided_calls(self.guidance_scale, self.further_guidance)

    def as_json(self) -> dict[str, Any]:
        """The card as `rats.json` holds it."""
        content = {name: getattr(self, name) for name in self.__dataclass_fields__ if name not in _KINDS}
        for name, usual in _RARE.items():
            if content[name] == usual:
                del content[name]
        if self.backbone != AUTO:
            content["backbone"] = self.backbone.model_dump(mode="json")
        if self.base_loras:
            content["base_loras"] = [lora.model_dump(mode="json") for lora in self.base_loras]
        if self.further_guidance is not None:
            content["further_guidance"] = self.further_guidance.model_dump(mode="json")
        return content


_CARD = TypeAdapter(StudentCard)


def save_student(student: PipelineBackbone, card: StudentCard, folder: Path) -> None:
    """Write the student's denoiser or LoRA file and the card with its noise levels, whole or not at all."""
    sigmas = {steps: student.sigmas(steps, card.shift).tolist() for steps in card.num_steps}
    with replacing(folder, "student") as aside:
        student.save_role(aside)
        write_card(card, sigmas, aside)


def write_card(card: StudentCard, sigmas: Mapping[int, Sequence[float]], folder: Path) -> None:
    """Write the card, with the noise levels of each number of steps."""
    levels = {str(steps): list(each) for steps, each in sigmas.items()}
    write_json(folder / CARD, {**card.as_json(), "sigmas": levels})


def load_card(folder: Path) -> StudentCard:
    """Read a student's card; raises UserError where there is none."""
    try:
        content = read_json(folder / CARD)
        ClipConfig.model_validate(content["clip"])
        return _CARD.validate_python(content)
    except DAMAGED as error:
        raise UserError(
            f"no student here: {CARD} is missing or unreadable", where=str(folder),
            fix="give the folder of a finished `rats-video distill`",
        ) from error  # fmt: skip
