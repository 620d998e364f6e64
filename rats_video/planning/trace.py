"""A step of the real method on meta tensors: what it holds at each moment and what it computes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from rats_video.backbones.base import PipelineBackbone
from rats_video.backbones.low_bit import low_bit_layers
from rats_video.condition import GivenFrames
from rats_video.meta import META
from rats_video.methods.base import Critic
from rats_video.methods.teacher import EmaTeacherConfig
from rats_video.optim import OptimizerConfig
from rats_video.planning.memory_tracker import MemoryTracker, Workspace
from rats_video.planning.watched import PlannedRun
from rats_video.types import ClipSpec, LatentScorer, PromptBatch, Reward

Counts = dict[tuple[str, str], float]
"""`(phase, owner) -> bytes` at the phase's peak, `(phase, "held:" + owner) -> bytes` when it began,
`(phase, "flops") -> FLOPs`, `("weights" or "parameters", part) -> bytes or count`, and `("low bit", "traffic") ->` the
bytes that are read and written to unpack all of a base in few bits."""

HELD, FLOPS, RESIDENT, TRAFFIC = "held:", "flops", "resident", "traffic"
TRAINED, AVERAGE, DENOISER, TEXT = "student (trained)", "EMA teacher", "denoiser (base)", "text encoder"
CRITIC_WEIGHTS, PICTURES = "critic (trained)", "pictures"
PART_NAMES = {"vae": "VAE", "image_encoder": "image encoder"}


def trace_step(run: PlannedRun, *, micro_batches: int, foreach: bool) -> Counts:
    """The loop's update, optimizers included, without decode and reward; weights and optimizer state are not counted.

    Of a critic's rounds, which are alike, it makes one.

    Args:
        run: the roles, and the batch.
        micro_batches: of an update; the gradients of one are there while the next is worked on.
        foreach: the optimizers' temporaries: of all weights at once as on a GPU, or of one at a time as on a CPU.
    """
    cfg, tracker, student = run.cfg, run.watch.tracker, run.student
    weights = list(student.weights.values())
    optimizer = _stepped(tracker, weights, cfg.training.optimizer, foreach=foreach)
    for weight in weights:
        weight.grad = torch.empty_like(weight)
    tracker.own_modules(RESIDENT, [role.denoiser for role in (student, run.teacher, run.role) if role is not None])
    tracker.own("gradients", (weight.grad for weight in weights if weight.grad is not None))
    method = run.build()
    tracker.own_modules(RESIDENT, [*run.own, *run.frozen])
    for critic in method.critics.values():
        _trace_critic(run, critic, micro_batches=micro_batches, foreach=foreach)
    with tracker:
        student.denoiser.train()
        if micro_batches == 1:
            optimizer.zero_grad(set_to_none=True)
        loss, _ = method.step(run.batch)
        tracker.enter_phase("student backward")
        tracker.backward(loss)
        torch.nn.utils.clip_grad_norm_(weights, cfg.training.optimizer.max_grad_norm)
        tracker.enter_phase("optimizer")
        optimizer.step()
    numbers = _numbers(tracker)
    if unmet := sum(weight.nbytes for weight in weights if weight.grad is None):  # of an expert: no sigma is known here
        numbers |= {(phase, "gradients"): float(unmet) for phase in ("student backward", "optimizer")}
    return numbers


def _stepped(
    tracker: MemoryTracker, weights: Sequence[nn.Parameter], cfg: OptimizerConfig, *, foreach: bool
) -> torch.optim.Optimizer:
    """An optimizer after its first step: from the second on its state is there."""
    optimizer = torch.optim.AdamW(weights, lr=cfg.lr, foreach=foreach)
    for weight in weights:
        weight.grad = torch.empty_like(weight)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    tracker.own(RESIDENT, (value for state in optimizer.state.values() for value in state.values()))
    return optimizer


def _trace_critic(run: PlannedRun, critic: Critic, *, micro_batches: int, foreach: bool) -> None:
    """One round of a critic."""
    tracker, weights = run.watch.tracker, list(critic.weights.values())
    optimizer = _stepped(tracker, weights, critic.optimizer, foreach=foreach)
    if micro_batches > 1:
        for weight in weights:
            weight.grad = torch.empty_like(weight)
        tracker.own("critic gradients", (weight.grad for weight in weights if weight.grad is not None))
    run.watch.in_critic = True
    with tracker:
        loss, _ = critic.loss(run.batch, 0)
        tracker.enter_phase("critic backward")
        tracker.backward(loss)
        torch.nn.utils.clip_grad_norm_(weights, critic.optimizer.max_grad_norm)
        tracker.enter_phase("critic optimizer")
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    run.watch.in_critic = False


def trace_decode(
    backbone: PipelineBackbone, batch: PromptBatch, *, with_gradient: bool, workspace: Workspace
) -> Counts:
    """Decode, as the teacher calls it (without gradient) and as the student does."""
    tracker = MemoryTracker(workspace)
    latents = batch.noise.detach().requires_grad_()
    tracker.own(RESIDENT, [latents])
    tracker.own_modules(RESIDENT, [part for part in backbone.parts.values() if isinstance(part, nn.Module)])
    with tracker:
        tracker.enter_phase("teacher decode")
        with torch.no_grad():
            videos = backbone.decode(latents)
        tracker.enter_phase("teacher reward")
        del videos
        tracker.enter_phase("student decode")
        with torch.set_grad_enabled(with_gradient):
            videos = backbone.decode(latents, batch.grad_frames)
        tracker.enter_phase("student reward")
        if with_gradient:
            loss = videos.mean()
            del videos
            tracker.enter_phase("decode backward")
            tracker.backward(loss)
    return _numbers(tracker)


def trace_reward(
    reward: Reward, inputs: Tensor, prompts: Sequence[str], *, with_gradient: bool, workspace: Workspace
) -> Counts:
    """The reward of clips `[B, T, 3, height, width]`, or of latents, as the teacher asks for it and as the student."""
    tracker = MemoryTracker(workspace)
    inputs = inputs.requires_grad_()
    score = reward.score_latents if isinstance(reward, LatentScorer) else reward
    tracker.own(RESIDENT, [inputs])
    tracker.own_modules(RESIDENT, [reward] if isinstance(reward, nn.Module) else [])
    with tracker:
        tracker.enter_phase("teacher reward")
        with torch.no_grad():
            score(inputs, prompts)
        tracker.enter_phase("student reward")
        with torch.set_grad_enabled(with_gradient):
            loss = score(inputs, prompts).clip.mean()
        if with_gradient:
            tracker.enter_phase("reward backward")
            tracker.backward(loss)
    return _numbers(tracker)


def trace_text(backbone: PipelineBackbone, prompts: Sequence[str]) -> Counts:
    """Encoding the prompts of a batch."""
    tracker = MemoryTracker()
    tracker.own_modules(RESIDENT, [part for part in backbone.parts.values() if isinstance(part, nn.Module)])
    with tracker:
        tracker.enter_phase("text")
        backbone.encode_text(prompts)
    return _numbers(tracker)


def trace_pictures(backbone: PipelineBackbone, clip: ClipSpec) -> Counts:
    """Encoding the picture that one clip starts from."""
    tracker = MemoryTracker()
    tracker.own_modules(RESIDENT, [part for part in backbone.parts.values() if isinstance(part, nn.Module)])
    with tracker:
        tracker.enter_phase(PICTURES)
        given_pictures(backbone, clip, 1)
    return _numbers(tracker)


def given_pictures(backbone: PipelineBackbone, clip: ClipSpec, clips: int) -> GivenFrames:
    """What the model is told of that many clips' pictures, without numbers."""
    given = backbone.given_frames(clip, torch.empty(1, 3, clip.height, clip.width, device=META))
    return GivenFrames.cat([given] * clips)


