"""One optimizer step: gradients of micro-batches, averaged over processes, clipped, applied."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from rats_video.methods.base import Critic, Method
from rats_video.methods.real_data import RealData, real_data_loss
from rats_video.optim import OptimizerConfig, set_learning_rate
from rats_video.runtime import Runtime, is_split
from rats_video.timing import phase
from rats_video.training.anchor import InitialWeights, local
from rats_video.training.batches import slice_batch
from rats_video.training.faults import FaultPolicy, StepFault
from rats_video.training.settings import RunSettings
from rats_video.training.skipped import SkippedClips
from rats_video.types import PromptBatch


class Updater:
    """Makes the optimizer steps of a run.

    Args:
        cfg: the run's configuration.
        optimizer: of the student's weights.
        critics: the critics' optimizers, by name.
        runtime: the processes, which step together.
        skipped: counts clips whose reward is not finite.
        anchor: the weights at the start, for a run with `method.drift_weight`.
        faults: decides about steps whose loss, gradient or weights are not finite.
    """

    def __init__(
        self,
        cfg: RunSettings,
        optimizer: torch.optim.Optimizer,
        critics: Mapping[str, torch.optim.Optimizer],
        runtime: Runtime,
        skipped: SkippedClips,
        anchor: InitialWeights | None,
        faults: FaultPolicy,
    ) -> None:
        self._cfg, self._optimizer, self._critics, self._runtime = cfg, optimizer, critics, runtime
        self._skipped, self._anchor, self._faults = skipped, anchor, faults

    def step(self, method: Method, batch: PromptBatch, step: int) -> dict[str, float]:
        """Update the student on this process's rows of the batch, or skip the step; returns the row to log.

        Critics are updated first, on the same rows. Their updates stay if the step is then skipped: they model the
        student as it still is.

        Raises:
            RollBack: the weights are no longer finite, or too many steps were skipped.
            UserError: too many rewards are not finite.
        """
        try:
            critics_row = self._critics_row(method, batch, step)
            return self._faults.passed(self._update(method, batch, step) | critics_row)
        except StepFault as fault:
            return self._faults.skip_step(fault, step)

    def _update(self, method: Method, batch: PromptBatch, step: int) -> dict[str, float]:
        training, optimizer = self._cfg.training, self._optimizer
        lr = self._begin(optimizer, training.optimizer, step)
        num_micro_batches = training.num_micro_batches(len(batch.prompts))
        row = accumulate_gradient(method.step, batch, num_micro_batches)
        if method.real_data is not None:
            row = add_real_data(method, method.real_data, batch.num_steps, step, num_micro_batches, row)
        row = self._runtime.all_reduce_mean(row)
        _check("loss", row["loss"])
        row = self._skipped.count(row, step)
        weights = method.student.weights.values()
        self._runtime.average_gradients(weights)
        if self._anchor is not None and self._cfg.method.drift_weight:
            self._anchor.add_drift_gradient(self._cfg.method.drift_weight)
        norm = self._apply("gradient", weights, optimizer, training.optimizer, training.faults.max_norm)
        return {**row, "grad_norm": norm, "lr": lr}

    def _critics_row(self, method: Method, batch: PromptBatch, step: int) -> dict[str, float]:
        """Update each critic; returns the means over its rounds."""
        means: dict[str, float] = {}
        for name, critic in method.critics.items():
            if critic.until is not None and batch.index >= critic.until:
                continue
            rows = [self._update_critic(name, critic, batch, step, index) for index in range(critic.rounds)]
            means |= {f"{name}/{key}": sum(row[key] for row in rows) / len(rows) for key in rows[0]}
        return means

    @phase("critics")
    def _update_critic(self, name: str, critic: Critic, batch: PromptBatch, step: int, index: int) -> dict[str, float]:
        optimizer, weights = self._critics[name], critic.weights.values()
        self._begin(optimizer, critic.optimizer, step)
        num_micro_batches = self._cfg.training.num_micro_batches(len(batch.prompts))
        row = self._runtime.all_reduce_mean(
            accumulate_gradient(lambda micro_batch: critic.loss(micro_batch, index), batch, num_micro_batches)
        )
        _check(f"{name}'s loss", row["loss"])
        self._runtime.average_gradients(weights)
        norm = self._apply(f"{name}'s gradient", weights, optimizer, critic.optimizer)
        optimizer.zero_grad(set_to_none=True)  # they would wait through the student's step
        return {**row, "grad_norm": norm}

    def _begin(self, optimizer: torch.optim.Optimizer, cfg: OptimizerConfig, step: int) -> float:
        """Clear the gradients and set the learning rate of this step, which is returned."""
        optimizer.zero_grad(set_to_none=True)
        return set_learning_rate(optimizer, cfg, step, self._cfg.training.steps, self._faults.lr_scale)

    @phase("optimizer")
    def _apply(
        self,
        what: str,
        weights: Collection[nn.Parameter],
        optimizer: torch.optim.Optimizer,
        cfg: OptimizerConfig,
        most: float | None = None,
    ) -> float:
        """Clip the gradient, whose norm is returned, and step."""
        norm = torch.nn.utils.clip_grad_norm_(weights, cfg.max_grad_norm)
        norm = norm.full_tensor() if is_split(norm) else norm
        _check(what, float(norm), most)
        optimizer.step()
        if self._runtime.any(not _are_finite(weights)):
            raise StepFault("the updated weights are not finite", in_weights=True)
        return float(norm)


def accumulate_gradient(
    loss_of: Callable[[PromptBatch], tuple[Tensor, dict[str, float]]], batch: PromptBatch, num_micro_batches: int
) -> dict[str, float]:
    """Add the gradient of the batch's mean loss to the weights', by micro-batches: less memory, the same sum."""
    size = len(batch.prompts) // num_micro_batches
    rows = []
    for index in range(num_micro_batches):
        clips = slice(index * size, (index + 1) * size)
        with phase("student"):
            loss, row = loss_of(replace(slice_batch(batch, clips), micro_batch=index))
        with phase("backward"):
            (loss / num_micro_batches).backward()
        rows.append(row)
    return {name: sum(row[name] for row in rows) / num_micro_batches for name in rows[0]}


def add_real_data(
    method: Method, real: RealData, num_steps: int, step: int, num_micro_batches: int, row: Mapping[str, float]
) -> dict[str, float]:
    """Add the gradient of a step's real-data term in the same way, and its value to the row."""
    student, total = method.student, 0.0
    clips, sigmas = real.draw(step, student.device), student.sigmas(num_steps, method.shift)
    for micro_batch in clips.parts(num_micro_batches):
        with phase("real data"):
            loss = real_data_loss(student, micro_batch, sigmas).sum() / len(clips.latents)
            (real.weight * loss).backward()
        total += float(loss.detach())
    return {**row, "loss": row["loss"] + real.weight * total, "real_data/loss": total}


def _check(what: str, value: float, most: float | None = None) -> None:
    if not math.isfinite(value):
        raise StepFault(f"the {what} is {value}")
    if most is not None and value > most:
        raise StepFault(f"the {what} is {value:.3g}, training.faults.max_norm {most:g}")


def _are_finite(weights: Iterable[Tensor]) -> bool:
    """True if this process's shards of the weights are finite; asks the device once, not once a tensor."""
    return bool(torch.stack([local(weight.detach()).isfinite().all() for weight in weights]).all())
