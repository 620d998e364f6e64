"""Trains a student: settings in, a trained student's folder out."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from rats_video.backbones.base import PipelineBackbone
from rats_video.commands.start_run import prepare_run, record_start
from rats_video.distillation.callbacks import build_callbacks
from rats_video.distillation.checks import check_horizons
from rats_video.distillation.compute import cached_text, save_text
from rats_video.distillation.guard import build_guard
from rats_video.distillation.method import build_method
from rats_video.distillation.parallel import serve_rewards
from rats_video.distillation.roles import build_backbone, build_roles, checked_prompts
from rats_video.distillation.run_rewards import check_rewards, load_run_rewards
from rats_video.distillation.settings import DistillConfig
from rats_video.errors import UserError
from rats_video.files import write_json
from rats_video.planning.runs import can_plan, plan_of_run
from rats_video.rewards.remote import RemoteReward
from rats_video.runtime import Runtime
from rats_video.training.callbacks import Callback, StudentSnapshots
from rats_video.training.loop import train_loop
from rats_video.training.run_folder import RunFolder
from rats_video.training.trackers import check_trackers


def train_student(
    cfg: DistillConfig,
    run: RunFolder,
    runtime: Runtime,
    *,
    resume: bool,
    overwrite: bool,
    milestones: Collection[int] = (),
    observers: Sequence[Callback] = (),
) -> PipelineBackbone | None:
    """Train a student; all mistakes in the configuration are found before the folder is touched.

    Snapshots are saved after each of the `milestones`; `observers` are told of each step last.

    Returns:
        The student, which only its checkpoints hold whole if its weights are split; None on a reward rank.
    """
    if runtime.serves_reward:
        serve_rewards(cfg, runtime)
        return None
    for steps in cfg.student.num_steps:
        check_horizons(cfg, steps)
    if cfg.parallel.shard and runtime.trainers == 1:
        raise UserError(
            "one process has nobody to share the weights with",
            where="parallel.shard",
            fix="start more: rats-video distill --gpus N --nodes M; or set parallel.shard=false",
        )
    check_trackers(cfg.tracking.trackers)
    rows = runtime.rows(cfg.training.batch_size)
    cfg.training.num_micro_batches(rows.stop - rows.start)
    # The base has no name here, so that its memory is freed where both roles have weights of their own.
    text = cached_text(cfg, run.text)
    student, teacher = build_roles(cfg, build_backbone(cfg, runtime.device, text=text))
    prompts = checked_prompts(cfg, student)
    method = build_method(cfg, student, teacher, runtime)
    try:
        rewards = None
        if not isinstance(method.reward, RemoteReward):  # its own process has checked it
            everything = (*prompts.train, *prompts.heldout)
            rewards = check_rewards(cfg, method.reward, everything, runtime.device, student.latent_shape(cfg.clip.spec))
        if cfg.guard is not None or cfg.validation is not None:
            rewards = rewards or load_run_rewards(cfg, method.reward, runtime.device)
        guard = None
        if cfg.guard is not None and rewards is not None:
            guard = build_guard(cfg, cfg.guard, rewards, prompts.heldout, run, runtime)
        callbacks = build_callbacks(cfg, rewards, student, prompts.heldout, run, guard, runtime)
        callbacks += [StudentSnapshots(milestones, student.weights, run, runtime), *observers]
        del rewards  # frees the models that nothing else holds
        runtime.barrier()  # no process changes the folder before all have read it
        if runtime.is_main:
            goes_on = prepare_run(cfg, run, resume=resume, overwrite=overwrite)
            save_text(cfg, student, run.text)
            if can_plan(cfg) and not (goes_on and run.plan.is_file()):
                shares = runtime.trainers // runtime.context
                write_json(run.plan, plan_of_run(cfg, runtime.device, shares))
            record_start(cfg, run, student, runtime)
        runtime.barrier()
        train_loop(method, cfg, prompts.train, run, runtime, guard, callbacks)
    finally:
        if isinstance(method.reward, RemoteReward):
            method.reward.close()
    return student
