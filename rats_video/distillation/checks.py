"""Checks of a run's settings that need no model."""

from __future__ import annotations

from collections.abc import Callable

import torch

from rats_video.backbones.attention import check_attention
from rats_video.backbones.compute import FullWeightsConfig
from rats_video.backbones.low_bit_folder import check_quantiser
from rats_video.distillation.settings import DistillConfig
from rats_video.errors import UserError
from rats_video.optim import OptimizerConfig, adamw8bit

OPTIMIZERS: dict[str, Callable[[DistillConfig], OptimizerConfig | None]] = {
    "training.optimizer": lambda cfg: cfg.training.optimizer,
    "method.fake_score.optimizer": lambda cfg: cfg.method.critic_optimizer,
}


def check_compute(cfg: DistillConfig, device: torch.device) -> None:
    """Check, before anything is loaded, that the memory options work here and together.

    Raises:
        UserError: they do not.
    """
    compute = cfg.compute
    check_attention(compute.attention, device, compute.dtype)
    for where, optimizer in OPTIMIZERS.items():
        chosen = optimizer(cfg)
        if chosen is None or chosen.kind != "adamw8bit":
            continue
        if cfg.parallel.shard:
            raise UserError(
                "does not go with parallel.shard: its kernels take whole tensors", where=f"{where}.kind",
                fix="use adamw, whose state is split as well",
            )  # fmt: skip
        adamw8bit(where)  # raises if it is not installed
    if compute.quantization != "none":
        _check_bits(cfg)
    if compute.offload == "none":
        return
    if cfg.parallel.shard:
        raise UserError(
            "does not go with parallel.shard, which moves weights too", where="compute.offload", fix="use none"
        )
    if isinstance(cfg.student.weights, FullWeightsConfig):
        raise UserError("keeps a frozen base in host memory, but all weights train", where="compute.offload",
                        fix="set student.weights.kind=lora")  # fmt: skip
    if compute.compile:
        raise UserError("compiled blocks cannot be offloaded", where="compute.offload", fix="set compute.compile=false")


def _check_bits(cfg: DistillConfig) -> None:
    """Raise UserError unless the base is frozen and whole on each device."""
    if isinstance(cfg.student.weights, FullWeightsConfig):
        raise UserError("keeps a frozen base in few bits, but all weights train", where="compute.quantization",
                        fix="set student.weights.kind=lora")  # fmt: skip
    if cfg.parallel.shard:
        raise UserError("does not go with parallel.shard, which splits a base in full", where="compute.quantization",
                        fix="set one of them to its default")  # fmt: skip
    check_quantiser(cfg.compute.quantization)


def check_horizons(cfg: DistillConfig, student_steps: int) -> None:
    """Raise UserError if teacher and student cannot be compared at that many student steps."""
    if not cfg.method.uses_teacher:
        return
    cfg.method.check_horizons(student_steps)
    if cfg.teacher.num_steps < student_steps:
        raise UserError(
            f"{cfg.teacher.num_steps} is fewer than the student's {student_steps}", where="teacher.num_steps"
        )
