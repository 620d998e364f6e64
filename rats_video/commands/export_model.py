"""`export model`: the student in a form that other programs load, checked with their own code before it appears."""

from __future__ import annotations

import gc
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from rats_video.assets import resolve_folder
from rats_video.backbones.kinds import find_family
from rats_video.commands.device import explain_memory, pick_device
from rats_video.commands.export_clips import make_clips
from rats_video.commands.folders import check_free
from rats_video.commands.runs import config_of
from rats_video.commands.students import load_student, locate_student, with_base
from rats_video.datasets.prompts.split import load_prompts
from rats_video.distillation.measures import build_measures
from rats_video.distillation.settings import DistillConfig
from rats_video.errors import UserError, warn
from rats_video.export.base import Clips, ExportedStudent, Form, rescale
from rats_video.export.card import model_card, read_training
from rats_video.export.kinds import find_form
from rats_video.export.quality import loss_table, score
from rats_video.export.stock import quiet
from rats_video.export.verify import UNCHECKED, Difference, sample_export
from rats_video.files import replacing
from rats_video.inference.student import ITSELF, load_card, write_card

_PROMPT = "a fast red circle moving left on a gray background"  # where no run says what its model is for


@dataclass(frozen=True)
class ExportRequest:
    """An export that a user asks for.

    Args:
        kind: name of the form.
        source: a run, a student's folder, or an embedded student's name.
        scale: how many times the student's difference from its base is taken.
        nfe: calls of the clips that are compared and of the card's code; None = 4, or the first trained for.
        num_clips: held-out clips that show what quantising costs.
        verify: whether to compare clips.
        output: folder to appear; None = beside the run, or in `exports/`.
        overwrite: whether to replace a folder that is there.
        base: where the student's base pipeline is now; None = where it was.
    """

    kind: str
    source: str
    scale: float = 1.0
    nfe: int | None = None
    num_clips: int = 8
    verify: bool = True
    output: Path | None = None
    overwrite: bool = False
    base: Path | None = None


def run_export_model(order: ExportRequest, device: str) -> list[str]:
    """Write the export, compare it, describe it; returns the lines to show.

    Raises:
        UserError: there is no such student, it has no such form, its stock pipeline does not sample what it does, or
            the folder is taken or cannot be written; nothing is left there then.
    """
    run, folder = locate_student(order.source, where="RUN")
    form, card = find_form(order.kind), with_base(load_card(folder), folder, order.base)
    base = folder if card.model == ITSELF else resolve_folder(card.model, where="--base")
    form.check(folder, base, find_family(base, card.backbone), order.scale)
    output = _free_output(order, run, folder, base)
    where = pick_device(device)
    with quiet(), explain_memory(lambda: "try --device cpu, or --no-verify"), replacing(output, "export") as aside:
        aside.mkdir()
        cfg = config_of([run], card.model)
        exported = _write(order, form, run.resolve().name, folder, base, cfg, where, aside)
        _free()
        lines = form.finish(exported, aside) + _verify(form, exported, cfg, where, aside)
        training = read_training(run, folder)
        text = model_card(exported, form, output.name, training, scale=order.scale, measured=lines)
        (aside / "README.md").write_text(text, encoding="utf-8")
    note = form.note(exported)
    hints = [f"mind: {note}"] if note else []
    return [f"{form.name}: {output}", *lines, *hints, *form.hints(exported)]


def with_output(order: ExportRequest) -> tuple[ExportRequest, Path]:
    """The same with its output folder, and that folder."""
    output = order.output or _default_output(order, *locate_student(order.source, where="RUN"))
    return replace(order, output=output), output


def _default_output(order: ExportRequest, run: Path, folder: Path) -> Path:
    return run / "export" / order.kind if run != folder else Path("exports") / f"{folder.name}-{order.kind}"


def _free_output(order: ExportRequest, run: Path, folder: Path, base: Path) -> Path:
    """The folder to appear, which must not hold the student or its base."""
    output = order.output or _default_output(order, run, folder)
    for origin in (run, folder, base):
        if origin.resolve().is_relative_to(output.resolve()):
            raise UserError(f"holds {origin}, which the export is made from", where=str(output), fix="another --output")
    check_free(output, overwrite=order.overwrite)
    return output


# ------------------------------------------------------------------------------------------------- writing and checking


def _write(
    order: ExportRequest,
    form: Form,
    run: str,
    folder: Path,
    base: Path,
    cfg: DistillConfig | None,
    device: torch.device,
    aside: Path,
) -> ExportedStudent:
    """Sample the student, write it, and return what must be known of it after its memory is freed."""
    loaded = load_student(folder, device, order.base)
    student, card = loaded.student, loaded.card
    nfe = order.nfe or (4 if 4 in card.num_steps else card.num_steps[0])
    spec = loaded.spec(nfe)
    if order.scale != 1:
        rescale(student, loaded.base, order.scale)
    prompts = tuple(map(student.stock_prompt, _prompts(cfg, order.num_clips if form.loses else 1)))
    made = make_clips(loaded, cfg, prompts, spec, verify=order.verify)
    exported = ExportedStudent(
        card=card, base=base, run=run, pipeline=made.pipeline, makes=student.makes,
        networks={name: type(network).__name__ for name, network in student.denoisers.items()},
        stock=made.stock,
        sigmas={n: tuple(student.sigmas(n, card.shift).tolist()) for n in sorted({nfe, *card.num_steps})},
        boundary=getattr(student, "boundary_ratio", None), is_lora=student.adapters is not None, prompts=prompts,
        noises=made.noises, clips=made.clips, pictures=made.pictures, free=made.free,
        fresh=made.fresh, has_sound=student.has_sound,
    )  # fmt: skip
    form.write(student, exported, aside)
    if made.pictures is not None:
        made.pictures.save(f"{aside}/{form.picture_prefix(exported)}")
    if own := form.own_card(exported, aside):
        write_card(own, {n: exported.sigmas[n] for n in own.num_steps}, aside)
    return exported


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
    form: Form, exported: ExportedStudent, cfg: DistillConfig | None, device: torch.device, aside: Path
) -> list[str]:
    """Compare the clips of what was written with the student's; returns lines for the card."""
    if exported.clips is None:
        return [UNCHECKED]
    theirs = sample_export(form, exported, device, aside)
    _free()
    difference, count = Difference.of(exported.clips, theirs), len(theirs.videos)
    clips = f"{count} clip{'s' if count != 1 else ''}"
    lines = [f"stock {exported.pipeline} against our sampler, {clips} from the same noise: {difference}"]
    if form.loses and (table := _loss(form, exported, cfg, device, theirs)):
        lines.append("\n".join(table))
    return lines


def _loss(
    form: Form, exported: ExportedStudent, cfg: DistillConfig | None, device: torch.device, theirs: Clips
) -> list[str]:
    """The cost of quantising by the run's own measures; nothing where they are not at hand."""
    if cfg is None or exported.clips is None:
        return []
    try:
        measures = build_measures(cfg, device)
    except UserError as error:
        warn(f"the loss is measured in pixels alone: {error}")
        return []
    before, after = (score(measures, clips, exported.prompts, device) for clips in (exported.clips, theirs))
    return loss_table(form.name, before, after, exported.prompts)
