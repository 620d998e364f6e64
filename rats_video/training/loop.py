"""The training loop of `distill`."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from rats_video.methods.base import Method
from rats_video.methods.teacher import EmaTeacherConfig
from rats_video.optim import build_optimizer
from rats_video.runtime import ALONE, Runtime
from rats_video.timing import phase
from rats_video.training.anchor import InitialWeights
from rats_video.training.asking import AskedShare
from rats_video.training.batches import draw_batch, slice_batch, with_pictures
from rats_video.training.callbacks import Callback, CallbackList, GuardCallback
from rats_video.training.checkpoint import CheckpointWriter
from rats_video.training.faults import SKIPPED_STEP, FaultPolicy, RollBack
from rats_video.training.guard import Guard
from rats_video.training.interrupt import StopRequest
from rats_video.training.metrics import MetricsFile
from rats_video.training.plan_check import PlanCheck
from rats_video.training.restore import resume
from rats_video.training.run_folder import RunFolder
from rats_video.training.settings import RunSettings, TrainingConfig
from rats_video.training.skipped import SkippedClips
from rats_video.training.update import Updater


def train_loop(
    method: Method,
    cfg: RunSettings,
    prompts: Sequence[str],
    run: RunFolder,
    runtime: Runtime = ALONE,
    guard: Guard | None = None,
    callbacks: Sequence[Callback] = (),
) -> None:
    """Train `method.student` in place for `cfg.training.steps` steps, continuing from the newest checkpoint if any.

    A faulty step is skipped; after too many the run rolls back to an earlier checkpoint (`training.faults`).

    The guard evaluates the student before the first step, every few steps and after the last; it may end the run
    earlier. `callbacks` are called after each step and only observe.

    All processes of `runtime` call it together. Each works on its rows of the same global batch, and all decisions
    depend on values that are the same on all processes.

    Raises:
        UserError: there were too many faults (the last good checkpoint stands), or a checkpoint cannot be written.
        Interrupted: somebody asked to stop; the step was finished and saved.
    """
    faults = FaultPolicy(cfg.training.faults, runtime)
    anchor = InitialWeights(method.student.weights) if guard is not None or cfg.method.drift_weight else None
    watch = GuardCallback(guard, anchor, method, cfg.training.steps, runtime)
    with StopRequest() as stop, CallbackList(callbacks) as all_callbacks:
        while True:  # to roll back is to resume from an earlier checkpoint
            try:
                return _train(method, cfg, prompts, run, runtime, watch, all_callbacks, faults, stop)
            except RollBack as back:
                faults.roll_back(run.checkpoints, back)


def _train(
    method: Method,
    cfg: RunSettings,
    prompts: Sequence[str],
    run: RunFolder,
    runtime: Runtime,
    watch: GuardCallback,
    callbacks: CallbackList,
    faults: FaultPolicy,
    stop: StopRequest,
) -> None:
    """Train from the newest checkpoint; raises RollBack where an earlier one must be taken."""
    training, reuse = cfg.training, cfg.teacher.reuse
    method.student.denoiser.train()
    student = method.student.weights
    ema = method.teacher.backbone.weights if isinstance(cfg.teacher, EmaTeacherConfig) else None
    optimizer = build_optimizer(training.optimizer, student.values())
    critics = {name: build_optimizer(c.optimizer, c.weights.values()) for name, c in method.critics.items()}
    trained = {name: (c.weights, critics[name]) for name, c in method.critics.items()}
    state = resume(run.checkpoints, student, ema, optimizer, runtime, _is_exact(training.steps, reuse), trained)
    start = state["step"]
    faults.load_state(state)
    method.update_ema(start, resumed=True)
    metrics = MetricsFile(run.metrics, start) if runtime.is_main else None
    skipped = SkippedClips.since(training, metrics, runtime)
    check = PlanCheck(run.plan, method.student.device, training.steps - start) if runtime.is_main else None
    updater = Updater(cfg, optimizer, critics, runtime, skipped, watch.anchor, faults)
    asked = AskedShare(cfg, state)
    watch.on_start(state)
    callbacks.on_start(state)
    if start < training.steps and runtime.any(stop.requested):  # meanwhile
        stop.end(f"stopped before step {start + 1}", runtime)
    with CheckpointWriter(run.checkpoints, _num_kept(training, reuse), runtime) as writer:
        for step in range(start, start if watch.stops else training.steps):
            began = time.perf_counter()
            batch = asked.draw(draw_batch(method.student, cfg, prompts, step))
            mine = slice_batch(batch, runtime.rows(training.batch_size))
            row = updater.step(watch.guided_method, with_pictures(mine, method.student, cfg.clip.spec), step)
            method.update_ema(step + 1, resumed=bool(row[SKIPPED_STEP]))
            seconds = time.perf_counter() - began
            row |= asked.learned(row, batch) | {"seconds": seconds} | method.teacher.take_saved_seconds()
            if metrics is not None and check is not None:
                metrics.append({"step": step + 1, **row})
                check.step_done(seconds)
            callbacks.on_step(step + 1, row)
            watch.on_step(step + 1)
            writer.check()
            is_last = step + 1 == training.steps or watch.stops
            is_stop = (step + 1) % reuse == 0 and runtime.any(stop.requested)
            if is_last or is_stop or _is_due(step + 1, training, reuse):
                with phase("saving"):
                    callbacks.on_checkpoint()
                    writer.save(step + 1, student, ema, optimizer, watch.state | faults.state | asked.state, trained)
                if is_last or is_stop:  # nobody leaves while the last checkpoint is being written
                    writer.finish()
                if is_stop and not is_last:
                    stop.end(f"stopped after step {step + 1}, which is saved", runtime)
            if is_last:
                break


# Checkpoints are written only after the last of the `reuse` updates that share a teacher rollout, because rollouts are
# not saved. The final checkpoint may be an exception; the one before it is kept for a run that is made longer.


def _is_due(step: int, cfg: TrainingConfig, reuse: int) -> bool:
    """True if a step is saved: the first possible one from each multiple of `checkpoint_every` on, and the last one."""
    passed = step // cfg.checkpoint_every > (step - reuse) // cfg.checkpoint_every
    return step % reuse == 0 and (passed or step + reuse > cfg.steps)


def _is_exact(last: int, reuse: int) -> Callable[[int], bool]:
    """A test of steps: True where a run can be resumed exactly, or has ended."""
    return lambda step: step % reuse == 0 or step >= last


def _num_kept(cfg: TrainingConfig, reuse: int) -> int:
    return cfg.keep_checkpoints + (cfg.steps % reuse > 0)
