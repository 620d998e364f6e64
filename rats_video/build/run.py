"""`distill`, and `run`: the whole workflow from one configuration into one folder, skipping what is done."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from rats_video.build.common import explain_memory, load_seeded, start_runtime, working_in
from rats_video.build.comparison import compare_files
from rats_video.build.compute import memory_advice
from rats_video.build.distill import prepare_run, train_student
from rats_video.build.evaluate import evaluate_files
from rats_video.build.finish import finish, is_finished
from rats_video.build.inference import LoadedStudent, load_student
from rats_video.build.real_data import pinned
from rats_video.build.sample import sample_files
from rats_video.config.distill import DistillConfig
from rats_video.config.load import load_config
from rats_video.datasets.prompts import load_prompts
from rats_video.evaluation.tables import read_rows
from rats_video.files import tidy
from rats_video.inference.requests import list_requests
from rats_video.runtime import Runtime
from rats_video.training.run_folder import RunFolder
from rats_video.training.trackers import Trackers


def run_distill(
    *,
    config: str,
    overrides: Sequence[str],
    output: Path,
    seed: int | None,
    device: str,
    resume: bool,
    overwrite: bool,
) -> list[str]:
    """Train a student into OUTPUT/student, with its metrics, checkpoints and training figure beside it."""
    cfg = pinned(load_seeded(DistillConfig, config, group="distill", overrides=overrides, seed=seed))
    run, runtime = RunFolder(output), start_runtime(device, cfg.parallel)
    with explain_memory(lambda: memory_advice(cfg)), working_in(output, runtime):
        student = train_student(cfg, run, runtime, resume=resume, overwrite=overwrite)
        runtime.close()  # nobody waits for the one that writes
        if runtime.is_main and student is not None:
            finish(cfg, run, student)
    return [f"student: {run.student}", f"training figure: {run.curves}"]


def run_all(
    *,
    config: str,
    overrides: Sequence[str],
    output: Path,
    seed: int | None,
    device: str,
    resume: bool,
    overwrite: bool,
    say: Callable[[str], None],
) -> None:
    """Distill, sample, compare and evaluate into OUTPUT; `say` is told what each step made.

    What the folder already holds of the same configuration is kept and gone on with.
    """
    cfg = pinned(load_seeded(DistillConfig, config, group="distill", overrides=overrides, seed=seed))
    run, runtime = RunFolder(output), start_runtime(device, cfg.parallel)
    with working_in(output, runtime):
        say("1/4 distill")
        before = _distill(cfg, run, runtime, say, resume=resume, overwrite=overwrite)
        if runtime.serves_reward:  # nothing more to do, and no part in what the others do together
            runtime.close()
            return
        runtime.wait()
        loaded = load_student(output, runtime.device)
        for name, made, step in _steps(cfg, loaded, run, runtime):
            say(name)
            is_done = runtime.agree(before == cfg and made.is_file())
            if not is_done and runtime.is_main:  # missing, made with another student, or judged in another way
                made.unlink(missing_ok=True)
                tidy(made.parent)
            for line in [f"done before: {made.parent}"] if is_done else step():
                say(f"    {line}")
        say(f"Look first at {run.comparison} (videos), {run.curves} and {run.evaluation / 'evaluation.md'}")
        runtime.close()


def _distill(
    cfg: DistillConfig, run: RunFolder, runtime: Runtime, say: Callable[[str], None], *, resume: bool, overwrite: bool
) -> DistillConfig | None:
    """Train and finish, unless that is done; returns the configuration it was done with before."""
    go_on = resume or (run.config.is_file() and not overwrite)
    if not (go_on and is_finished(cfg, run)):
        with explain_memory(lambda: memory_advice(cfg)):
            student = train_student(cfg, run, runtime, resume=go_on, overwrite=overwrite)
        if runtime.is_main and student is not None:
            finish(cfg, run, student)
        say(f"    student: {run.student}")
        say(f"    training figure: {run.curves}")
        return None
    before = load_config(DistillConfig, str(run.config.resolve()), group="distill")
    if not runtime.serves_reward:
        runtime.wait()
    if runtime.is_main:
        prepare_run(cfg, run, resume=True, overwrite=False)
    say(f"    done before: {run.student}")
    return before


def _steps(
    cfg: DistillConfig, loaded: LoadedStudent, run: RunFolder, runtime: Runtime
) -> list[tuple[str, Path, Callable[[], list[str]]]]:
    """What follows the training: its title, the file it writes last, and itself."""
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
    """Evaluate, and let the trackers know."""
    lines = evaluate_files(cfg, loaded, runtime, seed=cfg.seed, output=run.evaluation)
    if runtime.is_main and cfg.tracking.trackers:
        trackers = Trackers(cfg, run)
        trackers.begin({"step": cfg.training.steps})
        for row in read_rows(run.evaluation / "evaluation.json"):
            means = {f"evaluation/{row.arm}-{row.nfe}/{name}": value.mean for name, value in row.metrics.items()}
            trackers.log(means, cfg.training.steps)
        trackers.end()
    return lines
