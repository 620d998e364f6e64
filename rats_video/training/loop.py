"""The training loop of `distill`."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rats_video.config.distill import DistillConfig, EmaTeacher, TrainingConfig
from rats_video.distill.finite import SKIPPED
from rats_video.distill.method import Method
from rats_video.distill.step import Rats
from rats_video.runtime import ALONE, Runtime
from rats_video.training.anchor import Anchor
from rats_video.training.batches import draw_batch, take
from rats_video.training.checkpoint import CheckpointWriter, resume
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
    method: Method,
    cfg: DistillConfig,
    prompts: Sequence[str],
    run: RunFolder,
    runtime: Runtime = ALONE,
    guard: Guard | None = None,
) -> None:
    """Train `method.student` in place for `cfg.training.steps` steps, continuing from the newest checkpoint if any.

    A step with a fault is left out; after too many the run continues from an earlier checkpoint (`training.faults`).

    The guard looks before the first step, every few steps and after the last; it may end the run before that.

    All processes of `runtime` call it together. Each works on its rows of the same global batch, and whatever is
    decided on the way is decided on values that are the same on all of them.

    Raises:
        UserError: there were too many faults (the last good checkpoint stands), or a checkpoint cannot be written.
        Interrupted: somebody asked to stop; the step was finished and saved.
    """
    faults = FaultPolicy(cfg.training.faults, runtime)
    anchor = Anchor(method.student.weights) if guard is not None or cfg.method.drift_weight else None
    watch = _Watch(guard, anchor, cfg.training.steps, runtime)
    with StopRequest() as stop:
        while True:  # going back is resuming from an earlier checkpoint
            try:
                return _train(method, cfg, prompts, run, runtime, watch, faults, stop)
            except RollBack as back:
                faults.go_back(run.checkpoints, back)


def _train(
    method: Method,
    cfg: DistillConfig,
    prompts: Sequence[str],
    run: RunFolder,
    runtime: Runtime,
    watch: _Watch,
    faults: FaultPolicy,
    stop: StopRequest,
) -> None:
    """Train from the newest checkpoint; raises RollBack where an earlier one must be taken."""
    training, reuse = cfg.training, cfg.teacher.reuse
    method.student.denoiser.train()
    student = method.student.weights
    ema = method.teacher.backbone.weights if isinstance(cfg.teacher, EmaTeacher) else None
    optimizer = build_optimizer(training.optimizer, student.values())
    companions = {name: build_optimizer(c.optimizer, c.weights.values()) for name, c in method.companions.items()}
    beside = {name: (c.weights, companions[name]) for name, c in method.companions.items()}
    state = resume(run.checkpoints, student, ema, optimizer, runtime, _is_exact(training.steps, reuse), beside)
    start = state["step"]
    faults.recall(state)
    method.follow(start, resumed=True)
    metrics = MetricsFile(run.metrics, start) if runtime.is_main else None
    skipped = SkippedClips(training, int(runtime.agree(metrics.total(SKIPPED) if metrics else 0.0)))
    check = PlanCheck(run.plan, method.student.device, training.steps - start) if runtime.is_main else None
    updater = Updater(cfg, optimizer, companions, runtime, skipped, watch.anchor, faults)
    watch.begin(method, state)
    if start < training.steps and runtime.any(stop.requested):  # meanwhile
        stop.end(f"stopped before step {start + 1}", runtime)
    with (
        ProgressBar("distill", training.steps, start) as progress,
        CheckpointWriter(run.checkpoints, _num_kept(training, reuse), writes=runtime.is_main) as writer,
    ):
        for step in range(start, start if watch.stops else training.steps):
            began = time.perf_counter()
            batch = draw_batch(method.student, cfg, prompts, step)
            row = updater.step(watch.guided(method), take(batch, runtime.rows(training.batch_size)), step)
            method.follow(step + 1, resumed=bool(row[LEFT_OUT]))
            seconds = time.perf_counter() - began
            saved = method.teacher.take_saved_seconds()
            if metrics is not None and check is not None:
                evaluations = cfg.evaluations(batch.num_steps)
                times = {"seconds": seconds} | ({"saved_seconds": saved} if saved else {})
                metrics.append({"step": step + 1, **row, "evaluations": evaluations, **times})
                check.step_done(seconds)
            progress.advance(**{shown: row[name] for shown, name in SHOWN.items() if name in row})
            watch.after(method, step + 1)
            is_last = step + 1 == training.steps or watch.stops
            is_stop = (step + 1) % reuse == 0 and runtime.any(stop.requested)
            if is_last or is_stop or _is_due(step + 1, training, reuse):
                writer.save(step + 1, student, ema, optimizer, watch.state | faults.state, beside)
                if is_last or is_stop:  # nobody leaves while the last checkpoint is being written
                    writer.wait()
                    runtime.wait()
                if is_stop and not is_last:
                    stop.end(f"stopped after step {step + 1}, which is saved", runtime)
            if is_last:
                break


# Saved only between teacher rollouts: one that is half used up would not be found again by a resumed run. The very last
# checkpoint may lie amid one; for a run that is made longer, the one before it stays.


def _is_due(step: int, cfg: TrainingConfig, reuse: int) -> bool:
    """Whether to save after a step: at the first chance from each multiple of `checkpoint_every` on; and the last."""
    passed = step // cfg.checkpoint_every > (step - reuse) // cfg.checkpoint_every
    return step % reuse == 0 and (passed or step + reuse > cfg.steps)


def _is_exact(last: int, reuse: int) -> Callable[[int], bool]:
    """Whether a run goes on exactly after a step, or is at its end."""
    return lambda step: step % reuse == 0 or step >= last


def _num_kept(cfg: TrainingConfig, reuse: int) -> int:
    return cfg.keep_checkpoints + (cfg.steps % reuse > 0)


@dataclass(frozen=True)
class _Watch:
    """The guard, if there is one."""

    guard: Guard | None
    anchor: Anchor | None
    steps: int
    runtime: Runtime

    def begin(self, method: Method, state: Mapping[str, Any]) -> None:
        if self.guard is not None:
            if "guard" in state:
                self.guard.recall(state["guard"])
            self.after(method, state["step"])

    def after(self, method: Method, step: int) -> None:
        if self.guard is not None and self.anchor is not None and self.guard.is_due(step, self.steps):
            self.guard.look(method, step, self.anchor.drift(self.runtime))

    @property
    def state(self) -> dict[str, Any]:
        return {} if self.guard is None else {"guard": self.guard.record}

    def guided(self, method: Method) -> Method:
        """RATS with its shaping as strong as the guard wants it."""
        if self.guard is None or not isinstance(method, Rats):
            return method
        return replace(method, shaping_strength=self.guard.shaping)

    @property
    def stops(self) -> bool:
        return self.guard is not None and self.guard.stops
