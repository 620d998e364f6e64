"""The memory of a run from the counts of its traces: what is held, and each phase's peak beside that."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from rats_video.distillation.settings import DistillConfig
from rats_video.optim import OptimizerConfig
from rats_video.planning.trace import (
    AVERAGE,
    CRITIC_WEIGHTS,
    DENOISER,
    FLOPS,
    HELD,
    PICTURES,
    TEXT,
    TRAINED,
    Counts,
)
from rats_video.planning.watched import PIXELS, TEACHER_PIXELS

GIB = 2**30
FRAGMENTED, CONTEXT = 1.05, 0.75 * GIB  # what a GPU must hold beyond live tensors: rounding and holes; CUDA itself
UNCOUNTED = {"start", PIXELS, TEACHER_PIXELS}  # phases of which decode and reward are the share that counts
SPLIT = (DENOISER, TRAINED, CRITIC_WEIGHTS, AVERAGE, "optimizer", "critic optimizer")
GRADIENTS = {("gradients", "student backward"): TRAINED, ("critic gradients", "critic backward"): CRITIC_WEIGHTS}
"""Who allocates the gradients of which weights."""


@dataclass(frozen=True)
class TracedCosts:
    """Counts of the traces of a configuration.

    Args:
        step: the denoiser's share of a step, and the weights.
        decode: of the latents.
        reward: of the clips.
        text: encoding the prompts of a batch.
        pictures: encoding the picture of one clip; nothing where clips are made from text alone.
        blocks: how many blocks the denoiser has.
        calls: network evaluations by phase, and clips decoded, a clip and step: one teacher rollout, one critic round.
        traced: the same of the traced step, of as many student steps as there may be.
        rounds: of the critic before each update of the student.
        micro_batches: how many traced steps make an update of a process.
        clips: of a traced step.
    """

    step: Counts
    decode: Counts
    reward: Counts
    text: Counts
    pictures: Counts
    blocks: int
    calls: Mapping[str, float]
    traced: Mapping[str, float]
    rounds: int
    micro_batches: int
    clips: int


@dataclass(frozen=True)
class Memory:
    """Bytes on one device.

    Args:
        held: always there, by part.
        phases: beside that, at each phase's fullest moment: bytes by the phase that allocated them.
    """

    held: Mapping[str, float]
    phases: Mapping[str, Mapping[str, float]]

    @property
    def fullest(self) -> str:
        """The phase with the peak."""
        return max(self.phases, key=lambda name: sum(self.phases[name].values()))

    @property
    def peak(self) -> float:
        """Bytes of live tensors, as `torch.cuda.max_memory_allocated` shows them."""
        return sum(self.held.values()) + sum(self.phases[self.fullest].values())

    @property
    def needed(self) -> float:
        """Bytes of a GPU, with the allocator's holes and the CUDA context."""
        return self.peak * FRAGMENTED + CONTEXT


def estimate_memory(cfg: DistillConfig, counted: TracedCosts, gpus: int = 1) -> Memory:
    """Live bytes of the second and later steps (the first has no optimizer state yet), on each of `gpus` devices."""
    weights = {part: size for (phase, part), size in counted.step.items() if phase == "weights"}
    trained = counted.step["parameters", TRAINED]
    held = {**weights, "optimizer": _moments(cfg.training.optimizer, trained, weights[TRAINED])}
    if (critic := cfg.method.critic_optimizer) is not None:
        count = counted.step["parameters", CRITIC_WEIGHTS]
        held["critic optimizer"] = _moments(critic, count, weights[CRITIC_WEIGHTS])
    by_network = cfg.method.pixel_gradient and not cfg.method.uses_gradient
    phases = _phases(
        counted, by_network=by_network, in_graph=counted.traced.get(PIXELS, 0.0) if cfg.method.pixel_gradient else 0.0
    )
    if cfg.compute.cache_text:
        held[TEXT] = 0.0
        phases.pop("text", None)
    two_blocks = min(1.0, 2 / counted.blocks)  # the one at work and the one on its way
    if cfg.compute.offload != "none":
        held[DENOISER] *= two_blocks
    if cfg.parallel.shard and gpus > 1:
        gathered = two_blocks * max(held[DENOISER], held[TRAINED])
        held |= {part: held[part] / gpus for part in SPLIT if part in held}
        held["gathered blocks"] = gathered
        for owners, part in GRADIENTS.items():
            spared = weights.get(part, 0.0) * (1 - 1 / gpus)
            for phase in phases.values():
                for owner in owners:
                    phase[owner] = max(0.0, phase.get(owner, 0.0) - spared)
    return Memory(
        {part: size for part, size in held.items() if size > 0},
        {name: {owner: size for owner, size in parts.items() if size > 0} for name, parts in phases.items()},
    )


def _moments(cfg: OptimizerConfig, count: float, size: float) -> float:
    """Bytes of AdamW's two moments of so many weights of that size."""
    return count * 2.004 if cfg.kind == "adamw8bit" else 2 * size  # 8 bytes a block of 2048


def _phases(counted: TracedCosts, *, in_graph: float, by_network: bool) -> dict[str, dict[str, float]]:
    """The step in order, decode and reward on top of what the denoiser holds when they come.

    `in_graph` clips a clip are decoded and scored with gradient, all before the first backward; `by_network` of the
    method's own, not by the reward.
    """
    step, decode, reward = counted.step, counted.decode, counted.reward
    phases = {name: _parts(step, name) for name, kind in step if kind == FLOPS and name not in UNCOUNTED}
    one = _add(_held(decode, "student reward"), _held(reward, "reward backward"))
    others = {owner: max(in_graph - 1, 0.0) * size for owner, size in one.items()}
    for role in ("teacher", "student"):
        if (f"{role} pixels", FLOPS) not in step:
            continue
        before = _held(step, f"{role} pixels")
        before = _add(before, others) if role == "student" else before
        phases[f"{role} decode"] = _add(before, _parts(decode, f"{role} decode"))
        decoded = _add(before, _held(decode, f"{role} reward"))
        if role == "student" and by_network:
            kept = _held(step, "student backward")
            phases["discriminator"] = _add(decoded, {name: kept.get(name, 0.0) for name in (PIXELS, TEACHER_PIXELS)})
        else:
            phases[f"{role} reward"] = _add(decoded, _parts(reward, f"{role} reward"))
    if in_graph:
        before = _add(_held(step, "student pixels"), others)
        decoded = _add(before, _held(decode, "student reward"))
        phases["reward backward"] = _add(decoded, _parts(reward, "reward backward"))
        phases["decode backward"] = _add(before, _parts(decode, "decode backward"))
    if counted.pictures:
        phases[PICTURES] = _add(_held(step, "optimizer"), _parts(counted.pictures, PICTURES))
    first = next(name for name in phases if name.endswith(("rollout", "samples")))
    phases["text"] = _add(_held(step, first), _parts(counted.text, "text"))
    return phases


def _parts(numbers: Counts, phase: str) -> dict[str, float]:
    return {
        owner: size for (name, owner), size in numbers.items()
        if name == phase and owner != FLOPS and not owner.startswith(HELD)
    }  # fmt: skip


def _held(numbers: Counts, phase: str) -> dict[str, float]:
    return {
        owner.removeprefix(HELD): size
        for (name, owner), size in numbers.items()
        if name == phase and owner.startswith(HELD)
    }


def _add(one: Mapping[str, float], other: Mapping[str, float]) -> dict[str, float]:
    return {
        name: one.get(name, 0.0) + other.get(name, 0.0) for name in [*one, *(key for key in other if key not in one)]
    }
