"""A finished student and its run, for the commands that use them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from pydantic import ValidationError

from rats_video.assets import ASSETS, find_hub_id, is_embedded, pinned, resolve_folder
from rats_video.backbones.base import PipelineBackbone
from rats_video.backbones.kinds import BackboneConfig, load_backbone
from rats_video.backbones.lora import has_adapter
from rats_video.config.fields import ClipConfig
from rats_video.datasets.prompts.split import check_prompt
from rats_video.diffusion.guidance import scale_of
from rats_video.distillation.folder_settings import folder_settings
from rats_video.errors import UserError, warn
from rats_video.hub import CARD, INDEX, fetch
from rats_video.inference.plain import plain_card
from rats_video.inference.sampler import SamplerSpec
from rats_video.inference.small_gpu import offload
from rats_video.inference.student import ITSELF, StudentCard, load_card
from rats_video.inference.style import BaseLoraConfig, Style, add_style, base_styles
from rats_video.training.run_folder import RunFolder
from rats_video.types import ClipSpec

DEFAULT_STUDENT = "tiny-wan-student"
_WORDS = {2: "two", 3: "three", 4: "four"}


@dataclass(frozen=True)
class LoadedStudent:
    """A student and the base model it came from.

    Args:
        folder: the student's own.
        model: the base's.
        card: how it is sampled.
        base: the base model.
        student: the student, on the base or with a denoiser of its own.
        beside: what else its clips depend on: LoRAs, tiles, a negative prompt.
        negative_prompt: what guidance leads away from.
    """

    folder: Path
    model: Path
    card: StudentCard
    base: PipelineBackbone
    student: PipelineBackbone
    beside: tuple[object, ...] = ()
    negative_prompt: str = ""

    @property
    def clip(self) -> ClipSpec:
        """The size of its clips."""
        return clip_of(self.card)

    @property
    def is_plain(self) -> bool:
        """True for a pipeline that nobody distilled."""
        return not (self.folder / CARD).is_file()

    @property
    def default_nfe(self) -> int:
        """The calls to sample it with where nobody says: 4, or a plain pipeline's own."""
        return self.card.num_steps[0] * self.card.calls if self.is_plain else 4

    def spec(self, nfe: int) -> SamplerSpec:
        """The student's sampler at `nfe` calls; warns on stderr where it was trained for other counts.

        Raises:
            UserError: it is guided, which takes several calls a step, and `nfe` is no multiple of them.
        """
        if nfe % (calls := self.card.calls):
            fix = "give an even number" if calls == 2 else f"give a multiple of {calls}"
            raise UserError(f"guidance takes {_WORDS[calls]} calls a step", where=f"--nfe {nfe}", fix=fix)
        if nfe // calls not in self.card.num_steps:
            trained = ", ".join(str(calls * steps) for steps in self.card.num_steps)
            does = "this pipeline takes" if self.is_plain else "this student was trained for"
            warn(f"{does} {trained}; quality may drop", where=f"--nfe {nfe}")
        card = self.card
        return SamplerSpec(
            nfe // calls, card.shift, card.guidance_scale, self.negative_prompt, card.guidance_scale_2,
            card.further_guidance, card.sampler,
        )  # fmt: skip


