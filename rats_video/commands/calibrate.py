"""`calibrate`: measures how a run's reward tells its teacher from the untrained student, and sets the run's scales."""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from rats_video.backbones.compute import ParallelConfig
from rats_video.commands.calibrate_arms import CalibrationScores, scaled_sum, score_arms, with_sum
from rats_video.commands.device import explain_memory, pick_device
from rats_video.config.load import check_extension, load_config, write_extension
from rats_video.distillation.compute import memory_advice
from rats_video.distillation.method import build_rats, rats_of
from rats_video.distillation.roles import build_backbone, build_roles, checked_prompts
from rats_video.distillation.run_rewards import check_rewards
from rats_video.distillation.settings import DistillConfig
from rats_video.errors import UserError, warn
from rats_video.evaluation.calibration import (
    GATE_AT_START,
    ScoreGap,
    opposed_frames,
    significant,
    tau_for,
)
from rats_video.evaluation.tables import aligned
from rats_video.methods.gate import SigmoidGateConfig, build_gate
from rats_video.methods.rats import Rats
from rats_video.methods.teacher import FrozenTeacherConfig, TeacherSampler
from rats_video.rewards.base import is_differentiable
from rats_video.rewards.sum import SumReward
from rats_video.training.batches import draw_batch, with_pictures
from rats_video.training.update import accumulate_gradient

REWARD_TO_SHAPING = 18.0
"""Norm of the reward's gradient over that of gated shaping, at the start; the value of `tiny` (10 to 30 a batch)."""
NUM_BATCHES = 4  # that the gradients are measured on
OPPOSED = 0.4  # share of frames that contradict their clip; half of them would by chance


def run_calibrate(
    *, config: str, overrides: Sequence[str], num_prompts: int, output: Path, device: str, overwrite: bool
) -> list[str]:
    """Measure, and write a config that extends `config` by what follows; returns the lines to show."""
    cfg = load_config(DistillConfig, config, group="distill", overrides=overrides)
    rats_of(cfg)
    if output.exists() and not overwrite:
        raise UserError("already exists", where=str(output), fix="add --overwrite or another --output")
    check_extension(output, config)
    with explain_memory(lambda: memory_advice(cfg)):
        lines, changes = calibrate(cfg, num_prompts, pick_device(device))
    asked = shlex.join(["rats-video", "calibrate", "--config", config, *(w for o in overrides for w in ("--set", o))])
    write_extension(output, config, overrides, changes, [asked, *lines])
    load_config(DistillConfig, str(output.resolve()), group="distill")
    return [*lines, "", f"written: {output}; next: rats-video distill --config {output}"]


def calibrate(cfg: DistillConfig, num_prompts: int, device: torch.device) -> tuple[list[str], dict[str, Any]]:
    """The measurements, as lines, and the settings that follow from them, as a tree of the configuration's keys."""
    alone: dict[str, Any] = {"parallel": ParallelConfig()}
    if isinstance(cfg.teacher, FrozenTeacherConfig):
        alone["teacher"] = cfg.teacher.model_copy(update={"cache": None})
    cfg = cfg.model_copy(update=alone)
    student, teacher = build_roles(cfg, build_backbone(cfg, device))
    everything = checked_prompts(cfg, student)
    rats = build_rats(cfg, student, teacher)
    rewards = check_rewards(
        cfg, rats.reward, (*everything.train, *everything.heldout), device, student.latent_shape(cfg.clip.spec)
    )
    arms = score_arms(cfg, rats, rewards, everything.train, num_prompts)

    changes: dict[str, Any] = {"method": {}}
    reward = rats.reward
    if isinstance(reward, SumReward):
        reward = scaled_sum(reward, arms)
        changes["reward"] = {"terms": {
            name: {"weight": term.weight, "mean": term.mean, "spread": term.spread}
            for name, term in reward.terms.items()
        }}  # fmt: skip
        arms = with_sum(reward, arms)
    found = arms.comparisons()
    lines = [*_table(found), "", *_advice(cfg, arms, found)]
    lead, gate = found["reward"].typical_lead, rats_of(cfg).gate
    if isinstance(gate, SigmoidGateConfig) and (tau := significant(tau_for(lead))) > 0:
        changes["method"]["gate"] = {"tau": tau}
        fall = f"{GATE_AT_START} to 0.5 while the student closes the median lead of {lead:.3g}"
        lines += [f"method.gate.tau {tau:g} (now {gate.tau:g}): the gate, floor aside, falls from {fall}"]
        method = rats_of(cfg).model_copy(update={"gate": gate.model_copy(update={"tau": tau})})
        cfg = cfg.model_copy(update={"method": method})
    rats = replace(
        rats,
        reward=reward,
        teacher=TeacherSampler(teacher, reward, cfg.teacher, cfg.shift, predictions=cfg.method.compares_predictions),
        gate=build_gate(rats_of(cfg).gate, student.temporal_stride),
    )
    return [*lines, *_balance(cfg, rats, everything.train, changes["method"])], changes


