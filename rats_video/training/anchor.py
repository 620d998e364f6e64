"""The weights at the start of a training, and how far they have moved since."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from rats_video.runtime import ALONE, Runtime, is_split


class InitialWeights:
    """A copy of the weights at the start, kept in host memory.

    Args:
        weights: what trains, before the first step; this process's shards where they are split.
    """

    def __init__(self, weights: Mapping[str, nn.Parameter]) -> None:
        self._weights = weights
        self._start = {name: local(weight).detach().to("cpu", copy=True) for name, weight in weights.items()}

    @torch.no_grad()
    def drift(self, runtime: Runtime = ALONE) -> float:
        """Norm of the change since the start, relative to the norm at the start; all processes call it together.

        An adapter starts with one of its two factors at zero: its drift is in units of the other.
        """
        moved = start = 0.0
        for name, weight in self._weights.items():
            before = self._start[name]
            moved += float((local(weight).detach().cpu() - before).float().square().sum(dtype=torch.float64))
            start += float(before.float().square().sum(dtype=torch.float64))
        # Shards of split weights add up, and a ratio of means is a ratio of sums.
        sums = runtime.all_reduce_mean({"moved": moved, "start": start})
        return float((sums["moved"] / sums["start"]) ** 0.5)

    @torch.no_grad()
    def add_drift_gradient(self, strength: float) -> None:
        """Add the gradient of `strength / 2 * |weights - start|^2` to the weights' gradients."""
        for name, weight in self._weights.items():
            if weight.grad is not None:
                away = local(weight).detach() - self._start[name].to(weight.device)
                local(weight.grad).add_(away.to(weight.grad.dtype), alpha=strength)


def local(tensor: Tensor) -> Tensor:
    """This process's shard of a split tensor; any other tensor itself."""
    return tensor.to_local() if is_split(tensor) else tensor
