"""The optimizer and its learning rate."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from rats_video.config.schema import OptimizerConfig
from rats_video.errors import UserError


def cosine_lr(step: int, total: int, peak: float, *, warmup: int = 0, floor: float = 0.0) -> float:
    """Learning rate at `step` of `total`: linear warm-up, then half a cosine down to `floor * peak`."""
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, total - warmup)
    return peak * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress)))


def set_learning_rate(
    optimizer: torch.optim.Optimizer, cfg: OptimizerConfig, step: int, total: int, scale: float = 1.0
) -> float:
    """Set and return the rate of `step` of `total`: linear warm-up, then constant or a cosine decay to zero; scaled."""
    lr = cfg.lr * min(1.0, (step + 1) / max(1, cfg.warmup_steps))
    if cfg.decay:
        lr = cosine_lr(step, total, cfg.lr, warmup=cfg.warmup_steps)
    for group in optimizer.param_groups:
        group["lr"] = scale * lr
    return scale * lr


def build_optimizer(cfg: OptimizerConfig, weights: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """AdamW over `weights`, its two moments in float32 or in 8 bits (Dettmers et al., 2021).

    Raises:
        UserError: the 8-bit optimizer is not installed.
    """
    settings: dict[str, Any] = {"lr": cfg.lr, "betas": cfg.betas, "weight_decay": cfg.weight_decay}
    match cfg.kind:
        case "adamw":
            return torch.optim.AdamW(weights, **settings)
        case "adamw8bit":
            optimizer: torch.optim.Optimizer = adamw8bit()(weights, **settings)
            return optimizer


def adamw8bit() -> Any:
    """The class of the 8-bit optimizer.

    Raises:
        UserError: it is not installed.
    """
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as error:
        raise UserError(
            "adamw8bit needs bitsandbytes, which is not installed", where="training.optimizer.kind",
            fix="pip install 'rats-video[gpu]', or adamw",
        ) from error  # fmt: skip
    return AdamW8bit
