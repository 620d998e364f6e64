"""AdamW, learning-rate schedule and moving averages."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, Literal, Self

import torch
from pydantic import BaseModel, Field, field_validator, model_validator
from torch import Tensor, nn

from rats_video.config.fields import Config, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from rats_video.errors import UserError


class OptimizerConfig(Config):
    """AdamW with linear warm-up and an optional cosine decay."""

    kind: Literal["adamw", "adamw8bit"] = Field("adamw", description="adamw8bit keeps its state in 8 bits")
    lr: PositiveFloat = Field(description="peak learning rate")
    betas: tuple[float, float] = Field((0.9, 0.99), description="decay of the averages of gradient and of its square")
    weight_decay: NonNegativeFloat = Field(0.0, description="pull of the weights to zero (decoupled, times lr)")
    warmup_steps: NonNegativeInt = Field(0, description="first steps, in which the rate rises linearly to lr")
    decay: bool = Field(default=False, description="cosine decay to zero at the last step; otherwise constant")
    restarts: tuple[PositiveInt, ...] = Field(
        (),
        description="steps at which warm-up and decay begin anew; each piece before them decays to zero",
    )
    max_grad_norm: PositiveFloat = Field(1.0, description="norm to which a larger gradient is clipped")

    @field_validator("restarts")
    @classmethod
    def _restarts_rise(cls, restarts: tuple[int, ...]) -> tuple[int, ...]:
        if restarts != (rising := tuple(sorted(set(restarts)))):
            raise ValueError(f"must rise, each step once, got {[*restarts]}: give {[*rising]}")
        return restarts


class TrainStepsConfig(Config):
    """Base of settings with `steps` and optimizers: none of these restarts after the last step."""

    @model_validator(mode="after")
    def _restarts_before_the_end(self) -> Self:
        if late := late_restart(self, dict(self)["steps"]):
            raise ValueError(late)
        return self


def late_restart(cfg: BaseModel, steps: int, path: str = "") -> str:
    """What is wrong where an optimizer below `cfg` would restart after the last step; empty if none would.

    Args:
        cfg: any settings.
        steps: of the training.
        path: where `cfg` is, ending in a dot.
    """
    for name, value in cfg:
        if isinstance(value, OptimizerConfig) and (late := [at for at in value.restarts if at >= steps]):
            return (
                f"{path}{name} restarts at step {late[0]}, after the last of {steps} steps: "
                f"give restarts below {steps}, or more steps"
            )
        if isinstance(value, BaseModel) and (found := late_restart(value, steps, f"{path}{name}.")):
            return found
    return ""


@torch.no_grad()
def ema_update_(average: Mapping[str, Tensor], weights: Mapping[str, Tensor], decay: float) -> None:
    """`average = decay * average + (1 - decay) * weights` in the average's precision, for weights of the same names."""
    latest = [weights[name].to(mean.dtype) for name, mean in average.items()]
    torch._foreach_lerp_(list(average.values()), latest, 1 - decay)  # one kernel


def cosine_lr(step: int, total: int, peak: float, *, warmup: int = 0, floor: float = 0.0) -> float:
    """Learning rate at `step` of `total`: linear warm-up, then half a cosine down to `floor * peak`."""
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, total - warmup)
    return peak * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress)))


def set_learning_rate(
    optimizer: torch.optim.Optimizer, cfg: OptimizerConfig, step: int, total: int, scale: float = 1.0
) -> float:
    """Set and return the rate of `step` of `total`: linear warm-up, then constant or a cosine decay to zero; scaled.

    Restarts cut the run into pieces, each with a schedule of its own (SGDR, arXiv 1608.03983).
    """
    rate = scale * learning_rate(cfg, step, total)
    for group in optimizer.param_groups:
        group["lr"] = rate
    return rate


def learning_rate(cfg: OptimizerConfig, step: int, total: int) -> float:
    """The rate of `step` of `total`; see `set_learning_rate`."""
    start = max((at for at in cfg.restarts if at <= step), default=0)
    end = min((at for at in cfg.restarts if step < at < total), default=total)
    step, total = step - start, end - start
    lr = cfg.lr * min(1.0, (step + 1) / max(1, cfg.warmup_steps))
    if cfg.decay:
        lr = cosine_lr(step, total, cfg.lr, warmup=cfg.warmup_steps)
    return lr


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


def adamw8bit(where: str = "training.optimizer") -> Any:
    """The class of the 8-bit optimizer, which the settings there ask for.

    Raises:
        UserError: it is not installed.
    """
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as error:
        raise UserError(
            "adamw8bit needs bitsandbytes, which is not installed", where=f"{where}.kind",
            fix="pip install 'rats-video[gpu]', or adamw",
        ) from error  # fmt: skip
    return AdamW8bit
