"""Trains, evaluates and shows the arms of a comparison."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch

from rats_video.assets import resolve_folder
from rats_video.backbones.base import PipelineBackbone
from rats_video.backbones.compute import ComputeConfig
from rats_video.commands.compare_layout import Arm, ArmEvaluation, CompareLayout, KeptScores, cost_of
from rats_video.commands.device import explain_memory
from rats_video.commands.evaluate import REFERENCE, score_arms
from rats_video.commands.export_comparison import compare_files
from rats_video.commands.finish import finish
from rats_video.commands.students import load_base, load_student
from rats_video.commands.train_student import train_student
from rats_video.distillation.compute import memory_advice
from rats_video.distillation.roles import build_roles
from rats_video.errors import UserError
from rats_video.evaluation.stats import finite
from rats_video.evaluation.sweep import EvaluatedModel
from rats_video.files import replacing, tidy, write_json
from rats_video.runtime import Runtime
from rats_video.training.metrics import read_metrics
from rats_video.training.restore import load_student_weights
from rats_video.training.run_folder import RunFolder


def train(arm: Arm, runtime: Runtime, milestones: Collection[int]) -> None:
    """Train an arm's student, or resume it; only for the holder of the folder's lock.

    Snapshots are saved after each of the `milestones`.
    """
    assert arm.cfg is not None
    cfg, run = arm.cfg, RunFolder(arm.folder)
    is_begun = run.config.is_file()
    is_cuda = runtime.device.type == "cuda"
    if is_cuda:
        torch.cuda.reset_peak_memory_stats(runtime.device)
    with explain_memory(lambda: memory_advice(cfg)):
        student = train_student(cfg, run, runtime, resume=is_begun, overwrite=not is_begun, milestones=milestones)
    assert student is not None
    cost = cost_of(read_metrics(run.metrics), torch.cuda.max_memory_allocated(runtime.device) if is_cuda else None)
    write_json(arm.cost_file, cost.model_dump())
    finish(cfg, run, student)


def evaluate_arm(layout: CompareLayout, arm: Arm, runtime: Runtime) -> None:
    """Run an arm's missing evaluations and save their scores by clip; only for the holder of the folder's lock."""
    missing = layout.unscored(arm)
    tidy(arm.folder / "scores")
    for step in dict.fromkeys(evaluation.step for evaluation in missing):
        evaluations = [evaluation for evaluation in missing if evaluation.step == step]
        backbone = _backbone(layout, arm, evaluations, runtime)
        arms = [EvaluatedModel(arm.method, backbone, evaluation.spec) for evaluation in evaluations]
        with explain_memory(lambda: f"set evaluation.batch_size below {layout.base.evaluation.batch_size}"):
            found = score_arms(
                layout.base, arms, layout.prompts, layout.base.clip.spec,
                seed=layout.cfg.clip_seed, reference=arm.folder / REFERENCE,  # no other process writes there
            )  # fmt: skip
        for evaluation, scores in zip(evaluations, found, strict=True):
            for name, values in scores.metrics.items():
                if bad := len(values) - len(finite(values)):
                    raise UserError(f"{name} of {bad} clips at {evaluation} is no finite number", where=arm.title)
            with replacing(layout.scores_file(arm, evaluation), "scores") as partial:
                kept = KeptScores.model_validate(scores, from_attributes=True)
                partial.write_text(kept.model_dump_json(), encoding="utf-8")


def show(layout: CompareLayout, arm: Arm, prompts: Sequence[str], runtime: Runtime) -> None:
    """Write an arm's clips beside the teacher's and the base's; only for the holder of the folder's lock."""
    loaded, cfg = load_student(arm.folder, runtime.device), layout.cfg
    evaluation = layout.base.evaluation.model_copy(update={"teacher_steps": cfg.teacher_steps})
    compare_files(
        layout.base.model_copy(update={"evaluation": evaluation}), loaded, prompts,
        loaded.spec(cfg.curve_nfe), runtime, seed=cfg.clip_seed, output=RunFolder(arm.folder).comparison,
    )  # fmt: skip


def _backbone(
    layout: CompareLayout, arm: Arm, evaluations: Sequence[ArmEvaluation], runtime: Runtime
) -> PipelineBackbone:
    """The model of these evaluations, which are all of the same step."""
    step = evaluations[0].step
    if arm.cfg is not None and step is None:
        loaded = load_student(arm.folder, runtime.device)
        for evaluation in evaluations:
            loaded.spec(evaluation.spec.nfe)  # warns of step counts that it was not trained for
        return loaded.student
    base, model = layout.base, resolve_folder(layout.base.model, where="model")
    backbone = load_base(
        model, runtime.device, base.compute.dtype, base.clip.fps, base.embedded_guidance, base.backbone,
        base.base_loras,
    )  # fmt: skip
    if arm.cfg is None or step is None:
        return backbone
    student, _ = build_roles(arm.cfg.model_copy(update={"compute": ComputeConfig(dtype=base.compute.dtype)}), backbone)
    load_student_weights(RunFolder(arm.folder).milestone(step), student.weights)
    return student
