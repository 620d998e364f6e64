"""`export comparison`: teacher, base model and student side by side."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rats_video.commands.device import explain_memory, start_runtime
from rats_video.commands.folders import make_folder
from rats_video.commands.prompts import checked_prompts, cycle
from rats_video.commands.runs import load_run
from rats_video.commands.students import LoadedStudent, load_student
from rats_video.datasets.prompts.split import load_prompts
from rats_video.distillation.measures import build_measures
from rats_video.distillation.pictures import give_pictures
from rats_video.distillation.settings import DistillConfig
from rats_video.evaluation.sweep import EvaluatedModel, measure_samples
from rats_video.files import write_json
from rats_video.inference.panel import GIVEN, Panel, with_tracks
from rats_video.inference.sampler import SamplerSpec, sample_videos
from rats_video.inference.side_by_side import compose_comparison, panel_boxes
from rats_video.inference.video import slugify, write_mp4
from rats_video.progress import ClipBar, Pace
from rats_video.runtime import Runtime


def run_export_comparison(
    *,
    run: Path,
    base: Path | None,
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
    loaded = load_student(run, runtime.device, base)
    heldout = load_prompts(cfg.prompts).heldout
    asked = checked_prompts(prompts, prompts_file, heldout, loaded.student)
    chosen = cycle(asked, num_videos or cfg.comparison.num_videos)
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
    pace: Pace | None = None,
) -> list[str]:
    """Sample the three columns from the same noise, measure them as `evaluate` does and write one mp4 a prompt.

    Where clips start from pictures, these come first.

    `index.json` has, for each file, the place of every panel in the picture, its cost and its scores, and the track
    that has its sound.
    """
    make_folder(output)
    give_pictures(cfg, loaded.base, loaded.student)
    measures = build_measures(cfg, loaded.base.device)
    arms = [
        EvaluatedModel("teacher", loaded.base, cfg.judged_teacher),
        EvaluatedModel("base", loaded.base, spec),
        EvaluatedModel("student", loaded.student, spec),
    ]
    share = runtime.shard(len(prompts))
    columns: list[list[Panel]] = []
    given: list[Panel] = []
    scores: dict[str, dict[str, list[float]]] = {}
    calls = sum(arm.spec.nfe for arm in arms) * len(share)
    with ClipBar("comparison", calls, len(arms) * len(share), pace) as progress:
        for arm in arms:
            panels: list[Panel] = []
            for samples in sample_videos(arm.backbone, prompts, loaded.clip, arm.spec, seed=seed, share=share):
                for metric, values in measure_samples(samples, measures).items():
                    scores.setdefault(metric, {}).setdefault(arm.name, []).extend(values.tolist())
                cost = (arm.spec.num_steps, arm.spec.nfe, samples.seconds_per_clip)
                rewards = scores["reward"][arm.name][-len(samples.videos) :]
                panels += [
                    Panel(arm.name, frames.cpu(), *cost, score, samples.heard(row))
                    for row, (frames, score) in enumerate(zip(samples.videos, rewards, strict=True))
                ]
                if arm is arms[0] and samples.first is not None:
                    frames = samples.first[:, None].expand_as(samples.videos).cpu()
                    given += [Panel(GIVEN, picture) for picture in frames]
                made = len(samples.prompts)
                progress.made(arm.spec.nfe * made, made, samples.seconds_in_calls)
            columns.append(panels)
    columns = [given, *columns] if given else columns
    mine: list[dict[str, object]] = []
    for place, (index, *found) in enumerate(zip(share, *columns, strict=True)):
        prompt = prompts[index]
        name = f"{index:03d}-{slugify(prompt)}.mp4"
        panels = _write(found, prompt, output / name, loaded.clip.fps)
        measured = {metric: {arm: values[place] for arm, values in arms.items()} for metric, arms in scores.items()}
        mine.append({"file": name, "prompt": prompt, "seed": seed, **measured, "panels": _described(panels)})
    rows = runtime.gather_shards(mine)
    if runtime.is_main:
        write_json(output / "index.json", rows)
    names = " | ".join((*([GIVEN] if given else []), *(arm.name for arm in arms)))
    has_sound = loaded.student.has_sound
    heard = "; the student's sound plays, the teacher's is track 2 and the base's track 3" if has_sound else ""
    return [f"{len(prompts)} comparisons ({names}, same noise{heard}): {output}"]


def _write(panels: Sequence[Panel], prompt: str, path: Path, fps: float) -> list[Panel]:
    """Write one comparison; returns the panels, told their tracks."""
    told, sounds = with_tracks(panels)
    write_mp4(compose_comparison(told, prompt=prompt), path, fps=fps, sound=sounds)
    return told


def _described(panels: Sequence[Panel]) -> list[dict[str, object]]:
    """For each panel its title, cost, place, and track if it has sound."""
    return [
        {"title": panel.title, **_cost(panel), "box": box, **({} if panel.track is None else {"track": panel.track})}
        for panel, box in zip(panels, panel_boxes(panels), strict=True)
    ]


def _cost(panel: Panel) -> dict[str, float]:
    """What a clip cost; nothing of a picture that was given."""
    return {"num_steps": panel.num_steps, "nfe": panel.nfe, "seconds": panel.seconds} if panel.nfe else {}
