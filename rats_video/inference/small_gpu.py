"""Sampling on a GPU that does not hold the model."""

from __future__ import annotations

import torch
from torch import nn

from rats_video.backbones.base import PipelineBackbone


def offload(model: PipelineBackbone, device: torch.device) -> None:
    """Keep text encoders and denoiser in host memory, one layer at a time on the device; the VAE stays there.

    The same clips, slower. Call it once, after all adapters are added; the model must be in host memory.
    """
    from diffusers.hooks import apply_group_offloading

    model.vae.to(device)
    for part in model.parts.values():
        if isinstance(part, nn.Module) and part is not model.vae:
            apply_group_offloading(
                part, onload_device=device, offload_device=torch.device("cpu"), offload_type="leaf_level",
                use_stream=device.type == "cuda",
            )  # fmt: skip
