"""The end of a run: the student as an artifact, and its figures."""

from __future__ import annotations

from pathlib import Path

import torch

from rats_video.assets import find_hub_id, is_embedded, resolve_folder
from rats_video.backbones.base import PipelineBackbone
from rats_video.backbones.compute import ComputeConfig
from rats_video.backbones.kinds import load_backbone
from rats_video.distillation.roles import build_roles
from rats_video.distillation.settings import DistillConfig
from rats_video.errors import UserError
from rats_video.evaluation.guard_plot import plot_guard
from rats_video.evaluation.plots import plot_training
from rats_video.hub import CARD
from rats_video.inference.student import StudentCard, load_card, save_student
from rats_video.reading import read_json
from rats_video.training.checkpoint import find_damage, list_checkpoints, steps_done
from rats_video.training.guard import drop_former
from rats_video.training.metrics import read_metrics
from rats_video.training.restore import load_student_weights
from rats_video.training.run_folder import RunFolder


def finish(cfg: DistillConfig, run: RunFolder, student: PipelineBackbone) -> None:
    """Write the trained student, the best of the guard or else the last one, and its figures."""
    chosen = _chosen(cfg, run)
    if damage := find_damage(chosen):
        raise UserError(f"damaged: {damage}", where=str(chosen), fix="--resume goes on from what is not")
    if cfg.parallel.shard:
        student = _whole_student(cfg, chosen)
    else:
        load_student_weights(chosen, student.weights)
    clip = {key: float(value) for key, value in cfg.clip.model_dump().items()}
    done = steps_done(chosen)
    is_name = is_embedded(cfg.model) or find_hub_id(cfg.model) is not None
    model = cfg.model if is_name else str(Path(cfg.model).resolve())
    card = StudentCard(
        model,
        cfg.student.num_steps,
        cfg.shift,
        clip,
        done,
        cfg.seed,
        cfg.embedded_guidance,
        cfg.compute.dtype,
        backbone=cfg.backbone,
        first_frame=cfg.prompts.first_frame,
        base_loras=tuple(
            lora.model_copy(update={"path": str(Path(lora.path).expanduser().resolve())}) for lora in cfg.base_loras
        ),
        sampler=cfg.student.sampler,
    )
    plot_training(read_metrics(run.metrics), run.curves)
    if run.guard.is_file():
        plot_guard(read_json(run.guard), run.guard_figure)
    drop_former(run)
    save_student(student, card, run.student)  # comes last: by it a run is known to be finished


def is_finished(cfg: DistillConfig, run: RunFolder) -> bool:
    """True if the run is trained to its last step, and its student is the one that `finish` would write."""
    if not (run.student / CARD).is_file():
        return False
    written, saved = load_card(run.student).steps, list_checkpoints(run.checkpoints)
    if not saved:  # somebody needed the space
        return written >= cfg.training.steps
    return steps_done(saved[-1]) >= cfg.training.steps and written == steps_done(_chosen(cfg, run))


def _chosen(cfg: DistillConfig, run: RunFolder) -> Path:
    """The checkpoint, or best student, whose weights the run ends with."""
    best = read_json(run.guard)["best"] if cfg.guard is not None and cfg.guard.choose == "best" else None
    return list_checkpoints(run.checkpoints)[-1] if best is None else run.best_student(best)


def _whole_student(cfg: DistillConfig, checkpoint: Path) -> PipelineBackbone:
    """A checkpoint's student, unsplit, in host memory."""
    plain = cfg.model_copy(update={"compute": ComputeConfig(dtype=cfg.compute.dtype)})  # no GPU's kernels on a CPU
    dtype = getattr(torch, cfg.compute.dtype)
    base = load_backbone(resolve_folder(cfg.model, where="model"), "cpu", dtype, cfg.backbone, with_text=False)
    student, _ = build_roles(plain, base)
    load_student_weights(checkpoint, student.weights)
    return student
