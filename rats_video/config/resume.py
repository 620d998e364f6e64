"""Which settings a run may be given anew when it goes on."""

from __future__ import annotations

from collections.abc import Iterator
from fnmatch import fnmatchcase
from typing import Any

from pydantic import BaseModel

from rats_video.config.distill import DistillConfig
from rats_video.config.explain import KIND

FREE = {
    # how it is planned, shared out, looked at and judged
    "architecture", "parallel", "validation", "tracking", "comparison", "evaluation", "heldout_reward",
    "training.checkpoint_every", "training.keep_checkpoints", "training.max_skipped", "training.faults",
    # memory and time: but for rounding the same weights, and a run that died of memory must be able to go on
    "training.micro_batch_size", "compute.attention", "compute.activation_checkpointing", "compute.compile",
    "compute.offload", "compute.cache_text", "compute.decode.checkpoint", "compute.decode.offload",
    "reward.chunk", "reward.terms.*.reward.chunk", "teacher.cache",
}  # fmt: skip
"""Dotted keys, each with all below it; `*` is any name. A key that is not named here decides the weights."""

WATCH = {"guard.every", "guard.choose", "guard.motion_loss", "guard.saturation_gain"}
"""Keys that change what a guard says, and the weights only if it may do more than warn."""


FREE_OF_PRETRAINING = {
    "eval_clips", "eval_steps", "checkpoint_every", "prune_channels", "student",
    "validation",
    "micro_batch_size", "compute.attention", "compute.activation_checkpointing", "compute.compile", "compute.offload",
}  # fmt: skip
"""Likewise, of `train vae | teacher | reward`: what comes after the last step, is only looked at, or saves memory."""


def changed_training(before: BaseModel, after: BaseModel) -> list[str]:
    """The dotted keys of a `train` configuration that decide what is learned and differ."""
    return list(_differences(before.model_dump(), after.model_dump(), "", FREE_OF_PRETRAINING))


def changed_keys(before: DistillConfig, after: DistillConfig) -> list[str]:
    """The dotted keys that decide what is learned and differ; `training.steps` is one where the rate decays to it."""
    free = FREE if after.training.optimizer.decay else FREE | {"training.steps"}
    if before.guard is not None and after.guard is not None:  # whose looks are compared with one another
        free = free - {"heldout_reward"}
        free = free | WATCH if {before.guard.on_alarm, after.guard.on_alarm} == {"warn"} else free
    return list(_differences(before.model_dump(), after.model_dump(), "", free))


def deciding(cfg: DistillConfig) -> dict[str, Any]:
    """The configuration without defaults and without the keys that decide nothing of what is learned.

    A key that a later version brings, at its default, changes nothing of it.
    """
    pruned: dict[str, Any] = _pruned(cfg.model_dump(mode="json", exclude_defaults=True), "")
    return pruned


def _pruned(tree: Any, path: str) -> Any:
    if not isinstance(tree, dict):
        return tree
    below = {key: f"{path}.{key}".removeprefix(".") for key in tree}
    return {
        key: _pruned(value, below[key])
        for key, value in tree.items()
        if not any(fnmatchcase(below[key], pattern) for pattern in FREE)
    }


def _differences(old: Any, new: Any, path: str, free: set[str]) -> Iterator[str]:
    if old == new or any(fnmatchcase(path, pattern) for pattern in free):
        return
    if not isinstance(old, dict) or not isinstance(new, dict):
        yield path
    elif old.get(KIND) != new.get(KIND):  # another choice: its other keys mean something else
        yield f"{path}.{KIND}"
    elif old.keys() != new.keys():  # a sum of other terms
        yield path
    else:
        for key, value in new.items():
            yield from _differences(old[key], value, f"{path}.{key}".removeprefix("."), free)