def _table(found: Mapping[str, ScoreGap]) -> list[str]:
    titles = ["score", "mean", "spread", "teacher - base", "teacher wins"]
    rows = [
        [name, f"{c.mean:.3f}", f"{c.spread:.3f}", f"{c.lead.mean:+.3f} ± {c.lead.ci95:.3f}", f"{c.wins:.0%}"]
        for name, c in found.items()
    ]
    return aligned([titles, *rows])


def _advice(cfg: DistillConfig, arms: CalibrationScores, found: Mapping[str, ScoreGap]) -> list[str]:
    """The table's units; warns of a reward that cannot steer the gate."""
    steps = f"{cfg.teacher.num_steps} steps against {min(cfg.student.num_steps)} of the base"
    lead, frames = found["reward"].lead, (arms.teacher["reward"].frames, arms.base["reward"].frames)
    if not found["reward"].sees_teacher:
        warn(
            f"the teacher's lead, {lead.mean:+.3g} ± {lead.ci95:.3g}, is none beyond doubt: a reward that does not see "
            "what the teacher does better cannot gate; try more prompts, a stronger teacher or another reward",
            where="reward",
        )
    if (heldout := found.get("heldout_reward")) and heldout.lead.mean < -heldout.lead.ci95:
        warn("it prefers the base to the teacher", where="heldout_reward")
    by_frame = isinstance(gate := rats_of(cfg).gate, SigmoidGateConfig) and gate.level == "frame"
    if by_frame and frames[0] is not None and frames[1] is not None:
        opposed = opposed_frames(frames[0], frames[1])
        if opposed > OPPOSED:
            warn(f"{opposed:.0%} of the frames contradict their clip", where="method.gate.level: clip may be steadier")
    return [
        f"{len(arms.prompts)} training prompts, the same noise; the teacher's {steps}; spread over both arms' clips"
    ]


def _balance(cfg: DistillConfig, rats: Rats, prompts: Sequence[str], method: dict[str, Any]) -> list[str]:
    """Weigh the reward's gradient against that of shaping; adds to the changes of `method`."""
    was = rats_of(cfg)
    if not was.uses_gradient or not is_differentiable(rats.reward):
        return ["method.reward_weight stays: the reward has no gradient in the loss"]
    reward = _gradient_norm(cfg, rats, prompts, reward_weight=1.0, alpha=0.0)
    shaping = _gradient_norm(cfg, rats, prompts, reward_weight=0.0, alpha=1.0)
    if not was.alpha or not shaping or not reward:
        return [f"method.reward_weight stays: gradient of the reward {reward:.3g}, of shaping {shaping:.3g}"]
    weight = significant(REWARD_TO_SHAPING * was.alpha * shaping / reward)
    method |= {"alpha": was.alpha, "reward_weight": weight}
    now = was.reward_weight * reward / (was.alpha * shaping)
    norms = f"gradients at the start are {reward:.3g} of the reward, {shaping:.3g} of gated shaping"
    ratio = f"weighted they are {now:.2g} to 1 now, {REWARD_TO_SHAPING:g} to 1 then"
    setting = f"method.reward_weight {weight:g} (now {was.reward_weight:g}), alpha {was.alpha:g}"
    return [f"{setting}: {norms}; {ratio}"]


def _gradient_norm(cfg: DistillConfig, rats: Rats, prompts: Sequence[str], **weights: float) -> float:
    """Mean over batches of the norm of the loss's gradient with other weights."""
    rats = replace(rats, config=rats_of(cfg).model_copy(update=weights))
    norms = []
    for index in range(NUM_BATCHES):
        batch = draw_batch(rats.student, cfg, prompts, index * cfg.teacher.reuse)
        batch = with_pictures(batch, rats.student, cfg.clip.spec)
        accumulate_gradient(rats.step, batch, cfg.training.num_micro_batches(len(batch.prompts)))
        grads = [weight.grad for weight in rats.student.weights.values() if weight.grad is not None]
        norms.append(math.sqrt(sum(float(grad.double().square().sum()) for grad in grads)))
        for weight in rats.student.weights.values():
            weight.grad = None
    return sum(norms) / NUM_BATCHES
