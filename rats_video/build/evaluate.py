"""`evaluate`: teacher, base model and student on held-out prompts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from rats_video.build.common import explain_memory, make_folder, start_runtime
from rats_video.build.inference import LoadedStudent, in_turn, load_run, load_student
from rats_video.build.reward import build_reward
from rats_video.config.distill import DistillConfig, ShapesPrompts
from rats_video.datasets.prompts import load_prompts
from rats_video.evaluation.plots import plot_nfe_curve
from rats_video.evaluation.sweep import (
    Arm,
    ArmScores,
    Measure,
    motion_measure,
    path_measure,
    reward_measure,
    score_arm,
    shapes_measure,
)
from rats_video.evaluation.tables import headline, markdown_table, write_rows
from rats_video.inference.sampler import SamplerSpec
from rats_video.runtime import Runtime
from rats_video.training.progress import ProgressBar
from rats_video.types import ClipSpec


def run_evaluate(
    *, run: Path, nfe: tuple[int, ...] | None, num_clips: int | None, seed: int, output: Path | None, device: str
) -> list[str]:
    """Score teacher, base and student on held-out prompts; returns the table's lines.

    What is None is as the run's configuration says.
    """
    folder, cfg = load_run(run)
    runtime = start_runtime(device)
    loaded = load_student(run, runtime.device)
    changes = {"nfe": nfe or cfg.evaluation.nfe, "num_clips": num_clips or cfg.evaluation.num_clips}
    cfg = cfg.model_copy(update={"evaluation": cfg.evaluation.model_copy(update=changes)})
    with explain_memory(lambda: f"set evaluation.batch_size below {cfg.evaluation.batch_size} in {folder.config}"):
        lines = evaluate_files(cfg, loaded, runtime, seed=seed, output=output or folder.evaluation)
    runtime.close()
    return lines


def build_measures(cfg: DistillConfig, device: torch.device) -> list[Measure]:
    """Trained reward, held-out reward where there is one, what can be measured on the shapes, and on what moves."""
    measures = [reward_measure("reward", build_reward(cfg.reward, device, where="reward", clip=cfg.clip.spec))]
    if cfg.heldout_reward is not None:
        heldout = build_reward(cfg.heldout_reward, device, where="heldout_reward", clip=cfg.clip.spec)
        measures.append(reward_measure("heldout_reward", heldout))
    if isinstance(cfg.prompts, ShapesPrompts):
        measures += [shapes_measure, path_measure] if cfg.prompts.paths else [shapes_measure]
    if cfg.clip.num_frames > 2:
        measures.append(motion_measure)
    return measures


def evaluate_files(
    cfg: DistillConfig, loaded: LoadedStudent, runtime: Runtime, *, seed: int, output: Path
) -> list[str]:
    """Write evaluation.json, evaluation.md and nfe.png."""
    make_folder(output)
    options = cfg.evaluation
    teacher = SamplerSpec(options.teacher_steps, cfg.shift, options.guidance_scale)
    arms = [Arm("teacher", loaded.base, teacher)]
    arms += [Arm("base", loaded.base, SamplerSpec(nfe, cfg.shift)) for nfe in options.nfe]
    arms += [Arm("student", loaded.student, loaded.spec(nfe)) for nfe in options.nfe]
    prompts = in_turn(load_prompts(cfg.prompts).heldout, options.num_clips)
    share = runtime.share(len(prompts))
    scores = score_arms(cfg, arms, prompts, loaded.clip, seed=seed, share=share)
    rows = [ArmScores.together(runtime.gather(arm)).row() for arm in scores]
    if not runtime.is_main:
        return []
    write_rows(rows, output / "evaluation.json")
    shown = [headline(row) for row in rows]
    table = markdown_table(shown)
    (output / "evaluation.md").write_text(table + "\n", encoding="utf-8")
    plot_nfe_curve(rows, output / "nfe.png", metrics=list(shown[0].metrics))
    return [*table.splitlines(), f"{len(prompts)} held-out clips an arm, seed {seed}; 95% intervals: {output}"]


def score_arms(
    cfg: DistillConfig,
    arms: Sequence[Arm],
    prompts: Sequence[str],
    clip: ClipSpec,
    *,
    seed: int,
    share: Sequence[int] | None = None,
) -> list[ArmScores]:
    """Score all arms under one progress bar that counts network evaluations, which is what takes the time."""
    measures = build_measures(cfg, arms[0].backbone.device)
    batch_size = cfg.evaluation.batch_size
    count = len(prompts if share is None else share)
    with ProgressBar("evaluate", sum(arm.spec.nfe for arm in arms) * count) as progress:
        return [
            score_arm(
                arm, prompts, clip, measures, seed=seed, batch_size=batch_size, share=share, advance=progress.advance
            )
            for arm in arms
        ]
