"""Qwen-Image text-to-image, from any folder that `diffusers.QwenImagePipeline` loads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from rats_video.backbones.channel_stats import ChannelStatsBackbone
from rats_video.backbones.family import DENOISER
from rats_video.backbones.image import ImageBackbone, pack, refuse_window, unpack
from rats_video.backbones.stock import StockCall
from rats_video.backbones.wan_decode import recompute_blocks
from rats_video.condition import Condition
from rats_video.diffusion.guidance import norm_preserving

TEXT_LENGTH = 512  # rows of a prompt and the template's end, after the template's beginning is cut off
TEMPLATE = (
    "<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, quantity, text, spatial "
    "relationships of the objects and background:<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
)
TEMPLATE_START = 34  # its tokens before the prompt


class QwenImageBackbone(ChannelStatsBackbone, ImageBackbone):
    """A Qwen-Image pipeline's models: `transformer`, `vae` (Wan's, of one frame) and Qwen 2.5 VL as `text_encoder`.

    Guidance takes the plain formula's direction and the length of each token with the prompt, as the pipeline does.
    """

    family = "Qwen-Image"
    pipelines = ("QwenImagePipeline",)
    text_limit = TEXT_LENGTH
    packing = 2
    can_share_tokens = True
    lora_targets = (
        "to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out",
        "img_mlp.net.0.proj", "img_mlp.net.2", "txt_mlp.net.0.proj", "txt_mlp.net.2",
    )  # fmt: skip

    @classmethod
    def check(cls, index: Mapping[str, Any], configs: Mapping[str, Mapping[str, Any]], where: str) -> None:
        """As every family; its transformer takes the channels of a patch, and counts those it makes by the latent."""
        denoiser = dict(configs.get(DENOISER, {}))
        if isinstance(made := denoiser.get("out_channels"), int):
            denoiser["out_channels"] = 4 * made
        super().check(index, {**configs, DENOISER: denoiser}, where)

    @classmethod
    def component_classes(cls) -> dict[str, Any]:
        """The class of each part."""
        from diffusers import AutoencoderKLQwenImage, QwenImageTransformer2DModel
        from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration

        return {
            "transformer": QwenImageTransformer2DModel,
            "vae": AutoencoderKLQwenImage,
            "text_encoder": Qwen2_5_VLForConditionalGeneration,
            "tokenizer": AutoTokenizer,
        }

    def _encode(self, prompts: Sequence[str]) -> Condition:
        """The last layer's features `[B, L, D]` with their mask, L <= 512, zero where there is no token."""
        tokens = self.parts["tokenizer"](
            [TEMPLATE.format(prompt) for prompt in prompts], padding=True, padding_side="right", truncation=True,
            max_length=TEMPLATE_START + TEXT_LENGTH, return_tensors="pt",
        ).to(self.device)  # fmt: skip
        # Without its head, which would make a number of each token and word.
        seen = self.parts["text_encoder"].model(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask)
        mask = tokens.attention_mask[:, TEMPLATE_START:]
        return Condition(seen.last_hidden_state[:, TEMPLATE_START:] * mask[..., None], mask)

    def _velocity(self, latents: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
        transformer = self.parts["transformer"]
        rows, columns = latents.shape[3] // 2, latents.shape[4] // 2
        velocity: Tensor = transformer(
            pack(latents).to(transformer.dtype), condition.embeds.to(transformer.dtype), condition.mask, sigma,
            [[(1, rows, columns)]] * len(latents), return_dict=False,
        )[0]  # fmt: skip
        return unpack(velocity, rows).to(latents.dtype)

    def guide(self, cond: Tensor, uncond: Tensor, scale: float | Tensor) -> Tensor:
        """The plain formula, each token at the length it has with the prompt."""
        tokens = norm_preserving(pack(cond), pack(uncond), scale, dim=-1)
        return unpack(tokens, cond.shape[3] // 2)

    def _decode(self, latents: Tensor, grad_frames: range | None) -> Tensor:
        """The VAE's decode of one frame, without its final clamp."""
        from diffusers.models.autoencoders.autoencoder_kl_qwenimage import (
            QwenImageCausalConv3d,
            QwenImageResidualBlock,
        )

        refuse_window(grad_frames)
        decoder = self.vae.decoder
        recompute_blocks(decoder, QwenImageResidualBlock, on=self.decoding.checkpoint)
        caches = [None for module in decoder.modules() if isinstance(module, QwenImageCausalConv3d)]
        pixels: Tensor = decoder(self.vae.post_quant_conv(latents), feat_cache=caches, feat_idx=[0])
        return pixels

    def stock_call(self, num_steps: int, shift: float) -> StockCall:
        """As most; guidance by two calls has another name."""
        call = {"num_inference_steps": num_steps, "true_cfg_scale": 1.0}
        return replace(super().stock_call(num_steps, shift), call=call, latents=pack)
