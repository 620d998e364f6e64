"""Wan 2.1 1.3B in its real shape with random weights: what speed and memory need, no more."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from rats_video.backbones.text_cache import TextCache
from rats_video.backbones.wan import TEXT_LENGTH, WanBackbone
from rats_video.distillation.settings import DistillConfig
from rats_video.types import RewardScores, TextCondition

PROMPTS = ("a cat walks on the grass", "")
OPTIONS = {
    "model": "random", "reward": {"path": "random"}, "shift": 3.0,
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


def random_wan(cfg: DistillConfig, device: torch.device) -> WanBackbone:
    """The transformer in bfloat16 and the VAE in float32, with random prompts of 100 rows in the cache."""
    from diffusers import AutoencoderKLWan, WanTransformer3DModel

    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(device):
        transformer = WanTransformer3DModel(num_attention_heads=12, ffn_dim=8960, num_layers=30)
    torch.set_default_dtype(torch.float32)
    with torch.device(device):
        vae = AutoencoderKLWan()
    for name, module in transformer.named_modules():
        if any(part in name for part in WanTransformer3DModel._keep_in_fp32_modules):  # noqa: SLF001
            module.float()
    backbone = WanBackbone(transformer=transformer.eval(), vae=vae.eval(), tokenizer=None)
    rows = {prompt: TextCondition(torch.randn(1, 100, 4096, dtype=torch.bfloat16)) for prompt in PROMPTS}
    for row in rows.values():
        row.embeds[:, -1] = 0  # stands for the rows up to TEXT_LENGTH
    assert TEXT_LENGTH == 512
    backbone.cache_text(TextCache(rows))
    backbone.decoding = cfg.compute.decode
    return backbone


class RandomClipReward(nn.Module):
    """A CLIP ViT-H/14 of random weights on 8 frames of each clip: what PickScore and HPS cost."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
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
        chosen = videos[:, torch.linspace(0, videos.shape[1] - 1, 8).long()].flatten(0, 1)
        small = nn.functional.interpolate(chosen, size=(224, 224), mode="bicubic", antialias=True)
        scores = self.vision(small).image_embeds.mean(dim=1).unflatten(0, (len(videos), 8))
        return RewardScores(scores.mean(dim=1), nn.functional.interpolate(scores[:, None], videos.shape[1])[:, 0])
