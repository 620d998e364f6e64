"""`distill`: trains a student and finishes its folder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from rats_video.commands.device import explain_memory, start_runtime
from rats_video.commands.finish import finish, is_finished
from rats_video.commands.folders import locked_output
from rats_video.commands.pins import pin_models
from rats_video.commands.start_run import prepare_run
from rats_video.commands.train_student import train_student
from rats_video.config.load import load_config, load_seeded
from rats_video.distillation.compute import memory_advice
from rats_video.distillation.real_data import with_data_digest
from rats_video.distillation.settings import DistillConfig
from rats_video.methods.base import LogRow
from rats_video.runtime import Runtime
from rats_video.training.callbacks import Callback, StepCallback
from rats_video.training.run_folder import RunFolder


def run_distill(
    *,
    config: str,
    overrides: Sequence[str],
    output: Path,
    seed: int | None,
    device: str,
    resume: bool,
    overwrite: bool,
    on_step: Callable[[int, LogRow], None] | None = None,
) -> list[str]:
    """Train a student into OUTPUT/student, with its metrics, checkpoints and training figure beside it.

    `on_step` gets each step's number and log row.
    """
    run = RunFolder(output)
    given = load_seeded(DistillConfig, config, group="distill", overrides=overrides, seed=seed)
    cfg = with_data_digest(pin_models(given, run.config if resume else None))
    runtime = start_runtime(device, cfg.parallel)
    with explain_memory(lambda: memory_advice(cfg)), locked_output(output, runtime):
        observers = [] if on_step is None else [StepCallback(on_step)]
        student = train_student(cfg, run, runtime, resume=resume, overwrite=overwrite, observers=observers)
        runtime.close()  # no process waits for the one that writes
        if runtime.is_main and student is not None:
            finish(cfg, run, student)
    return [f"student: {run.student}", f"training figure: {run.curves}"]


def train_and_finish(
    cfg: DistillConfig,
    run: RunFolder,
    runtime: Runtime,
    echo: Callable[[str], None],
    *,
    resume: bool,
    overwrite: bool,
    observers: Sequence[Callback] = (),
) -> DistillConfig | None:
    """Train and finish, unless that is done; then returns the configuration of the finished run."""
    go_on = resume or (run.config.is_file() and not overwrite)
    if not (go_on and is_finished(cfg, run)):
        with explain_memory(lambda: memory_advice(cfg)):
            student = train_student(cfg, run, runtime, resume=go_on, overwrite=overwrite, observers=observers)
        if runtime.is_main and student is not None:
            finish(cfg, run, student)
        echo(f"    student: {run.student}")
        echo(f"    training figure: {run.curves}")
        return None
    before = load_config(DistillConfig, str(run.config.resolve()), group="distill")
    if not runtime.serves_reward:
        runtime.barrier()
    if runtime.is_main:
        prepare_run(cfg, run, resume=True, overwrite=False)
    echo(f"    done before: {run.student}")
    return before
