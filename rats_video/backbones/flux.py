"""FLUX.1 text-to-image, from any folder that `diffusers.FluxPipeline` loads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from rats_video.backbones.image import KlImageBackbone, pack, unpack
from rats_video.backbones.stock import StockCall
from rats_video.condition import Condition

TEXT_LENGTH = 512  # rows of T5 features a prompt; the transformer attends to the padding as well
POOLED_LENGTH = 77  # tokens CLIP reads


class FluxBackbone(KlImageBackbone):
    """A FLUX.1 pipeline's models: `transformer`, `vae`, CLIP `text_encoder` and T5 `text_encoder_2`.

    The transformer of FLUX.1-dev is distilled to take its guidance scale as an input: `embedded_guidance`. Guidance by
    two calls works beside it, as the pipeline's `true_cfg_scale` does.
    """

    family = "FLUX"
    pipelines = ("FluxPipeline",)
    main_tokenizer = "tokenizer_2"
    text_limit = TEXT_LENGTH
    packing = 2
    depth_keys = ("num_layers", "num_single_layers")
    can_share_tokens = True
    lora_targets = (
        "to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out",
        "ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2",  # dual stream
        "proj_mlp", "proj_out",  # single stream: one matrix projects both out (and the last layer has that name too)
    )  # fmt: skip

    @classmethod
    def component_classes(cls) -> dict[str, Any]:
        """The class of each part."""
        from diffusers import AutoencoderKL, FluxTransformer2DModel
        from transformers import AutoTokenizer, CLIPTextModel, T5EncoderModel

        return {
            "transformer": FluxTransformer2DModel,
            "vae": AutoencoderKL,
            "text_encoder": CLIPTextModel,
            "tokenizer": AutoTokenizer,
            "text_encoder_2": T5EncoderModel,
            "tokenizer_2": AutoTokenizer,
        }

    def _encode(self, prompts: Sequence[str]) -> Condition:
        """T5 features `[B, 512, D]` and CLIP's pooled `[B, P]`, as `encode_prompt` gives them."""
        clip = self.parts["text_encoder"](self._tokens("tokenizer", prompts, POOLED_LENGTH))
        t5 = self.parts["text_encoder_2"](self._tokens("tokenizer_2", prompts, TEXT_LENGTH))
        return Condition(t5[0], pooled=clip.pooler_output)

    def _velocity(self, latents: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
        transformer = self.parts["transformer"]
        own = condition.map(lambda part: part.to(transformer.dtype))
        rows, columns = latents.shape[3] // 2, latents.shape[4] // 2
        places = torch.cartesian_prod(*(torch.arange(size, device=latents.device) for size in (1, rows, columns)))
        guidance = torch.full_like(sigma, self.embedded_guidance) if transformer.config.guidance_embeds else None
        velocity: Tensor = transformer(
            pack(latents).to(transformer.dtype), own.embeds, own.pooled, sigma, places.float(),
            places.new_zeros(own.embeds.shape[1], 3).float(), guidance, return_dict=False,
        )[0]  # fmt: skip
        return unpack(velocity, rows).to(latents.dtype)

    def stock_call(self, num_steps: int, shift: float) -> StockCall:
        """As most; `guidance_scale` is an input of a network that was distilled to take it."""
        stock = super().stock_call(num_steps, shift)
        if not self.parts["transformer"].config.guidance_embeds:
            return replace(stock, latents=pack)
        return replace(
            stock, latents=pack, call={**stock.call, "guidance_scale": self.embedded_guidance},
            note=f"guidance_scale={self.embedded_guidance} is an input of the network, told as in training: one call "
            "a step",
        )  # fmt: skip
