"""One optimizer step: gradients of the parts of a batch, averaged over processes, clipped, applied."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch.distributed.tensor import DTensor

from rats_video.config.distill import DistillConfig
from rats_video.distill.step import Rats, rats_step
from rats_video.errors import UserError
from rats_video.runtime import Runtime
from rats_video.training.anchor import Anchor
from rats_video.training.batches import take
from rats_video.training.optim import set_learning_rate
from rats_video.training.skipped import SkippedClips
from rats_video.types import PromptBatch


class Updater:
    """Carries out optimizer steps; what is the same for all of them is given once.

    Args:
        cfg: the run's configuration.
        optimizer: of the student's weights.
        runtime: the processes, which step together.
        skipped: counts clips whose reward is not finite.
        anchor: where the weights started, for a run that is pulled back to it.
    """

    def __init__(
        self,
        cfg: DistillConfig,
        optimizer: torch.optim.Optimizer,
        runtime: Runtime,
        skipped: SkippedClips,
        anchor: Anchor | None,
    ) -> None:
        self._cfg, self._optimizer, self._runtime = cfg, optimizer, runtime
        self._skipped, self._anchor = skipped, anchor

    def step(self, rats: Rats, batch: PromptBatch, step: int) -> dict[str, float]:
        """Update the student on this process's rows of the batch and return the row to log.

        Raises:
            UserError: loss or gradient is not finite, or too many rewards are not.
        """
        training, optimizer = self._cfg.training, self._optimizer
        lr = set_learning_rate(optimizer, training.optimizer, step, training.steps)
        optimizer.zero_grad(set_to_none=True)
        row = self._runtime.mean(accumulate_gradient(rats, batch, training.parts(len(batch.prompts))))
        row = self._skipped.count(row, step)
        _check_finite("loss", row["loss"], step)
        weights = rats.student.weights.values()
        self._runtime.average_gradients(weights)
        if self._anchor is not None and self._cfg.method.drift_weight:
            self._anchor.pull(self._cfg.method.drift_weight)
        norm = torch.nn.utils.clip_grad_norm_(weights, training.optimizer.max_grad_norm)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        _check_finite("gradient", float(norm), step)
        optimizer.step()
        return {**row, "grad_norm": float(norm), "lr": lr}


def accumulate_gradient(rats: Rats, batch: PromptBatch, parts: int) -> dict[str, float]:
    """Add the gradient of the batch's mean loss to the weights', part by part: the memory of a part, the same sum."""
    size = len(batch.prompts) // parts
    rows = []
    for part in range(parts):
        clips = slice(part * size, (part + 1) * size)
        loss, row = rats_step(rats, replace(take(batch, clips), part=part))
        (loss / parts).backward()
        rows.append(row)
    return {name: sum(row[name] for row in rows) / parts for name in rows[0]}


def _check_finite(what: str, value: float, step: int) -> None:
    if not math.isfinite(value):
        raise UserError(
            f"the {what} is {value} at step {step + 1}; earlier checkpoints are kept",
            where="distill", fix="lower training.optimizer.lr or method.alpha",
        )  # fmt: skip
