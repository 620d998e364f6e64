"""Peak training memory of RATS' roles on one base against plain LoRA fine-tuning of the same model.

What is compared: one optimizer step with a base in its own precision, adapters and AdamW moments in float32.
Plain LoRA: one adapter; a flow-matching loss on `grad_steps` noise levels, all their graphs alive at once, as the
student's are. RATS: two adapters (student, EMA teacher); the teacher's guided rollout without gradient; the student's
4-step rollout with gradient through the last `grad_steps` steps; shaping loss; the average's update. Left out on both
sides, because plain LoRA has none: text encoder, VAE and reward (see levers.py for the whole step).
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from measure import peak_bytes
from torch import Tensor

from rats_video.backbones.base import PipelineBackbone
from rats_video.backbones.compute import LoraConfig
from rats_video.backbones.wan import WanBackbone
from rats_video.condition import Condition
from rats_video.diffusion.rollout import rollout
from rats_video.methods.shaping import ShapingConfig, shaping_by_horizon, weigh_horizons
from rats_video.optim import ema_update_
from rats_video.types import Trajectory

NUM_STEPS, SHIFT = 4, 3.0


def wide(backbone: WanBackbone, num_layers: int = 4, ffn_dim: int = 1024) -> WanBackbone:
    """A Wan of random weights that are large beside its activations, as they are in real models (5 million)."""
    from diffusers import WanTransformer3DModel

    torch.manual_seed(0)
    small = backbone.parts["transformer"].config
    transformer = WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=8, attention_head_dim=32, in_channels=small.in_channels,
        out_channels=small.out_channels, text_dim=small.text_dim, freq_dim=64, ffn_dim=ffn_dim, num_layers=num_layers,
    )  # fmt: skip
    return WanBackbone(**{**backbone.parts, "transformer": transformer.to(backbone.device)})


def compare(base: PipelineBackbone, noise: Tensor, *, grad_steps: int, rank: int = 16) -> tuple[int, int]:
    """Peak bytes `(rats, plain)` of a training step on clips of this noise `[B, C, F, H, W]`."""
    lora = LoraConfig(kind="lora", rank=rank, alpha=rank)
    text = base.encode_text(["a red circle"] * len(noise))
    return _rats(_fresh(base), noise, text, lora, grad_steps), _plain(_fresh(base), noise, text, lora, grad_steps)


def _fresh(base: PipelineBackbone) -> PipelineBackbone:
    """The base as it was before any adapter was added."""
    other = copy.copy(base)
    other.parts = {**base.parts, **{name: copy.deepcopy(network) for name, network in base.denoisers.items()}}
    return other


def _plain(base: PipelineBackbone, noise: Tensor, condition: Condition, lora: LoraConfig, grad_steps: int) -> int:
    student = base.with_adapter("student", lora)
    x0 = torch.zeros_like(noise)

    def loss() -> Tensor:
        total = torch.zeros((), device=noise.device)
        for sigma in torch.linspace(0.9, 0.1, grad_steps).tolist():
            velocity = student.velocity(
                (1 - sigma) * x0 + sigma * noise, noise.new_full((len(noise),), sigma), condition
            )
            total = total + (velocity - (noise - x0)).square().mean()
        return total

    return _step_bytes(base, student, loss, lambda: None)


def _rats(base: PipelineBackbone, noise: Tensor, condition: Condition, lora: LoraConfig, grad_steps: int) -> int:
    student, teacher = base.with_adapter("student", lora), base.with_adapter("teacher", lora)
    ema_update_(teacher.weights, student.weights, decay=0.0)
    for weight in teacher.weights.values():
        weight.requires_grad = False
    horizons = range(1, NUM_STEPS + 1)
    negative = base.encode_text([""])

    def loss() -> Tensor:
        with torch.no_grad():
            guide = rollout(
                teacher.velocity, noise, base.sigmas(2 * NUM_STEPS, SHIFT), condition,
                negative=negative, guidance_scale=3.0, keep=[2 * step for step in horizons],
            )  # fmt: skip
        path = rollout(
            student.velocity, noise, base.sigmas(NUM_STEPS, SHIFT), condition, keep=horizons,
            grad_steps=range(NUM_STEPS - grad_steps, NUM_STEPS),
        )  # fmt: skip
        return _shaping(path, guide)

    return _step_bytes(base, student, loss, lambda: ema_update_(teacher.weights, student.weights, decay=0.99))


def _shaping(path: Trajectory, guide: Trajectory) -> Tensor:
    return weigh_horizons(shaping_by_horizon(path, guide, ShapingConfig(motion_weight=0.5)), None).mean()


def _step_bytes(
    base: PipelineBackbone, student: PipelineBackbone, loss: Callable[[], Tensor], after: Callable[[], None]
) -> int:
    optimizer = torch.optim.AdamW(student.weights.values(), lr=1e-4)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        loss().backward()
        optimizer.step()
        after()

    step()  # makes the optimizer's moments
    optimizer.zero_grad(set_to_none=True)
    moments = [value for state in optimizer.state.values() for value in state.values()]
    return peak_bytes(step, [*base.denoiser.parameters(), *moments])
