"""`sample`, `export comparison` and `evaluate`: what is done with a finished student."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from rats_video.assets import ASSETS, resolve_folder
from rats_video.backbones.base import PipelineBackbone
from rats_video.backbones.load import load_backbone
from rats_video.build.common import explain_memory, make_folder, start_runtime
from rats_video.build.reward import build_reward
from rats_video.config.distill import DistillConfig, ShapesPrompts
from rats_video.config.load import load_config
from rats_video.datasets.prompts import check_plain, check_prompt, load_prompts, read_prompt_file
from rats_video.errors import UserError, warn
from rats_video.evaluation.plots import plot_nfe_curve
from rats_video.evaluation.sweep import (
    Arm,
    ArmScores,
    Measure,
    motion_measure,
    reward_measure,
    score_arm,
    shapes_measure,
)
from rats_video.evaluation.tables import headline, markdown_table, write_rows
from rats_video.files import write_json
from rats_video.inference.comparison import Panel, compose_comparison
from rats_video.inference.sampler import SamplerSpec, sample_videos
from rats_video.inference.student import CARD, StudentCard, load_card
from rats_video.inference.video import slugify, write_mp4
from rats_video.runtime import Runtime
from rats_video.training.progress import ProgressBar
from rats_video.training.run_folder import RunFolder
from rats_video.types import ClipSpec

DEFAULT_STUDENT = "tiny-wan-student"
_EXAMPLE_PROMPTS = (
    "a fast red circle moving left on a gray background",
    "a slow blue square moving up on a white background",
    "a fast yellow triangle moving right on a black background",
)


@dataclass(frozen=True)
class LoadedStudent:
    """A student beside the base model it came from."""

    card: StudentCard
    base: PipelineBackbone
    student: PipelineBackbone

    @property
    def clip(self) -> ClipSpec:
        """The clip size it was trained at."""
        size = self.card.clip
        return ClipSpec(int(size["num_frames"]), int(size["height"]), int(size["width"]), size["fps"])

    def spec(self, nfe: int) -> SamplerSpec:
        """The student's sampler at `nfe` calls; warns on stderr where it was trained for other counts."""
        if nfe not in self.card.num_steps:
            trained = ", ".join(map(str, self.card.num_steps))
            warn(f"this student was trained for {trained}; quality may drop", where=f"--nfe {nfe}")
        return SamplerSpec(nfe, self.card.shift)


def load_student(folder: Path, device: torch.device) -> LoadedStudent:
    """Load a run's student, or a student folder itself."""
    folder = folder if (folder / CARD).is_file() else folder / "student"
    card = load_card(folder)
    model = resolve_folder(card.model, where=f"{folder / CARD}: model")
    base = load_backbone(model, device, getattr(torch, card.dtype))
    base.fps, base.embedded_guidance = card.clip["fps"], card.embedded_guidance
    return LoadedStudent(card, base, base.load_role(folder))


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


def _prompts(given: Sequence[str], file: Path | None, fallback: Sequence[str], backbone: PipelineBackbone) -> list[str]:
    prompts = list(given) or (list(read_prompt_file(file)) if file else list(fallback))
    for prompt in prompts:
        check_plain(prompt, where="--prompt")
        check_prompt(prompt, backbone.unknown_words(prompt))
    return prompts


def _repeat(prompts: Sequence[str], count: int | None) -> list[str]:
    """`count` prompts, taken in turn; None takes each once."""
    return [prompts[i % len(prompts)] for i in range(len(prompts) if count is None else count)]


def run_sample(
    *,
    model: Path | None,
    nfe: int,
    prompts: Sequence[str],
    prompts_file: Path | None,
    num_videos: int | None,
    seed: int,
    output: Path,
    device: str,
) -> list[str]:
    """Write one mp4 a prompt; returns the lines to show."""
    runtime = start_runtime(device)
    loaded = load_student(model or ASSETS / DEFAULT_STUDENT, runtime.device)
    chosen = _repeat(_prompts(prompts, prompts_file, _EXAMPLE_PROMPTS, loaded.student), num_videos)
    with explain_memory(lambda: "give fewer prompts at a time: they are sampled together"):
        lines = sample_files(loaded, chosen, loaded.spec(nfe), runtime, seed=seed, output=output)
    runtime.close()
    return lines


