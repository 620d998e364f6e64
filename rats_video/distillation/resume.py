"""The settings that a resumed run may change."""

from __future__ import annotations

from typing import Any

from rats_video.config.changes import differences, pruned
from rats_video.distillation.settings import DistillConfig
from rats_video.optim import OptimizerConfig, learning_rate

FREE = {
    # planning, processes, views and evaluation
    "architecture", "parallel", "validation", "tracking", "comparison", "evaluation", "heldout_reward",
    "training.checkpoint_every", "training.keep_checkpoints", "training.max_skipped", "training.faults",
    # memory and time: but for rounding the same weights, and a run that died of memory must be able to go on
    "training.micro_batch_size", "compute.attention", "compute.activation_checkpointing", "compute.activation_offload",
    "compute.compile", "compute.offload", "compute.cache_text", "compute.decode.checkpoint", "compute.decode.offload",
    "reward.chunk", "reward.terms.*.reward.chunk", "teacher.cache",
}  # fmt: skip
"""Dotted keys, each with all below it; `*` is any name. A key that is not named here decides the weights."""

RESTARTS = {"training.optimizer.restarts", "method.*.optimizer.restarts"}

WATCH = {"guard.every", "guard.choose", "guard.motion_loss", "guard.saturation_gain"}
"""Keys that change what a guard says, and the weights only if it may do more than warn."""


def changed_keys(before: DistillConfig, after: DistillConfig) -> list[str]:
    """The dotted keys that decide what is learned and differ.

    A run may be made longer, or its rate's restarts be changed, as long as every step so far keeps its rate.
    """
    free = FREE | {"training.steps", *RESTARTS} if _same_rates(before, after) else FREE
    if before.guard is not None and after.guard is not None:  # its evaluations are compared with one another
        free = free - {"heldout_reward"}
        free = free | WATCH if {before.guard.on_alarm, after.guard.on_alarm} == {"warn"} else free
    return list(differences(_whole(before), _whole(after), "", free))


def _same_rates(before: DistillConfig, after: DistillConfig) -> bool:
    """True if no optimizer's rate differs in a step that both runs make."""
    common = min(before.training.steps, after.training.steps)
    old, new = _optimizers(before.model_dump()), _optimizers(after.model_dump())
    return len(old) == len(new) and all(
        learning_rate(mine, step, before.training.steps) == learning_rate(theirs, step, after.training.steps)
        for mine, theirs in zip(old, new, strict=True)
        for step in range(common)
    )


def _optimizers(tree: Any) -> list[OptimizerConfig]:
    """The optimizers of a configuration: the student's and the critics'."""
    if not isinstance(tree, dict):
        return []
    if "lr" in tree:
        return [OptimizerConfig.model_validate(tree)]
    return [found for below in tree.values() for found in _optimizers(below)]


def _whole(cfg: DistillConfig) -> dict[str, Any]:
    """All keys, also the one that a dump leaves out at its default."""
    return cfg.model_dump() | {"backbone": cfg.backbone.model_dump()}


def deciding(cfg: DistillConfig) -> dict[str, Any]:
    """The configuration without defaults and without the keys that decide nothing of what is learned.

    A key that a later version brings, at its default, changes nothing of it.
    """
    kept: dict[str, Any] = pruned(cfg.model_dump(mode="json", exclude_defaults=True), "", FREE)
    return kept
