"""Models in their real shapes with random weights: what speed and memory need, no more."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rats_video.backbones.architecture import build_on_meta, find_architecture
from rats_video.backbones.base import TEXT_ENCODERS, PipelineBackbone
from rats_video.backbones.low_bit import quantise
from rats_video.backbones.text_cache import TextCache
from rats_video.distillation.roles import build_roles, prepare_base
from rats_video.distillation.settings import DistillConfig
from rats_video.methods.gate import build_gate
from rats_video.methods.rats import Rats
from rats_video.methods.teacher import TeacherSampler
from rats_video.planning.memory_tracker import MemoryTracker
from rats_video.types import ClipSpec, Reward, RewardScores

PROMPTS = ("a fast red circle moving left on a gray background", "")
OPTIONS = {
    "model": "random", "architecture": "wan21_1b", "reward": {"path": "random"}, "shift": 3.0,
    "clip": {"num_frames": 81, "height": 480, "width": 832, "fps": 16.0},
    "method": {"gate": {"kind": "sigmoid", "level": "frame"}},
    "teacher": {"kind": "ema", "num_steps": 8, "guidance_scale": 1.0},
    "student": {"num_steps": [4], "grad_steps": 1, "weights": {"kind": "lora", "rank": 64}},
    "training": {"batch_size": 1, "optimizer": {"lr": 1e-5}},
    "compute": {
        "dtype": "bfloat16", "activation_checkpointing": True, "cache_text": True,
        "decode": {"checkpoint": True, "window": 2},
    },
}  # fmt: skip
"""A teacher of 8 steps, because only its calls count here: the time of 48 is 6 times that."""


def random_model(cfg: DistillConfig, device: torch.device) -> PipelineBackbone:
    """The configured model, with random prompts in its cache in place of a text encoder."""
    hollow = build_on_meta(
        find_architecture(cfg.model, cfg.architecture, cfg.backbone), getattr(torch, cfg.compute.dtype)
    )
    prompts = (*PROMPTS, cfg.teacher.negative_prompt)
    with MemoryTracker():
        encoded = hollow.encode_text([PROMPTS[0]])
    backbone = type(hollow)(**{**hollow.parts, **random_parts(hollow, device)})
    quantise(backbone.denoiser, cfg.compute.quantization)
    prepare_base(cfg, backbone, device)
    backbone.cache_text(TextCache({prompt: encoded.map(_random) for prompt in prompts}))
    return backbone


def hollow_model(cfg: DistillConfig) -> PipelineBackbone:
    """The configured model on the meta device."""
    architecture = find_architecture(cfg.model, cfg.architecture, cfg.backbone)
    return build_on_meta(architecture, getattr(torch, cfg.compute.dtype))


def random_parts(hollow: PipelineBackbone, device: torch.device) -> dict[str, nn.Module]:
    """The networks but the text encoders of a model on the meta device, with the weights of a fresh one of seed 0."""
    torch.manual_seed(0)
    parts = {}
    for name, part in hollow.parts.items():
        if not isinstance(part, nn.Module) or name.startswith(TEXT_ENCODERS):
            continue
        torch.set_default_dtype(hollow.dtype if name in hollow.denoiser_parts else torch.float32)
        with device:
            parts[name] = type(part).from_config(dict(part.config)).eval()  # type: ignore[attr-defined]
        torch.set_default_dtype(torch.float32)
        for weight, same in zip(parts[name].parameters(), part.parameters(), strict=True):
            weight.data = weight.data.to(same.dtype)  # a few that a family keeps in float32
    return parts


def random_rats(cfg: DistillConfig, backbone: PipelineBackbone, reward: Reward) -> Rats:
    """RATS with roles on that model, judged by that reward."""
    student, teacher = build_roles(cfg, backbone)
    sampler = TeacherSampler(teacher, reward, cfg.teacher, cfg.shift, predictions=cfg.method.compares_predictions)
    gate = build_gate(cfg.method.gate, student.temporal_stride)
    return Rats(student, sampler, reward, cfg.student, cfg.shift, gate=gate, config=cfg.method)


def stock_frames(pipe: Any, noise: Tensor, clip: ClipSpec, num_steps: int, output_type: str, **prompt: Any) -> Tensor:
    """A Wan pipeline's output, unguided, from given noise and prompts or their embeddings."""
    frames: Tensor = pipe(
        latents=noise, num_inference_steps=num_steps, guidance_scale=1.0, num_frames=clip.num_frames,
        height=clip.height, width=clip.width, output_type=output_type, **prompt,
    ).frames  # fmt: skip
    return frames


def _random(part: Tensor) -> Tensor:
    """Rows of a prompt: features, or a mask that hides none. Wan's last row stands for all after it, and is zero."""
    if part.ndim < 3:
        return torch.ones(part.shape, dtype=part.dtype)
    rows = torch.randn(part.shape, dtype=part.dtype)
    rows[:, -1] = 0
    return rows


class RandomClipReward(nn.Module):
    """A CLIP ViT-H/14 of random weights on some frames of each clip: what PickScore and HPS cost."""

    def __init__(self, device: torch.device, frames: int = 8) -> None:
        super().__init__()
        self.frames = frames
        from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

        shape = CLIPVisionConfig(
            hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=16, patch_size=14,
            projection_dim=1024,
        )  # fmt: skip
        with torch.device(device):
            self.vision = CLIPVisionModelWithProjection(shape).eval().requires_grad_(requires_grad=False)

    def forward(self, videos: Tensor, prompts: Sequence[str]) -> RewardScores:
        """Score `videos` `[B, T, 3, height, width]`."""
        del prompts
        chosen = videos[:, torch.linspace(0, videos.shape[1] - 1, self.frames).long()].flatten(0, 1)
        small = nn.functional.interpolate(chosen, size=(224, 224), mode="bicubic", antialias=True)
        scores = self.vision(small).image_embeds.mean(dim=1).unflatten(0, (len(videos), self.frames))
        return RewardScores(scores.mean(dim=1), nn.functional.interpolate(scores[:, None], videos.shape[1])[:, 0])