def sample_files(
    loaded: LoadedStudent, prompts: Sequence[str], spec: SamplerSpec, runtime: Runtime, *, seed: int, output: Path
) -> list[str]:
    """Sample and write mp4s and a manifest into `output`."""
    make_folder(output)
    mine: list[dict[str, object]] = []
    share = runtime.share(len(prompts))
    for samples in sample_videos(loaded.student, prompts, loaded.clip, spec, seed=seed, share=share):
        for index, frames, prompt in zip(samples.indices, samples.videos, samples.prompts, strict=True):
            name = f"{index:03d}-{slugify(prompt)}-nfe{spec.nfe}-seed{seed}.mp4"
            write_mp4(frames.cpu(), output / name, fps=loaded.clip.fps)
            mine.append({
                "file": name, "prompt": prompt, "nfe": spec.nfe, "num_steps": spec.num_steps, "seed": seed,
                "index": index, "seconds": round(samples.seconds_per_clip, 4),
            })  # fmt: skip
    manifest = runtime.collect(mine)
    if runtime.is_main:
        write_json(output / "manifest.json", manifest)
    seconds = sum(float(str(row["seconds"])) for row in manifest) / len(manifest)
    clips = f"{len(manifest)} clip{'s' if len(manifest) != 1 else ''}"
    return [f"{clips} at {spec.nfe} NFE, {seconds:.2f} s each: {output}"]


def run_export_comparison(
    *,
    run: Path,
    nfe: int,
    prompts: Sequence[str],
    prompts_file: Path | None,
    num_videos: int | None,
    seed: int,
    output: Path | None,
    device: str,
) -> list[str]:
    """Write teacher | base | student mp4s from the same noise; returns the lines to show."""
    folder, cfg = load_run(run)
    runtime = start_runtime(device)
    loaded = load_student(run, runtime.device)
    heldout = load_prompts(cfg.prompts).heldout
    chosen = _repeat(_prompts(prompts, prompts_file, heldout, loaded.student), num_videos or cfg.comparison.num_videos)
    spec, output = loaded.spec(nfe), output or folder.comparison
    with explain_memory(lambda: "give a smaller --num-videos: they are sampled together"):
        lines = compare_files(cfg, loaded, chosen, spec, runtime, seed=seed, output=output)
    runtime.close()
    return lines


def compare_files(
    cfg: DistillConfig,
    loaded: LoadedStudent,
    prompts: Sequence[str],
    spec: SamplerSpec,
    runtime: Runtime,
    *,
    seed: int,
    output: Path,
) -> list[str]:
    """Sample the three columns with paired noise, score them and write one mp4 a prompt."""
    make_folder(output)
    reward = build_reward(cfg.reward, loaded.base.device, where="reward", clip=loaded.clip)
    teacher = SamplerSpec(cfg.evaluation.teacher_steps, cfg.shift, cfg.evaluation.guidance_scale)
    arms = [Arm("teacher", loaded.base, teacher), Arm("base", loaded.base, spec), Arm("student", loaded.student, spec)]
    share = runtime.share(len(prompts))
    columns: list[list[Panel]] = []
    with ProgressBar("comparison", sum(arm.spec.nfe for arm in arms)) as progress:
        for arm in arms:
            panels: list[Panel] = []
            for samples in sample_videos(arm.backbone, prompts, loaded.clip, arm.spec, seed=seed, share=share):
                scores = reward(samples.videos, samples.prompts).clip.tolist()
                panels += [
                    Panel(arm.name, frames.cpu(), arm.spec.num_steps, arm.spec.nfe, samples.seconds_per_clip, score)
                    for frames, score in zip(samples.videos, scores, strict=True)
                ]
            columns.append(panels)
            progress.advance(arm.spec.nfe)
    mine: list[dict[str, object]] = []
    for index, *panels in zip(share, *columns, strict=True):
        prompt = prompts[index]
        name = f"{index:03d}-{slugify(prompt)}.mp4"
        write_mp4(compose_comparison(panels, prompt=prompt), output / name, fps=loaded.clip.fps)
        mine.append({"file": name, "prompt": prompt, "seed": seed, "reward": {p.title: p.reward for p in panels}})
    rows = runtime.collect(mine)
    if runtime.is_main:
        write_json(output / "index.json", rows)
    return [f"{len(prompts)} comparisons (teacher | base | student, same noise): {output}"]


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
        measures.append(shapes_measure)
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
    prompts = _repeat(load_prompts(cfg.prompts).heldout, options.num_clips)
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
