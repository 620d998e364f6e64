"""The running average of a model's weights."""

from __future__ import annotations

import torch
from torch import nn


@torch.no_grad()
def update_ema(average: nn.Module, model: nn.Module, decay: float) -> None:
    """`average = decay * average + (1 - decay) * model`, for all parameters."""
    torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - decay)  # one kernel