@dataclass(frozen=True)
class SampleChoices:
    """What a user chooses of a model to be sampled; the defaults are the student as it was trained.

    Args:
        base: where the student's base pipeline is now.
        size: `num_frames`, `height`, `width` in place of those it was trained at.
        styles: LoRAs beside it.
        offload: True keeps its weights in host memory.
        tiles: True decodes in tiles.
        negative_prompt: what guidance leads away from.
        guidance_scale: in place of the model's own.
        guidance_scale_2: of the second expert, likewise.
    """

    base: Path | None = None
    size: Mapping[str, int] = field(default_factory=dict)
    styles: tuple[Style, ...] = ()
    offload: bool = False
    tiles: bool = False
    negative_prompt: str = ""
    guidance_scale: float | None = None
    guidance_scale_2: float | None = None

    def guided(self, card: StudentCard) -> StudentCard:
        """The card with the guidance chosen; raises UserError for a model that is sampled without."""
        asked = {
            "--guidance-scale": self.guidance_scale, "--guidance-scale-2": self.guidance_scale_2,
            "--negative-prompt": self.negative_prompt or None,
        }  # fmt: skip
        if card.guidance_scale == 1.0 and (named := next((n for n, value in asked.items() if value is not None), None)):
            what = "is for models that are sampled with guidance, and this one is not"
            raise UserError(what, where=named, fix="leave it out")
        first, second = self.guidance_scale or card.guidance_scale, self.guidance_scale_2 or card.guidance_scale_2
        return replace(card, guidance_scale=first, guidance_scale_2=second)


def find_student(given: str | Path, *, where: str = "--model") -> Path:
    """The folder of a model that a user names: an embedded one, a path, or a repository on the hub.

    Raises:
        UserError: the hub does not give it. A path may lead nowhere.
    """
    name = str(given)
    if is_embedded(name):
        return ASSETS / name
    hub = find_hub_id(name)
    return Path(name).expanduser() if hub is None else fetch(hub, where=where)


def locate_student(source: str, *, where: str) -> tuple[Path, Path]:
    """The run's folder and the student's; a student without a run counts as its own."""
    given = find_student(source, where=where)
    folder = given if (given / CARD).is_file() else given / "student"
    is_of_run = folder.name == "student" and RunFolder(folder.parent).config.is_file()
    return (folder.parent if is_of_run else folder), folder


def load_student(folder: Path, device: torch.device, base: Path | None = None) -> LoadedStudent:
    """Load a run's student, or a student folder itself; `base` is where its base pipeline is now.

    Raises:
        UserError: there is no student, or no base of its.
    """
    return load_chosen(folder, device, SampleChoices(base))


def load_chosen(folder: Path, device: torch.device, choices: SampleChoices) -> LoadedStudent:
    """Load a student, or a plain pipeline, as a user chose.

    Raises:
        UserError: there is none, or it does not go with what was chosen.
    """
    if not folder.exists():
        fix = "give a run, a student or a pipeline: a folder, or USER/NAME on the hub"
        raise UserError(f"no such folder: {folder}", where="--model", fix=fix)
    folder = folder if (folder / CARD).is_file() or (folder / INDEX).is_file() else folder / "student"
    is_plain = (folder / INDEX).is_file() and not (folder / CARD).is_file()
    card = plain_card(folder, "bfloat16" if device.type == "cuda" else "float32") if is_plain else load_card(folder)
    trained = with_base(card, folder, choices.base)
    card = choices.guided(with_size(trained, choices.size))
    is_whole = card.model == ITSELF
    model = folder if is_whole else resolve_folder(card.model, where="--base")
    first = torch.device("cpu") if choices.offload else device
    under = base_styles(card.base_loras, where=f"{folder / CARD}: base_loras")
    loaded = load_base(
        model, first, card.dtype, card.clip["fps"], card.embedded_guidance, card.backbone, card.base_loras
    )
    check_size(loaded, clip_of(card))
    check_guidance(loaded, card)
    if clip_of(card) != clip_of(trained) and not is_plain:
        before = "{num_frames:g} frames of {height:g} x {width:g}".format(**trained.clip)
        warn(f"this student was trained at {before}; quality may drop", where=_options(choices.size))
    if is_plain:
        card = replace(card, shift=own_shift(folder, loaded, clip_of(card)))
    is_lora = has_adapter(folder)
    student = loaded if is_whole or is_lora else loaded.load_role(folder)
    for style in choices.styles:
        add_style(student, style)
    student = loaded.load_role(folder) if is_lora else student
    if choices.tiles:
        student.use_tiles()
    if choices.offload:
        offload(student, device)
    beside = (*(style.identity for style in (*under, *choices.styles)), *(["tiles"] if choices.tiles else []))
    if choices.negative_prompt:
        check_prompt(choices.negative_prompt, loaded, where="--negative-prompt")
        beside = (*beside, f"negative prompt: {choices.negative_prompt}")
    return LoadedStudent(folder, model, card, loaded, student, beside, choices.negative_prompt)


