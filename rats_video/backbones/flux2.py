"""FLUX.2 klein text-to-image, from any folder that `diffusers.Flux2KleinPipeline` loads."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from rats_video.backbones.channel_stats import ChannelStatsBackbone
from rats_video.backbones.image import KlImageBackbone
from rats_video.backbones.stock import StockCall
from rats_video.condition import Condition
from rats_video.types import ClipSpec

TEXT_LENGTH = 512  # rows of Qwen3 features a prompt; the transformer attends to the padding as well
TEXT_LAYERS = (9, 18, 27)  # hidden states taken, put side by side
STEPS, STEPS_DISTILLED = 50, 4  # that the models were published for


class Flux2KleinBackbone(ChannelStatsBackbone, KlImageBackbone):
    """A FLUX.2 klein pipeline's models: `transformer`, `vae` and Qwen3 as `text_encoder`.

    Its latents are the VAE's in patches of 2 x 2, normalised by the VAE's batch norm. Its pipeline's shift depends on
    the number of steps: here it is that of the steps the model was published for, so that grids nest.
    """

    family = "FLUX.2 klein"
    pipelines = ("Flux2KleinPipeline",)
    settings = ("is_distilled",)
    text_limit = TEXT_LENGTH
    depth_keys = ("num_layers", "num_single_layers")
    can_share_tokens = True
    lora_targets: tuple[str, ...] = (
        "to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out",
        "ff.linear_in", "ff.linear_out", "ff_context.linear_in", "ff_context.linear_out",  # dual stream
        "to_qkv_mlp_proj",  # single stream, and its output, whose name the dual stream's list of layers has too:
    )  # fmt: skip

    def __init__(self, **parts: Any) -> None:
        super().__init__(**parts)
        single = range(parts["transformer"].config.num_single_layers)
        outputs = (f"single_transformer_blocks.{number}.attn.to_out" for number in single)
        self.lora_targets = (*type(self).lora_targets, *outputs)

    @classmethod
    def component_classes(cls) -> dict[str, Any]:
        """The class of each part."""
        from diffusers import AutoencoderKLFlux2, Flux2Transformer2DModel
        from transformers import AutoTokenizer, Qwen3ForCausalLM

        return {
            "transformer": Flux2Transformer2DModel,
            "vae": AutoencoderKLFlux2,
            "text_encoder": Qwen3ForCausalLM,
            "tokenizer": AutoTokenizer,
        }

    @property
    def spatial_stride(self) -> int:
        """Pixels a row or column of the latents, each a patch of the VAE's."""
        return 2 * super().spatial_stride

    def stated(self, scheduler: Mapping[str, Any], clip: ClipSpec) -> dict[str, float]:  # noqa: ARG002
        """The pipeline's shift for as many tokens as the image has, at the steps the model was published for."""
        from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu

        steps = STEPS_DISTILLED if self.parts.get("is_distilled") else STEPS
        return {"shift": math.exp(compute_empirical_mu(math.prod(self.latent_shape(clip)[1:]), steps))}

    def _encode(self, prompts: Sequence[str]) -> Condition:
        """Three layers' features side by side, `[B, 512, 3 D]`, as `encode_prompt` gives them."""
        tokenizer = self.parts["tokenizer"]
        asked = [
            tokenizer.apply_chat_template(
                [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True, enable_thinking=False
            )
            for prompt in prompts
        ]
        tokens = tokenizer(
            asked, padding="max_length", max_length=TEXT_LENGTH, truncation=True, return_tensors="pt"
        ).to(self.device)
        seen = self.parts["text_encoder"].model(  # without its head, which would make a number of each token and word
            input_ids=tokens.input_ids, attention_mask=tokens.attention_mask, output_hidden_states=True, use_cache=False
        )
        return Condition(torch.cat([seen.hidden_states[layer] for layer in TEXT_LAYERS], dim=-1))

    def _velocity(self, latents: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
        transformer = self.parts["transformer"]
        rows, columns = latents.shape[3:]
        velocity: Tensor = transformer(
            _as_tokens(latents).to(transformer.dtype), condition.embeds.to(transformer.dtype),
            sigma, _places((1, rows, columns, 1), latents), _places((1, 1, 1, condition.embeds.shape[1]), latents),
            return_dict=False,
        )[0]  # fmt: skip
        return rearrange(velocity, "b (h w) c -> b c 1 h w", h=rows).to(latents.dtype)

    def _to_vae(self, latents: Tensor) -> Tensor:
        return rearrange(super()._to_vae(latents), "b (c p q) f h w -> b c f (h p) (w q)", p=2, q=2)

    def _from_vae(self, latents: Tensor) -> Tensor:
        return super()._from_vae(rearrange(latents, "b c f (h p) (w q) -> b (c p q) f h w", p=2, q=2))

    def _latent_stats(self, like: Tensor) -> tuple[Tensor, Tensor]:
        norm = self.vae.bn
        std = (norm.running_var + self.vae.config.batch_norm_eps).sqrt()
        return norm.running_mean.to(like).view(1, -1, 1, 1, 1), std.to(like).view(1, -1, 1, 1, 1)

    def stock_call(self, num_steps: int, shift: float) -> StockCall:
        """As most; it takes latents as pictures, and packs them itself."""
        stock = super().stock_call(num_steps, shift)
        return replace(stock, latents=lambda noise: noise.squeeze(2), seen=_as_tokens)


def _as_tokens(latents: Tensor) -> Tensor:
    return rearrange(latents, "b c 1 h w -> b (h w) c")


def _places(sizes: tuple[int, int, int, int], like: Tensor) -> Tensor:
    """Places `[N, 4]` in time, rows, columns and text, of as many tokens as the sizes multiply to."""
    return torch.cartesian_prod(*(torch.arange(size, device=like.device) for size in sizes))
