"""The training loop of `distill`."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

from rats_video.config.distill import DistillConfig, EmaTeacher
from rats_video.distill.finite import SKIPPED
from rats_video.distill.step import Rats
from rats_video.errors import Interrupted
from rats_video.runtime import ALONE, Runtime
from rats_video.training.anchor import Anchor
from rats_video.training.batches import draw_batch, take
from rats_video.training.checkpoint import CheckpointWriter, list_checkpoints, load_checkpoint
from rats_video.training.faults import LEFT_OUT, FaultPolicy, RollBack
from rats_video.training.first_step import PlanCheck
from rats_video.training.guard import Guard
from rats_video.training.interrupt import StopRequest
from rats_video.training.metrics import MetricsFile
from rats_video.training.optim import build_optimizer
from rats_video.training.progress import ProgressBar
from rats_video.training.run_folder import RunFolder
from rats_video.training.skipped import SkippedClips
from rats_video.training.update import Updater

SHOWN = {"reward": "reward/student", "teacher": "reward/teacher", "gate": "gate/weight", "loss": "loss"}
"""What the progress bar shows of a row; one of a step that was left out has none of it."""


def train_loop(
    rats: Rats,
    cfg: DistillConfig,
    prompts: Sequence[str],
    run: RunFolder,
    runtime: Runtime = ALONE,
    guard: Guard | None = None,
) -> None:
    """Train `rats.student` in place for `cfg.training.steps` steps, continuing from the newest checkpoint if any.

    A step with a fault is left out; after too many the run continues from an earlier checkpoint (`training.faults`).

    The guard looks before the first step, every few steps and after the last; it may end the run before that.

    All processes of `runtime` call it together. Each works on its rows of the same global batch, and whatever is
    decided on the way is decided on values that are the same on all of them.

    Raises:
        UserError: there were too many faults (the last good checkpoint stands), or a checkpoint cannot be written.
        Interrupted: the user asked to stop; the step was finished and saved.
    """
    faults = FaultPolicy(cfg.training.faults, runtime)
    anchor = Anchor(rats.student.weights) if guard is not None or cfg.method.drift_weight else None
    watch = _Watch(guard, anchor, cfg.training.steps, runtime)
    with StopRequest() as stop:
        while True:  # going back is resuming from an earlier checkpoint
            try:
                return _train(rats, cfg, prompts, run, runtime, watch, faults, stop)
            except RollBack as back:
                faults.go_back(run.checkpoints, back)


def _train(
    rats: Rats,
    cfg: DistillConfig,
    prompts: Sequence[str],
    run: RunFolder,
    runtime: Runtime,
    watch: _Watch,
    faults: FaultPolicy,
    stop: StopRequest,
) -> None:
    """Train from the newest checkpoint; raises RollBack where an earlier one must be taken."""
    training = cfg.training
    rats.student.denoiser.train()
    student = rats.student.weights
    ema = rats.teacher.backbone.weights if isinstance(cfg.teacher, EmaTeacher) else None
    optimizer = build_optimizer(training.optimizer, student.values())
    saved = list_checkpoints(run.checkpoints)
    state = load_checkpoint(saved[-1], student, ema, optimizer) if saved else {"step": 0}
    start = state["step"]
    faults.recall(state)
    rats.teacher.follow(rats.student, start, resumed=True)
    metrics = MetricsFile(run.metrics, start) if runtime.is_main else None
    skipped = SkippedClips(training, int(runtime.agree(metrics.total(SKIPPED) if metrics else 0.0)))
    check = PlanCheck(run.plan, rats.student.device, training.steps - start) if runtime.is_main else None
    updater = Updater(cfg, optimizer, runtime, skipped, watch.anchor, faults)
    is_due = False
    watch.begin(rats, start)
    with (
        ProgressBar("distill", training.steps, start) as progress,
        CheckpointWriter(run.checkpoints, training.keep_checkpoints, writes=runtime.is_main) as writer,
    ):
        for step in range(start, start if watch.stops else training.steps):
            began = time.perf_counter()
            batch = take(draw_batch(rats.student, cfg, prompts, step), runtime.rows(training.batch_size))
            row = updater.step(watch.guided(rats), batch, step)
            rats.teacher.follow(rats.student, step + 1, resumed=bool(row[LEFT_OUT]))
            seconds = time.perf_counter() - began
            if metrics is not None and check is not None:
                metrics.append({"step": step + 1, **row, "seconds": seconds})
                check.step_done(seconds)
            progress.advance(**{shown: row[name] for shown, name in SHOWN.items() if name in row})
            watch.after(rats, step + 1)
            is_last = step + 1 == training.steps or watch.stops
            # Saved only between teacher rollouts: one that is half used up would not be found again by a resumed run.
            is_whole = (step + 1) % cfg.teacher.reuse == 0
            is_stop = runtime.any(stop.requested)
            is_due = is_due or is_stop or (step + 1) % training.checkpoint_every == 0
            if is_last or (is_due and is_whole):
                writer.save(step + 1, student, ema, optimizer, faults.state)
                is_due = False
                if is_last or is_stop:  # nobody leaves while the last checkpoint is being written
                    writer.wait()
                    runtime.wait()
                if is_stop and not is_last:
                    raise Interrupted(f"stopped after step {step + 1}, which is saved; --resume goes on from there")
            if is_last:
                break


@dataclass(frozen=True)
class _Watch:
    """The guard, if there is one."""

    guard: Guard | None
    anchor: Anchor | None
    steps: int
    runtime: Runtime

    def begin(self, rats: Rats, start: int) -> None:
        if self.guard is not None:
            self.guard.recall(start)
            self.after(rats, start)

    def after(self, rats: Rats, step: int) -> None:
        if self.guard is not None and self.anchor is not None and self.guard.is_due(step, self.steps):
            self.guard.look(rats, step, self.anchor.drift(self.runtime))

    def guided(self, rats: Rats) -> Rats:
        return rats if self.guard is None else replace(rats, shaping_strength=self.guard.shaping)

    @property
    def stops(self) -> bool:
        return self.guard is not None and self.guard.stops
