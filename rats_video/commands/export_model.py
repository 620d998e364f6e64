"""`export model`: the student in a form that other programs load, checked with their own code before it appears."""

from __future__ import annotations

import gc
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError

from rats_video.assets import is_embedded, resolve_folder
from rats_video.backbones.folder import read_index
from rats_video.backbones.kinds import FAMILIES
from rats_video.backbones.lora import LORA_FILE
from rats_video.backbones.wan_paths import PathWanBackbone
from rats_video.commands.device import explain_memory, pick_device
from rats_video.commands.folders import check_free
from rats_video.commands.students import load_run, load_student
from rats_video.config.load import load_config
from rats_video.datasets.prompts.split import load_prompts
from rats_video.distillation.measures import build_measures
from rats_video.distillation.settings import DistillConfig
from rats_video.errors import UserError, first_line, warn
from rats_video.export.base import ExportedStudent, base_id
from rats_video.export.card import model_card, read_training
from rats_video.export.comfyui import check_family, load_comfyui, sigma_string, write_comfyui
from rats_video.export.diffusers import write_pipeline
from rats_video.export.lora import header, load_lora, write_lora
from rats_video.export.merged import load_merged, rescale, write_merged
from rats_video.export.quality import loss_table, score
from rats_video.export.quantized import check_torchao, quantize
from rats_video.export.recipe import stock_call
from rats_video.export.stock import open_pipeline, quiet, sample_stock
from rats_video.export.verify import Difference, check
from rats_video.files import replacing
from rats_video.inference.sampler import clip_noise, sample_videos
from rats_video.inference.student import CARD, StudentCard, load_card
from rats_video.motion_path import split_path
from rats_video.training.run_folder import RunFolder

Format = Literal["diffusers", "lora", "comfyui", "merged", "int8", "fp8"]
QUANTIZED = ("int8", "fp8")
SEED = 0
_PROMPT = "a fast red circle moving left on a gray background"  # where no run says what its model is for


@dataclass(frozen=True)
class ExportRequest:
    """What is asked for.

    Args:
        kind: the format.
        source: a run, a student's folder, or an embedded student's name.
        scale: how much of the student's difference from its base is taken.
        nfe: calls of the clips that are compared and of the card's code; None = 4, or else the first trained for.
        num_clips: held-out clips on which the loss by quantising is measured.
        verify: whether to compare at all.
        output: folder to appear; None = beside the run, or in `exports/`.
        overwrite: whether to replace what is there.
    """

    kind: Format
    source: str
    scale: float = 1.0
    nfe: int | None = None
    num_clips: int = 8
    verify: bool = True
    output: Path | None = None
    overwrite: bool = False


def run_export_model(order: ExportRequest, device: str) -> list[str]:
    """Write the export, compare it, describe it; returns the lines to show.

    Raises:
        UserError: there is no such student, it has no such form, its stock pipeline does not sample what it does, or
            the folder is taken or cannot be written; nothing is left there then.
    """
    run, folder = _locate(order.source)
    card = load_card(folder)
    base = resolve_folder(card.model, where=f"{folder / CARD}: model")
    _check(order, folder, base)
    output = _output(order, run, folder, base)
    where = pick_device(device)
    with quiet(), explain_memory(lambda: "try --device cpu, or --no-verify"), replacing(output, "export") as aside:
        aside.mkdir()
        cfg = _configuration(run, card)
        subject = _write(order, folder, base, cfg, where, aside)
        _free()
        lines = _verify(order, subject, cfg, where, aside)
        text = model_card(
            subject, order.kind, output.name, read_training(run, folder), scale=order.scale, measured=lines
        )
        (aside / "README.md").write_text(text, encoding="utf-8")
    hints = [f"mind: {subject.recipe.note}"] if subject.recipe.note else []
    if order.kind == "comfyui":
        hints += [f"ManualSigmas for {n} steps: {sigma_string(levels)}" for n, levels in subject.sigmas.items()]
    return [f"{order.kind}: {output}", *lines, *hints]


# ------------------------------------------------------------------------------------------------------- what is asked


def _locate(source: str) -> tuple[Path, Path]:
    """The run's folder and the student's; a student on its own is its own run."""
    given = resolve_folder(source, where="RUN") if is_embedded(source) else Path(source).expanduser()
    folder = given if (given / CARD).is_file() else given / "student"
    is_of_run = folder.name == "student" and RunFolder(folder.parent).config.is_file()
    return (folder.parent if is_of_run else folder), folder


def _check(order: ExportRequest, folder: Path, base: Path) -> None:
    """Refuse, before anything is loaded, what this student cannot be made into."""
    is_lora = (folder / LORA_FILE).is_file()
    if order.kind == "lora" and not is_lora:
        raise UserError(
            "this student is no LoRA: all of its weights were trained", where="--format lora",
            fix="take merged, diffusers or comfyui, or train with student.weights.kind=lora",
        )  # fmt: skip
    if order.scale != 1 and (order.kind == "lora" or (order.kind == "comfyui" and is_lora)):
        raise UserError("a LoRA is scaled where it is loaded", where="--scale", fix="take it out, or --format merged")
    if order.kind == "comfyui":
        names = [name for family in FAMILIES for name in family.pipelines]
        check_family(read_index(base, names)["_class_name"])
    if order.kind in QUANTIZED:
        check_torchao()


def _output(order: ExportRequest, run: Path, folder: Path, base: Path) -> Path:
    """The folder to appear, which must not hold what it is made from."""
    of_run = run / "export" / order.kind
    output = order.output or (of_run if run != folder else Path("exports") / f"{folder.name}-{order.kind}")
    for origin in (run, folder, base):
        if origin.resolve().is_relative_to(output.resolve()):
            raise UserError(f"holds {origin}, which the export is made from", where=str(output), fix="another --output")
    check_free(output, overwrite=order.overwrite)
    return output


