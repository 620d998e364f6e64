"""`distill`, and `run`: the whole workflow from one configuration into one folder, skipping what is done."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from rats_video.commands.device import start_runtime
from rats_video.commands.distill import train_and_finish
from rats_video.commands.evaluate import evaluate_files
from rats_video.commands.export_comparison import compare_files
from rats_video.commands.folders import locked_output
from rats_video.commands.sample import sample_files
from rats_video.commands.students import LoadedStudent, load_student
from rats_video.config.load import load_seeded
from rats_video.datasets.prompts.split import load_prompts
from rats_video.distillation.real_data import with_data_digest
from rats_video.distillation.settings import DistillConfig
from rats_video.evaluation.tables import read_rows
from rats_video.files import tidy
from rats_video.inference.requests import list_requests
from rats_video.runtime import Runtime
from rats_video.training.run_folder import RunFolder
from rats_video.training.trackers import Trackers


def run_all(
    *,
    config: str,
    overrides: Sequence[str],
    output: Path,
    seed: int | None,
    device: str,
    resume: bool,
    overwrite: bool,
    echo: Callable[[str], None],
) -> None:
    """Distill, sample, compare and evaluate into OUTPUT; `echo` gets the lines of each step.

    Finished steps of the same configuration are kept, and an unfinished one is continued.
    """
    cfg = with_data_digest(load_seeded(DistillConfig, config, group="distill", overrides=overrides, seed=seed))
    run, runtime = RunFolder(output), start_runtime(device, cfg.parallel)
    with locked_output(output, runtime):
        echo("1/4 distill")
        before = train_and_finish(cfg, run, runtime, echo, resume=resume, overwrite=overwrite)
        if runtime.serves_reward:  # it takes no part in what follows
            runtime.close()
            return
        runtime.barrier()
        loaded = load_student(output, runtime.device)
        for name, made, step in _steps(cfg, loaded, run, runtime):
            echo(name)
            is_done = runtime.broadcast(before == cfg and made.is_file())
            if not is_done and runtime.is_main:  # missing, made with another student, or judged in another way
                made.unlink(missing_ok=True)
                tidy(made.parent)
            for line in [f"done before: {made.parent}"] if is_done else step():
                echo(f"    {line}")
        echo(f"Look first at {run.comparison} (videos), {run.curves} and {run.evaluation / 'evaluation.md'}")
        runtime.close()


def _steps(
    cfg: DistillConfig, loaded: LoadedStudent, run: RunFolder, runtime: Runtime
) -> list[tuple[str, Path, Callable[[], list[str]]]]:
    """The steps after the training: title, the file written last, and function."""
    heldout = load_prompts(cfg.prompts).heldout
    spec = loaded.spec(loaded.card.num_steps[0])
    prompts = [heldout[i % len(heldout)] for i in range(cfg.comparison.num_videos)]
    requests = list_requests(prompts, nfe=spec.nfe, seed=cfg.seed)
    return [
        (
            "2/4 sample",
            run.samples / "manifest.json",
            lambda: sample_files(loaded, requests, runtime, output=run.samples, overwrite=True),
        ),
        (
            "3/4 export comparison",
            run.comparison / "index.json",
            lambda: compare_files(cfg, loaded, prompts, spec, runtime, seed=cfg.seed, output=run.comparison),
        ),
        (
            "4/4 evaluate",
            run.evaluation / "evaluation.json",
            lambda: _evaluate(cfg, loaded, run, runtime),
        ),
    ]


def _evaluate(cfg: DistillConfig, loaded: LoadedStudent, run: RunFolder, runtime: Runtime) -> list[str]:
    """Evaluate, and send the means to the trackers."""
    lines = evaluate_files(cfg, loaded, runtime, seed=cfg.seed, output=run.evaluation)
    if runtime.is_main and cfg.tracking.trackers:
        trackers = Trackers(cfg, run)
        trackers.on_start({"step": cfg.training.steps})
        for row in read_rows(run.evaluation / "evaluation.json"):
            means = {f"evaluation/{row.arm}-{row.nfe}/{name}": value.mean for name, value in row.metrics.items()}
            trackers.log(means, cfg.training.steps)
        trackers.on_end()
    return lines
