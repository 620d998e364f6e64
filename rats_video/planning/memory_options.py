"""The cheapest settings that make a run fit into the memory there is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rats_video.backbones.compute import FullWeightsConfig
from rats_video.distillation.settings import DistillConfig


@dataclass(frozen=True)
class MemoryOption:
    """A setting that saves memory.

    Args:
        setting: as `--set` takes it.
        cost: its price, for people.
    """

    setting: str
    cost: str


MEMORY_OPTIONS = (
    MemoryOption("compute.cache_text=true", "exact, and saves time"),
    MemoryOption("compute.decode.checkpoint=true", "exact; one more decode a step"),
    MemoryOption("compute.activation_checkpointing=true", "exact; one more student forward a step"),
    MemoryOption("training.micro_batch_size=1", "exact; a GPU is used less well by one clip at a time"),
    MemoryOption("parallel.shard=true", "exact; weights travel between the GPUs"),
    MemoryOption("compute.decode.offload=true", "exact; decode caches travel to the host and back"),
    MemoryOption("compute.activation_offload=true", "exact; block inputs travel to the host and back"),
    MemoryOption("compute.dtype=bfloat16", "rounds the frozen weights; faster on a GPU"),
    MemoryOption("compute.decode.dtype=bfloat16", "rounds the decode; twice as fast on a GPU"),
    MemoryOption("training.optimizer.kind=adamw8bit", "rounds the optimizer's state; needs bitsandbytes"),
    MemoryOption("method.fake_score.optimizer.kind=adamw8bit", "the same of the fake score's"),
    MemoryOption("student.weights.kind=lora", "the student learns in adapters of limited rank"),
    MemoryOption("compute.quantization=int8", "rounds the frozen base to 8 bits; each call unpacks it"),
    MemoryOption("compute.quantization=nf4", "rounds the frozen base to 4 bits; each call unpacks it"),
    MemoryOption("compute.decode.small=models/taehv", "another decoder while training: github.com/madebyollin/taehv"),
    MemoryOption("compute.offload=block", "exact, but every call waits for the base's weights from the host"),
    MemoryOption("student.grad_steps=2", "gradient through the last two student steps only"),
    MemoryOption("student.grad_steps=1", "gradient through the last student step only"),
    MemoryOption("compute.decode.window=4", "reward gradient from four latent frames a step only"),
)
"""By price, the cheapest first."""


def useful_options(
    cfg: DistillConfig, gpus: int, *, can_window: bool = True, can_be_small: bool = True
) -> list[MemoryOption]:
    """The options that are not on yet and can save something here.

    Not every VAE can decode a window, and not every one has a small decoder to stand in for it.
    """
    compute, steps = cfg.compute, max(cfg.student.num_steps)
    critic = cfg.method.critic_optimizer
    gradient = cfg.student.most_gradient_steps(steps)
    is_full = isinstance(cfg.student.weights, FullWeightsConfig)
    useful = {
        "compute.cache_text=true": not compute.cache_text,
        "compute.decode.checkpoint=true": not compute.decode.checkpoint,
        "compute.activation_checkpointing=true": not compute.activation_checkpointing,
        "training.micro_batch_size=1": cfg.training.batch_size > gpus and cfg.training.micro_batch_size != 1,
        "parallel.shard=true": gpus > 1 and not cfg.parallel.shard,
        "compute.decode.offload=true": can_window and not compute.decode.offload,
        "compute.activation_offload=true": not compute.activation_offload,
        "compute.dtype=bfloat16": compute.dtype == "float32",
        "compute.decode.dtype=bfloat16": compute.decode.dtype == "float32",
        "training.optimizer.kind=adamw8bit": cfg.training.optimizer.kind == "adamw",
        "method.fake_score.optimizer.kind=adamw8bit": critic is not None and critic.kind == "adamw",
        "student.weights.kind=lora": is_full,
        "compute.quantization=int8": compute.quantization == "none" and not compute.compile,
        "compute.quantization=nf4": compute.quantization != "nf4" and not compute.compile,
        "compute.offload=block": compute.offload == "none" and not compute.compile,
        "compute.decode.small=models/taehv": can_be_small and compute.decode.small is None,
        "student.grad_steps=2": gradient > 2,
        "student.grad_steps=1": gradient > 1,
        "compute.decode.window=4": can_window and compute.decode.window is None,
    }
    return [option for option in MEMORY_OPTIONS if useful[option.setting]]


def without_conflicts(options: Sequence[MemoryOption], cfg: DistillConfig) -> list[MemoryOption]:
    """The options among these that work together.

    Offload and few bits need a frozen base that is not split over GPUs, and 8-bit optimizers weights that are not;
    decode.offload needs a checkpointed decode, activation_offload checkpointed blocks. Of two values of one setting the
    dearer one stays.
    """
    settings = {option.setting for option in options}
    is_full = isinstance(cfg.student.weights, FullWeightsConfig) and "student.weights.kind=lora" not in settings
    is_whole = not cfg.compute.decode.checkpoint and "compute.decode.checkpoint=true" not in settings
    is_split = cfg.parallel.shard or "parallel.shard=true" in settings
    keeps_inputs = cfg.compute.activation_checkpointing or "compute.activation_checkpointing=true" in settings
    idle = {
        "compute.offload=block": is_full or is_split,
        "compute.quantization=int8": is_full or is_split or "compute.quantization=nf4" in settings,
        "compute.quantization=nf4": is_full or is_split,
        "compute.decode.offload=true": is_whole,
        "compute.activation_offload=true": not keeps_inputs,
        "student.grad_steps=2": "student.grad_steps=1" in settings,
    }
    idle |= {option.setting: is_split for option in options if option.setting.endswith("adamw8bit")}
    return [option for option in options if not idle.get(option.setting, False)]


def cheapest(
    options: Sequence[MemoryOption], fits: Callable[[Sequence[MemoryOption]], bool]
) -> list[MemoryOption] | None:
    """The cheapest set that fits, or None if not even all of them do.

    Any number of cheaper options is better than a dearer one. So each is dropped in turn, the dearest first, if what is
    left still fits: as every option only saves memory, that is the cheapest set, in one trial an option.

    Args:
        options: by price, the cheapest first.
        fits: whether a run with these options fits.
    """
    if fits([]):
        return []
    if not fits(options):
        return None
    kept = list(options)
    for option in reversed(options):
        fewer = [each for each in kept if each is not option]
        if fits(fewer):
            kept = fewer
    return kept
