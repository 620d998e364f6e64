"""`evaluate`: teacher, base model and student on held-out prompts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rats_video.backbones.base import PipelineBackbone
from rats_video.commands.device import explain_memory, start_runtime
from rats_video.commands.folders import make_folder
from rats_video.commands.prompts import cycle
from rats_video.commands.runs import load_run
from rats_video.commands.students import LoadedStudent, load_student
from rats_video.datasets.prompts.split import load_prompts
from rats_video.distillation.measures import build_feature_fns, build_measures, build_reference, once_more
from rats_video.distillation.pictures import give_pictures
from rats_video.distillation.settings import DistillConfig
from rats_video.evaluation.latency import latency_table, measure_latency
from rats_video.evaluation.plots import plot_nfe_curve
from rats_video.evaluation.sets import fill_sets, set_notes
from rats_video.evaluation.sweep import ArmScores, EvaluatedModel, score_arm
from rats_video.evaluation.tables import (
    BESIDE,
    DIRECTIONS_NOTE,
    TEACHER,
    ArmRow,
    headline,
    markdown_table,
    only,
    write_rows,
)
from rats_video.inference.sampler import SamplerSpec
from rats_video.progress import ClipBar, Pace, followed_by
from rats_video.runtime import ALONE, Runtime
from rats_video.types import ClipSpec

REFERENCE = "reference.safetensors"


def run_evaluate(
    *, run: Path, base: Path | None, nfe: tuple[int, ...] | None, num_clips: int | None, seed: int,
    output: Path | None, device: str,
) -> list[str]:  # fmt: skip
    """Score teacher, base and student on held-out prompts; returns the table's lines.

    None takes the value of the run's configuration.
    """
    folder, cfg = load_run(run)
    runtime = start_runtime(device)
    loaded = load_student(run, runtime.device, base)
    changes = {"nfe": nfe or cfg.evaluation.nfe, "num_clips": num_clips or cfg.evaluation.num_clips}
    cfg = cfg.model_copy(update={"evaluation": cfg.evaluation.model_copy(update=changes), "model": str(loaded.model)})
    with explain_memory(lambda: f"set evaluation.batch_size below {cfg.evaluation.batch_size} in {folder.config}"):
        lines = evaluate_files(cfg, loaded, runtime, seed=seed, output=output or folder.evaluation)
    runtime.close()
    return lines


def evaluate_files(
    cfg: DistillConfig, loaded: LoadedStudent, runtime: Runtime, *, seed: int, output: Path, pace: Pace | None = None
) -> list[str]:
    """Write evaluation.json, evaluation.md and nfe.png, and keep the real clips' features in reference.safetensors."""
    make_folder(output)
    options = cfg.evaluation
    arms = [EvaluatedModel(TEACHER, loaded.base, cfg.judged_teacher)]
    arms += [EvaluatedModel("base", loaded.base, SamplerSpec(nfe, cfg.shift)) for nfe in options.nfe]
    arms += [EvaluatedModel("student", loaded.student, loaded.spec(nfe)) for nfe in options.nfe]
    prompts = cycle(load_prompts(cfg.prompts).heldout, options.num_clips)
    pace = pace or Pace()
    repeats = options.latency_clips
    with followed_by(lambda: pace.seconds(repeats * sum(arm.spec.nfe for arm in arms), repeats * len(arms))):
        scores = score_arms(
            cfg, arms, prompts, loaded.clip, seed=seed, runtime=runtime, reference=output / REFERENCE, pace=pace
        )
    if not runtime.is_main:
        return []
    rows = [score.row() for score in scores]
    if repeats:
        rows = _timed(rows, arms, prompts[0], loaded.clip, repeats)
    return _write(rows, set_notes(scores), output, f"{len(prompts)} held-out clips an arm, seed {seed}; 95% intervals")


def _timed(
    rows: Sequence[ArmRow], arms: Sequence[EvaluatedModel], prompt: str, clip: ClipSpec, repeats: int
) -> list[ArmRow]:
    """The rows with each arm's latency."""
    timed = []
    with ClipBar("latency", sum(arm.spec.nfe for arm in arms) * repeats, len(arms) * repeats) as progress:
        for row, arm in zip(rows, arms, strict=True):
            found = measure_latency(arm, prompt, clip, repeats=repeats)
            progress.made(arm.spec.nfe * repeats, repeats, found.denoiser * repeats)
            timed.append(row.model_copy(update={"latency": found}))
    return timed


def _write(rows: Sequence[ArmRow], notes: Sequence[str], output: Path, summary: str) -> list[str]:
    """Write what was measured; returns the lines to show."""
    notes = [DIRECTIONS_NOTE, *notes]
    write_rows(rows, output / "evaluation.json", [summary, *notes])
    shown = [headline(row) for row in rows]
    tables = [markdown_table(shown)]
    beside = [only(row, BESIDE) for row in rows]
    if any(row.metrics for row in beside):
        tables.append(markdown_table(beside))
    tables += latency_table(rows)
    text = "\n\n".join([*tables, "\n".join(f"- {note}" for note in [summary, *notes])])
    (output / "evaluation.md").write_text(text + "\n", encoding="utf-8")
    panels = (*shown[0].metrics, "fvd", "fid", "diversity_share", "pixel_diversity_share")
    plot_nfe_curve(rows, output / "nfe.png", metrics=list(dict.fromkeys(panels)))
    return ["\n\n".join(tables), "", *notes, f"{summary}: {output}"]


def score_arms(
    cfg: DistillConfig,
    arms: Sequence[EvaluatedModel],
    prompts: Sequence[str],
    clip: ClipSpec,
    *,
    seed: int,
    runtime: Runtime = ALONE,
    reference: Path | None = None,
    pace: Pace | None = None,
) -> list[ArmScores]:
    """Score all arms, under one progress bar that counts clips.

    Args:
        cfg: what is measured.
        arms: at least one.
        prompts: of the clips.
        clip: their size.
        seed: of the noise.
        runtime: whose processes share the clips; all get every clip's scores, and the main one the metrics of sets.
        reference: file that keeps the real clips' features, see `build_reference`; None keeps none.
        pace: of clips before these; None knows none.
    """
    models = [arm.backbone for arm in arms if isinstance(arm.backbone, PipelineBackbone)]
    backbone = models[0]
    give_pictures(cfg, *models)
    measures, looks = build_measures(cfg, backbone.device), build_feature_fns(cfg, backbone.device)
    again = once_more(cfg, prompts)
    share = runtime.shard(len(prompts) + len(again))
    calls = sum(arm.spec.nfe for arm in arms) * len(share)
    with ClipBar("evaluate", calls, len(arms) * len(share), pace) as progress:
        scores = [
            score_arm(
                arm, prompts, clip, measures, seed=seed, batch_size=cfg.evaluation.batch_size, looks=looks,
                again=again, share=share, made=progress.made,
            )
            for arm in arms
        ]  # fmt: skip
    scores = [ArmScores.together(runtime.gather(arm)) for arm in scores]
    if runtime.is_main:
        real = "features" in looks and build_reference(cfg, looks["features"], backbone, clip, prompts, reference)
        fill_sets(scores, real or None, of_images=clip.num_frames == 1)
    return scores