def count_weights(run: PlannedRun, base: PipelineBackbone, reward: Reward) -> Counts:
    """Bytes and counts of weights by part; weights that several parts share count for the first."""
    seen: set[int] = set()
    layers = list(low_bit_layers(base.denoiser))
    counts = {id(layer.weight): layer.in_features * layer.out_features for layer in layers}  # not of bytes of codes
    counts |= {id(layer.scale): 0 for layer in layers}
    found: dict[tuple[str, str], float] = defaultdict(float)
    for part, tensors in _weights(run, base, reward):
        for tensor in tensors:
            if id(tensor) not in seen:
                seen.add(id(tensor))
                found["weights", part] += tensor.nbytes
                numel = tensor.numel() if isinstance(tensor, nn.Parameter) else 0
                found["parameters", part] += counts.get(id(tensor), numel)
    if layers:
        found["low bit", TRAFFIC] = sum(counts[id(layer.weight)] * layer.traffic for layer in layers)
    return dict(found)


def _weights(run: PlannedRun, base: PipelineBackbone, reward: Reward) -> Iterator[tuple[str, list[Tensor]]]:
    yield TRAINED, list(run.student.weights.values())
    if run.role is not None:
        yield CRITIC_WEIGHTS, list(run.role.weights.values())
    for network in run.own:
        yield CRITIC_WEIGHTS, _held_by(network)
    for network in run.frozen:
        yield "vision", _held_by(network)
    if isinstance(run.cfg.teacher, EmaTeacherConfig):
        yield AVERAGE, list(run.teacher.weights.values())
    for role in (run.teacher, run.student, *([] if run.role is None else [run.role])):
        yield DENOISER, _held_by(role.denoiser)
    for name, part in base.parts.items():
        if isinstance(part, nn.Module):
            yield (TEXT if name.startswith("text_encoder") else PART_NAMES.get(name, name)), _held_by(part)
    if isinstance(reward, nn.Module):
        yield "reward", _held_by(reward)


def _held_by(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


def _numbers(tracker: MemoryTracker) -> Counts:
    found: Counts = {}
    for name, phase in tracker.phases.items():
        found |= {(name, owner): float(size) for owner, size in phase.peak.items() if owner != RESIDENT and size}
        found |= {
            (name, HELD + owner): float(size) for owner, size in phase.start.items() if owner != RESIDENT and size
        }
        found[name, FLOPS] = phase.flops
    return found


def at_full_depth(measure: Callable[[Mapping[str, int]], Counts], depths: Mapping[str, int]) -> Counts:
    """Numbers of a deep model from shallow ones: blocks are alike, so each number is linear in each depth.

    Args:
        measure: numbers of a model with that many blocks.
        depths: how often each kind of block repeats in the real model.
    """
    shallow = {key: min(depth, 2) for key, depth in depths.items()}
    base = measure(shallow)
    total = dict(base)
    for key, depth in depths.items():
        if depth > shallow[key]:
            deeper = measure({**shallow, key: shallow[key] + 1})
            for name in base.keys() | deeper.keys():
                slope = deeper.get(name, 0.0) - base.get(name, 0.0)
                total[name] = total.get(name, 0.0) + (depth - shallow[key]) * slope
    return total
