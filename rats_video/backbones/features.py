"""Features from the middle of a denoiser, for a discriminator that stands on it."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor, nn

from rats_video.backbones.base import PipelineBackbone
from rats_video.condition import Condition
from rats_video.errors import UserError
from rats_video.runtime import is_split
from rats_video.types import VelocityAndFeatures


def middle_features(role: PipelineBackbone) -> tuple[VelocityAndFeatures, int]:
    """Calls of a role that also give the output of its middle block, the bottleneck of a transformer; and its width D.

    Raises:
        UserError: the model has two experts.
    """
    networks = list(role.denoisers.values())
    if len(networks) > 1:
        raise UserError(
            f"{role.family} has two experts, each of its own noise levels: a discriminator needs one network",
            where="method.gan", fix="set method.gan=null",
        )  # fmt: skip
    kinds = set(networks[0]._repeated_blocks or ())  # noqa: SLF001  # what diffusers itself reads
    blocks = [module for module in networks[0].modules() if type(module).__name__ in kinds]
    if not blocks:  # diffusers names none: CogVideoX
        blocks = list(next(child for child in networks[0].children() if isinstance(child, nn.ModuleList)))
    middle: nn.Module = blocks[len(blocks) // 2]

    def call(latents: Tensor, sigma: Tensor, condition: Condition) -> tuple[Tensor, Tensor]:
        seen: list[Any] = []
        hook = middle.register_forward_hook(lambda _block, _inputs, output: seen.append(output))
        try:
            velocity = role.velocity(latents, sigma, condition)
        finally:
            hook.remove()
        beside_text = isinstance(seen[0], tuple)
        features = seen[0][1 if role.text_first else 0] if beside_text else seen[0]
        if features.requires_grad and is_split(next(networks[0].parameters())):
            # FSDP2 gathers the weights outside the blocks when gradient reaches the network's output; here it need not.
            features.register_hook(lambda _gradient: networks[0].unshard())
        return velocity, features[:, -_tokens(role, latents) :].to(latents.dtype)  # some have the text before them

    config = networks[0].config
    return call, int(config.num_attention_heads * config.attention_head_dim)


def _tokens(role: PipelineBackbone, latents: Tensor) -> int:
    sizes = role.split(latents)["video"].shape[2:]
    return math.prod(size // patch for size, patch in zip(sizes, role.patch_size, strict=True))
