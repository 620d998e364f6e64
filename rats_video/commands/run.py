"""`distill`, and `run`: the whole workflow from one configuration into one folder, skipping what is done."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from rats_video.commands.device import start_runtime
from rats_video.commands.distill import train_and_finish
from rats_video.commands.folders import locked_output
from rats_video.commands.pins import pin_models
from rats_video.commands.run_steps import Forecast, in_all, steps_after_training, work_after_training
from rats_video.commands.students import load_student
from rats_video.config.load import load_seeded
from rats_video.distillation.real_data import with_data_digest
from rats_video.distillation.settings import DistillConfig
from rats_video.files import tidy
from rats_video.progress import followed_by
from rats_video.training.callbacks import StepCallback
from rats_video.training.metrics import read_metrics
from rats_video.training.run_folder import RunFolder


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
    run = RunFolder(output)
    given = load_seeded(DistillConfig, config, group="distill", overrides=overrides, seed=seed)
    cfg = with_data_digest(pin_models(given, None if overwrite else run.config))
    runtime = start_runtime(device, cfg.parallel)
    with locked_output(output, runtime):
        echo("1/4 distill")
        work = work_after_training(cfg)
        forecast = Forecast(runtime.trainers, work)
        with followed_by(forecast.seconds):
            before = train_and_finish(
                cfg, run, runtime, echo, resume=resume, overwrite=overwrite,
                observers=[StepCallback(forecast.learn)],
            )  # fmt: skip
        if runtime.serves_reward:  # it takes no part in what follows
            runtime.close()
            return
        runtime.barrier()
        loaded = load_student(output, runtime.device)
        if not forecast.training.calls:  # it was trained before
            for row in read_metrics(run.metrics):
                forecast.learn(int(row["step"]), row)
        steps = steps_after_training(cfg, loaded, run, runtime, forecast.clips)
        # Missing, made with another student, or judged in another way.
        to_do = runtime.broadcast([before != cfg or not step.made.is_file() for step in steps])
        for index, step in enumerate(steps):
            forecast.coming = [made for made, is_due in zip(work[index:], to_do[index:], strict=True) if is_due]
            echo(f"{step.name}{in_all(forecast.seconds())}")
            if not to_do[index]:
                echo(f"    done before: {step.made.parent}")
                continue
            if runtime.is_main:
                step.made.unlink(missing_ok=True)
                tidy(step.made.parent)
            forecast.coming = forecast.coming[1:]
            with followed_by(forecast.seconds):
                lines = step.make()
            for line in lines:
                echo(f"    {line}")
        echo(f"Look first at {run.comparison} (videos), {run.curves} and {run.evaluation / 'evaluation.md'}")
        runtime.close()
