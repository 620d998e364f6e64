"""One optimizer step: gradients of the parts of a batch, averaged over processes, clipped, applied."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from rats_video.methods.base import Critic, Method
from rats_video.methods.real_data import RealData, real_data_loss
from rats_video.optim import OptimizerConfig, set_learning_rate
from rats_video.runtime import Runtime
from rats_video.timing import phase
from rats_video.training.anchor import InitialWeights, local
from rats_video.training.batches import slice_batch
from rats_video.training.faults import FaultPolicy, StepFault
from rats_video.training.settings import RunSettings
from rats_video.training.skipped import SkippedClips
from rats_video.types import PromptBatch


class Updater:
    """Carries out optimizer steps; what is the same for all of them is given once.

    Args:
        cfg: the run's configuration.
        optimizer: of the student's weights.
        critics: the optimizers of the networks that learn beside it, by name.
        runtime: the processes, which step together.
        skipped: counts clips whose reward is not finite.
        anchor: where the weights started, for a run that is pulled back to it.
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
        self._cfg, self._optimizer, self._companions, self._runtime = cfg, optimizer, critics, runtime
        self._skipped, self._anchor, self._faults = skipped, anchor, faults

    def step(self, method: Method, batch: PromptBatch, step: int) -> dict[str, float]:
        """Update the student on this process's rows of the batch, or leave the step out; returns the row to log.

        The networks that learn beside it are updated first, on the same rows. What they have learned by the time of a
        fault stays: it is of the student as it is, and as true for the step to come.

        Raises:
            RollBack: the weights are not finite any more, or the step is one too many to be left out.
            UserError: too many rewards are not finite.
        """
        try:
            beside = self._critics_row(method, batch, step)
            return self._faults.passed(self._update(method, batch, step) | beside)
        except StepFault as fault:
            return self._faults.skip_step(fault, step)

    def _update(self, method: Method, batch: PromptBatch, step: int) -> dict[str, float]:
        training, optimizer = self._cfg.training, self._optimizer
        lr = self._begin(optimizer, training.optimizer, step)
        parts = training.num_micro_batches(len(batch.prompts))
        row = accumulate_gradient(method.step, batch, parts)
        if method.real_data is not None:
            row = add_real_data(method, method.real_data, batch.num_steps, step, parts, row)
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
        beside: dict[str, float] = {}
        for name, critic in method.critics.items():
            rows = [self._update_critic(name, critic, batch, step, index) for index in range(critic.rounds)]
            beside |= {f"{name}/{key}": sum(row[key] for row in rows) / len(rows) for key in rows[0]}
        return beside

    @phase("critics")
    def _update_critic(self, name: str, critic: Critic, batch: PromptBatch, step: int, index: int) -> dict[str, float]:
        optimizer, weights = self._companions[name], critic.weights.values()
        self._begin(optimizer, critic.optimizer, step)
        parts = self._cfg.training.num_micro_batches(len(batch.prompts))
        row = self._runtime.all_reduce_mean(accumulate_gradient(lambda part: critic.loss(part, index), batch, parts))
        _check(f"{name}'s loss", row["loss"])
        self._runtime.average_gradients(weights)
        return {**row, "grad_norm": self._apply(f"{name}'s gradient", weights, optimizer, critic.optimizer)}

    def _begin(self, optimizer: torch.optim.Optimizer, cfg: OptimizerConfig, step: int) -> float:
        """Set the rate of this step, which is returned, and forget former gradients."""
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
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        _check(what, float(norm), most)
        optimizer.step()
        if self._runtime.any(not _are_finite(weights)):
            raise StepFault("the updated weights are not finite", in_weights=True)
        return float(norm)


def accumulate_gradient(
    loss_of: Callable[[PromptBatch], tuple[Tensor, dict[str, float]]], batch: PromptBatch, parts: int
) -> dict[str, float]:
    """Add the gradient of the batch's mean loss to the weights', part by part: the memory of a part, the same sum."""
    size = len(batch.prompts) // parts
    rows = []
    for part in range(parts):
        clips = slice(part * size, (part + 1) * size)
        with phase("student"):
            loss, row = loss_of(replace(slice_batch(batch, clips), micro_batch=part))
        with phase("backward"):
            (loss / parts).backward()
        rows.append(row)
    return {name: sum(row[name] for row in rows) / parts for name in rows[0]}


def add_real_data(
    method: Method, real: RealData, num_steps: int, step: int, parts: int, row: Mapping[str, float]
) -> dict[str, float]:
    """Add the gradient of the real-data term of a step likewise, and its value to the row."""
    student, total = method.student, 0.0
    clips, sigmas = real.draw(step, student.device), student.sigmas(num_steps, method.shift)
    for part in clips.parts(parts):
        with phase("real data"):
            loss = real_data_loss(student, part, sigmas).sum() / len(clips.latents)
            (real.weight * loss).backward()
        total += float(loss.detach())
    return {**row, "loss": row["loss"] + real.weight * total, "real_data/loss": total}


def _check(what: str, value: float, most: float | None = None) -> None:
    if not math.isfinite(value):
        raise StepFault(f"the {what} is {value}")
    if most is not None and value > most:
        raise StepFault(f"the {what} is {value:.3g}, training.faults.max_norm {most:g}")


def _are_finite(weights: Iterable[Tensor]) -> bool:
    """Whether this process's parts of the weights are finite: one answer from the device, not one a tensor."""
    return bool(torch.stack([local(weight.detach()).isfinite().all() for weight in weights]).all())
