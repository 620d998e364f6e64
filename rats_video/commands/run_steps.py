"""The steps of `run` that follow the training, and the time they will take."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from rats_video.commands.evaluate import evaluate_files
from rats_video.commands.export_comparison import compare_files
from rats_video.commands.prompts import cycle
from rats_video.commands.sample import sample_files
from rats_video.commands.students import LoadedStudent
from rats_video.datasets.prompts.split import load_prompts
from rats_video.distillation.measures import once_more
from rats_video.distillation.pictures import give_pictures
from rats_video.distillation.settings import DistillConfig
from rats_video.evaluation.tables import read_rows
from rats_video.inference.requests import Request, list_requests
from rats_video.inference.sampler import draw_pictures
from rats_video.inference.video import write_png
from rats_video.progress import Pace, format_seconds
from rats_video.runtime import Runtime
from rats_video.training.metrics import read_metrics
from rats_video.training.run_folder import RunFolder
from rats_video.training.trackers import Trackers


class RunStep(NamedTuple):
    """A step after the training: title, the file written last, function, network calls and clips."""

    name: str
    made: Path
    make: Callable[[], list[str]]
    calls: int
    clips: int


def steps_after_training(
    cfg: DistillConfig, loaded: LoadedStudent, run: RunFolder, runtime: Runtime, pace: Pace
) -> list[RunStep]:
    """Sample, compare and evaluate; `pace` learns from the clips that they make."""
    heldout, options = load_prompts(cfg.prompts).heldout, cfg.evaluation
    spec = loaded.spec(loaded.card.num_steps[0])
    prompts = cycle(heldout, cfg.comparison.num_videos)
    requests = list_requests(prompts, nfe=spec.nfe, seed=cfg.seed)
    teacher = cfg.judged_teacher.nfe
    judged = options.num_clips + len(once_more(cfg, cycle(heldout, options.num_clips)))
    return [
        RunStep(
            "2/4 sample", run.samples / "manifest.json",
            lambda: sample_files(
                loaded, _pictured(cfg, loaded, requests, run, runtime), runtime, output=run.samples, overwrite=True
            ),
            len(prompts) * spec.nfe, len(prompts),
        ),
        RunStep(
            "3/4 export comparison", run.comparison / "index.json",
            lambda: compare_files(
                cfg, loaded, prompts, spec, runtime, seed=cfg.seed, output=run.comparison, pace=pace
            ),
            len(prompts) * (teacher + 2 * spec.nfe), len(prompts) * 3,
        ),
        RunStep(
            "4/4 evaluate", run.evaluation / "evaluation.json", lambda: _evaluate(cfg, loaded, run, runtime, pace),
            judged * (teacher + 2 * sum(options.nfe)), judged * (1 + 2 * len(options.nfe)),
        ),
    ]  # fmt: skip


def time_left(coming: Sequence[RunStep], pace: Pace, processes: int) -> str:
    """The time of these steps, as a remark; nothing where none is to be done."""
    seconds = pace.seconds(sum(step.calls for step in coming), sum(step.clips for step in coming)) / processes
    return f" (about {format_seconds(seconds)} left in all)" if coming else ""


def training_pace(run: RunFolder) -> Pace:
    """A first guess: the calls of the training, whose decoding and scoring are counted in."""
    rows = read_metrics(run.metrics)
    return Pace(calls=round(sum(row["evaluations"] for row in rows)), in_calls=sum(row["seconds"] for row in rows))


def _pictured(
    cfg: DistillConfig, loaded: LoadedStudent, requests: Sequence[Request], run: RunFolder, runtime: Runtime
) -> list[Request]:
    """The requests with the pictures that the run's clips start from, which are written beside the clips."""
    give_pictures(cfg, loaded.student)
    drawn = draw_pictures(loaded.student, [r.prompt for r in requests], cfg.seed, [r.index for r in requests])
    if drawn is None:
        return list(requests)
    first, last = drawn

    def written(pictures: Tensor | None, place: int, name: str) -> str | None:
        path = run.samples / "pictures" / name
        if pictures is not None and runtime.is_main:
            write_png(pictures[place], path)
        return None if pictures is None else str(path)

    pictured = [
        replace(
            request,
            image=written(first, place, f"{request.index:03d}-first.png"),
            last_image=written(last, place, f"{request.index:03d}-last.png"),
        )
        for place, request in enumerate(requests)
    ]
    runtime.barrier()
    return pictured


def _evaluate(cfg: DistillConfig, loaded: LoadedStudent, run: RunFolder, runtime: Runtime, pace: Pace) -> list[str]:
    """Evaluate, and send the means to the trackers."""
    lines = evaluate_files(cfg, loaded, runtime, seed=cfg.seed, output=run.evaluation, pace=pace)
    if runtime.is_main and cfg.tracking.trackers:
        trackers = Trackers(cfg, run)
        trackers.on_start({"step": cfg.training.steps})
        for row in read_rows(run.evaluation / "evaluation.json"):
            means = {f"evaluation/{row.arm}-{row.nfe}/{name}": value.mean for name, value in row.metrics.items()}
            trackers.log(means, cfg.training.steps)
        trackers.on_end()
    return lines