def _configuration(run: Path, card: StudentCard) -> DistillConfig | None:
    """What the run was told, the default of an embedded model, or None for a student without its run."""
    if RunFolder(run).config.is_file():
        return load_run(run)[1]
    return load_config(DistillConfig, "tiny", group="distill") if is_embedded(card.model) else None


# ------------------------------------------------------------------------------------------------- writing and checking


def _write(
    order: ExportRequest, folder: Path, base: Path, cfg: DistillConfig | None, device: torch.device, aside: Path
) -> ExportedStudent:
    """Sample the student, write it, and return what must be known of it after its memory is freed."""
    loaded = load_student(folder, device)
    student, card = loaded.student, loaded.card
    nfe = order.nfe or (4 if 4 in card.num_steps else card.num_steps[0])
    spec = loaded.spec(nfe)
    if order.scale != 1:
        rescale(student, loaded.base, order.scale)
    prompts = _prompts(cfg, order.num_clips if order.kind in QUANTIZED else 1)
    if isinstance(student, PathWanBackbone):  # stock pipelines know nothing of motion paths
        prompts = tuple(split_path(prompt)[0] for prompt in prompts)
    videos = None
    if order.verify:
        batches = sample_videos(student, prompts, loaded.clip, spec, seed=SEED, batch_size=1)
        videos = torch.cat([samples.videos.cpu() for samples in batches])
    subject = ExportedStudent(
        card=card, base=base, pipeline=read_index(base, student.pipelines)["_class_name"],
        networks={name: type(network).__name__ for name, network in student.denoisers.items()},
        recipe=stock_call(student, card, nfe),
        sigmas={n: tuple(student.sigmas(n, card.shift).tolist()) for n in sorted({nfe, *card.num_steps})},
        is_lora=student.adapters is not None, prompts=prompts,
        noises=tuple(clip_noise(student, loaded.clip, SEED, i).cpu() for i in range(len(prompts))), videos=videos,
    )  # fmt: skip
    match order.kind:
        case "lora":
            write_lora(student, card, subject.recipe, base_id(card.model), aside)
        case "comfyui":
            write_comfyui(student, header(student, card, base_id(card.model)), aside)
        case "merged":
            write_merged(student, subject.recipe, aside)
        case "diffusers" | "int8" | "fp8":
            write_pipeline(student, base, subject.recipe, aside)
    return subject


def _prompts(cfg: DistillConfig | None, count: int) -> tuple[str, ...]:
    """Held-out prompts of the run, in turn."""
    try:
        known = (_PROMPT,) if cfg is None else load_prompts(cfg.prompts).heldout
    except UserError as error:  # the prompts' file is gone; the student is still what it is
        warn(f"compared on another prompt: {error}")
        known = (_PROMPT,)
    return tuple(known[i % len(known)] for i in range(count))


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _verify(
    order: ExportRequest, subject: ExportedStudent, cfg: DistillConfig | None, device: torch.device, aside: Path
) -> list[str]:
    """Load what was written with the target's own code and compare its clips with the student's; what was found."""
    lines = []
    if order.kind in QUANTIZED:
        before, after = quantize(aside, order.kind, subject.dtype)
        lines.append(f"denoiser: {before / 2**20:.1f} MiB before, {after / 2**20:.1f} MiB after")
    if subject.videos is None:
        return [*lines, "not compared with our sampler (--no-verify)"]
    try:
        pipeline = _load(order.kind, subject, device, aside)
        videos = sample_stock(pipeline, subject.recipe, subject.noises, subject.prompts)
    except (ValueError, KeyError, RuntimeError, OSError, TypeError, SafetensorError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        raise UserError(
            f"stock diffusers cannot load or sample it: {first_line(error)}; nothing is kept",
            where=f"--format {order.kind}",
        ) from error
    del pipeline
    _free()
    difference = Difference.of(subject.videos, videos)
    check(difference, subject.dtype, quantized=order.kind in QUANTIZED, where=f"--format {order.kind}")
    clips = f"{len(videos)} clip{'s' if len(videos) != 1 else ''}"
    lines.append(f"stock {subject.pipeline} against our sampler, {clips} from the same noise: {difference}")
    if order.kind in QUANTIZED and (table := _loss(order, subject, cfg, device, videos)):
        lines.append("\n".join(table))
    return lines


def _load(kind: Format, subject: ExportedStudent, device: torch.device, folder: Path) -> Any:
    """The export in the stock pipeline, afresh."""
    match kind:
        case "lora":
            return load_lora(folder, subject.base, device, subject.dtype)
        case "merged":
            return load_merged(folder, subject.base, device, subject.dtype)
        case "comfyui":
            return load_comfyui(folder, subject.base, device, subject.dtype, subject.recipe.scheduler)
        case "diffusers" | "int8" | "fp8":
            return open_pipeline(folder, device, subject.dtype)


def _loss(
    order: ExportRequest,
    subject: ExportedStudent,
    cfg: DistillConfig | None,
    device: torch.device,
    videos: torch.Tensor,
) -> list[str]:
    """What quantising cost by the run's own measures; nothing where they are not at hand."""
    if cfg is None or subject.videos is None:
        return []
    try:
        measures = build_measures(cfg, device)
    except UserError as error:
        warn(f"the loss is measured in pixels alone: {error}")
        return []
    before, after = (score(measures, clips, subject.prompts, device) for clips in (subject.videos, videos))
    return loss_table(order.kind, before, after, subject.prompts)
