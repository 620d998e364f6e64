"""The steps of `run` that follow the training, and the time that all of them will take."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
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
from rats_video.methods.base import LogRow
from rats_video.progress import Pace, format_seconds
from rats_video.runtime import Runtime
from rats_video.training.run_folder import RunFolder
from rats_video.training.trackers import Trackers


class Work(NamedTuple):
    """What a step makes: network calls, of one clip each, and clips."""

    calls: int
    clips: int


class RunStep(NamedTuple):
    """A step after the training: title, the file written last, function."""

    name: str
    made: Path
    make: Callable[[], list[str]]


def work_after_training(cfg: DistillConfig) -> list[Work]:
    """What the steps after the training make: sample, compare, evaluate."""
    options, videos, nfe = cfg.evaluation, cfg.comparison.num_videos, cfg.student.num_steps[0]
    teacher = cfg.judged_teacher.nfe
    judged = options.num_clips + len(once_more(cfg, cycle(load_prompts(cfg.prompts).heldout, options.num_clips)))
    judged += options.latency_clips
    return [
        Work(videos * nfe, videos),
        Work(videos * (teacher + 2 * nfe), videos * 3),
        Work(judged * (teacher + 2 * sum(options.nfe)), judged * (1 + 2 * len(options.nfe))),
    ]


@dataclass
class Forecast:
    """The time of what is to come: by the training's calls at first, by the clips of its own kind once some are made.

    Args:
        processes: that share the work.
        coming: what is to come.
        training: the pace of the training's calls, of one process; their decoding and scoring are counted in.
        clips: the pace of the clips made after it, of one process.
    """

    processes: int
    coming: Sequence[Work]
    training: Pace = field(default_factory=Pace)
    clips: Pace = field(default_factory=Pace)

    def learn(self, _step: int, row: LogRow) -> None:
        """Count a training step by its log row, whose calls are those of all processes."""
        self.training.add(round(row["evaluations"]), 0, row["seconds"] * self.processes, 0.0)

    def seconds(self) -> float | None:
        """The seconds of what is to come; None before the first training step."""
        pace = self.clips if self.clips.clips else self.training
        if not pace.calls:
            return None
        return pace.seconds(sum(w.calls for w in self.coming), sum(w.clips for w in self.coming)) / self.processes


def steps_after_training(
    cfg: DistillConfig, loaded: LoadedStudent, run: RunFolder, runtime: Runtime, pace: Pace
) -> list[RunStep]:
    """Sample, compare and evaluate; `pace` learns from the clips that they make."""
    heldout = load_prompts(cfg.prompts).heldout
    spec = loaded.spec(loaded.card.num_steps[0])
    prompts = cycle(heldout, cfg.comparison.num_videos)
    requests = list_requests(prompts, nfe=spec.nfe, seed=cfg.seed)
    return [
        RunStep(
            "2/4 sample", run.samples / "manifest.json",
            lambda: sample_files(
                loaded, _pictured(cfg, loaded, requests, run, runtime), runtime, output=run.samples, overwrite=True
            ),
        ),
        RunStep(
            "3/4 export comparison", run.comparison / "index.json",
            lambda: compare_files(
                cfg, loaded, prompts, spec, runtime, seed=cfg.seed, output=run.comparison, pace=pace
            ),
        ),
        RunStep(
            "4/4 evaluate", run.evaluation / "evaluation.json", lambda: _evaluate(cfg, loaded, run, runtime, pace)
        ),
    ]  # fmt: skip


def in_all(seconds: float | None) -> str:
    """The time left of the whole run, as a remark; nothing where nothing is left or nobody knows."""
    return f" (about {format_seconds(seconds)} left in all)" if seconds else ""


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