def with_size(card: StudentCard, size: Mapping[str, int]) -> StudentCard:
    """The card with another clip size; raises UserError for clips that no machine could hold."""
    try:
        clip = ClipConfig.model_validate({**card.clip, **size})
    except ValidationError as error:
        reason = error.errors()[0]["msg"].removeprefix("Value error, ")
        raise UserError(f"too large: {reason}", where=_options(size), fix="give a smaller size") from error
    return replace(card, clip={key: float(value) for key, value in clip.model_dump().items()})


def check_size(base: PipelineBackbone, clip: ClipSpec) -> None:
    """Raise UserError, in the words of the options, for a clip size that the model cannot divide."""
    try:
        base.latent_shape(clip)
    except UserError as error:
        raise UserError(
            error.what, where=error.where.replace("clip.", "--").replace("_", "-"), fix=error.fix
        ) from error


def check_guidance(base: PipelineBackbone, card: StudentCard) -> None:
    """Raise UserError, in the words of the options, for a second scale where there is no second expert."""
    try:
        scale_of(base, card.guidance_scale, card.guidance_scale_2)
    except UserError as error:
        raise UserError(error.what, where="--guidance-scale-2", fix=error.fix) from error


def clip_of(card: StudentCard) -> ClipSpec:
    """The clip size of a card."""
    size = card.clip
    return ClipSpec(int(size["num_frames"]), int(size["height"]), int(size["width"]), size["fps"])


def own_shift(folder: Path, base: PipelineBackbone, clip: ClipSpec) -> float:
    """The shift that a pipeline's own scheduler states; raises UserError where it states none."""
    stated = folder_settings(folder, base, clip)
    if "shift" not in stated:
        raise UserError("states no shift of noise levels", where=f"{folder}/scheduler/scheduler_config.json",
                        fix='add one, as in "shift": 3.0')  # fmt: skip
    return stated["shift"]


def _options(size: Mapping[str, int]) -> str:
    return " ".join(f"--{key.replace('_', '-')} {value}" for key, value in size.items()) or "clip"


def with_base(card: StudentCard, folder: Path, base: Path | None) -> StudentCard:
    """The card with its base where it is now: as it says, or at `base`.

    Raises:
        UserError: it is not there, or the student in `folder` is a whole pipeline, which has no base.
    """
    if base is not None:
        if card.model == ITSELF:
            raise UserError(f"{folder} is a whole pipeline and needs no base", where="--base", fix="leave it out")
        found = resolve_folder(str(base), where="--base").resolve()
        is_name = is_embedded(str(base)) or find_hub_id(str(base)) is not None
        return replace(card, model=pinned(str(base), where="--base") if is_name else str(found))
    is_known = card.model == ITSELF or is_embedded(card.model) or find_hub_id(card.model) is not None
    if not is_known and not Path(card.model).expanduser().is_dir():
        raise UserError(
            f"no such folder: {card.model}", where=f"{folder / CARD}: model",
            fix="it is the student's base: where it has moved to, say --base DIR",
        )  # fmt: skip
    return card


def load_base(
    model: Path,
    device: torch.device,
    dtype: str,
    fps: float,
    embedded_guidance: float,
    kind: BackboneConfig,
    loras: Sequence[BaseLoraConfig] = (),
) -> PipelineBackbone:
    """A base model with its LoRAs, told the frames a second of its clips, and its guidance if that is an input."""
    styles = base_styles(loras, where="base_loras")
    base = load_backbone(model, device, getattr(torch, dtype), kind)
    base.fps, base.embedded_guidance = fps, embedded_guidance
    for style in styles:
        add_style(base, style, where="base_loras")
    return base
