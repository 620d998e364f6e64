"""The running average of a model's weights."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


@torch.no_grad()
def update_ema(average: Mapping[str, Tensor], weights: Mapping[str, Tensor], decay: float) -> None:
    """`average = decay * average + (1 - decay) * weights` in the average's precision, for weights of the same names."""
    latest = [weights[name].to(mean.dtype) for name, mean in average.items()]
    torch._foreach_lerp_(list(average.values()), latest, 1 - decay)  # one kernel
