"""HunyuanVideo text-to-video, from any folder that `diffusers.HunyuanVideoPipeline` loads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from rats_video.backbones.base import PipelineBackbone
from rats_video.backbones.family import NUM_TRAIN_TIMESTEPS
from rats_video.backbones.hunyuan_decode import decode_tiles, use_maskless_attention
from rats_video.backbones.stock import StockCall
from rats_video.condition import Condition

TEXT_LENGTH = 256  # rows of Llama features a prompt, after the template's own are cut off
POOLED_LENGTH = 77  # tokens CLIP reads
LLAMA_LAYER = -3  # hidden states taken: the last two layers are skipped


class HunyuanVideoBackbone(PipelineBackbone):
    """A HunyuanVideo pipeline's models: `transformer`, `vae`, Llama `text_encoder` and CLIP `text_encoder_2`.

    The released transformer is distilled to take its guidance scale as an input: `embedded_guidance`. Guidance by two
    calls works beside it, as the pipeline's `true_cfg_scale` does.
    """

    family = "HunyuanVideo"
    pipelines = ("HunyuanVideoPipeline",)
    text_limit = TEXT_LENGTH
    depth_keys = ("num_layers", "num_single_layers")
    exact_window = False  # group norms average over time: each pixel depends on later latents too
    lora_targets = (
        "to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out",
        "ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2",  # dual stream
        "proj_mlp", "proj_out",  # single stream: one matrix projects both out (and the last layer has that name too)
    )  # fmt: skip
    original_names = (
        (r"^x_embedder\.", "img_in."),
        (r"^time_text_embed\.timestep_embedder\.linear_1\.", "time_in.mlp.0."),
        (r"^time_text_embed\.timestep_embedder\.linear_2\.", "time_in.mlp.2."),
        (r"^time_text_embed\.guidance_embedder\.linear_1\.", "guidance_in.mlp.0."),
        (r"^time_text_embed\.guidance_embedder\.linear_2\.", "guidance_in.mlp.2."),
        (r"^time_text_embed\.text_embedder\.linear_1\.", "vector_in.in_layer."),
        (r"^time_text_embed\.text_embedder\.linear_2\.", "vector_in.out_layer."),
        (r"^context_embedder\.time_text_embed\.timestep_embedder\.linear_1\.", "txt_in.t_embedder.mlp.0."),
        (r"^context_embedder\.time_text_embed\.timestep_embedder\.linear_2\.", "txt_in.t_embedder.mlp.2."),
        (r"^context_embedder\.time_text_embed\.text_embedder\.", "txt_in.c_embedder."),
        (r"^context_embedder\.proj_in\.", "txt_in.input_embedder."),
        (r"^context_embedder\.token_refiner\.refiner_blocks\.(\d+)\.", r"txt_in.individual_token_refiner.blocks.\1."),
        (r"^(txt_in\..*)\.norm_out\.linear\.", r"\1.adaLN_modulation.1."),
        (r"^(txt_in\..*)\.attn\.to_out\.0\.", r"\1.self_attn_proj."),
        (r"^(txt_in\..*)\.ff\.", r"\1.mlp."),
        (r"^single_transformer_blocks\.(\d+)\.norm\.linear\.", r"single_blocks.\1.modulation.linear."),
        (r"^single_transformer_blocks\.(\d+)\.attn\.norm_([qk])\.", r"single_blocks.\1.\2_norm."),
        (r"^single_transformer_blocks\.(\d+)\.attn\.to_([qkv])\.", r"single_blocks.\1.linear1[\2]."),
        (r"^single_transformer_blocks\.(\d+)\.proj_mlp\.", r"single_blocks.\1.linear1[3]."),
        (r"^single_transformer_blocks\.(\d+)\.proj_out\.", r"single_blocks.\1.linear2."),
        (r"^transformer_blocks\.", "double_blocks."),
        (r"\.norm1\.linear\.", ".img_mod.linear."),
        (r"\.norm1_context\.linear\.", ".txt_mod.linear."),
        (r"\.attn\.norm_added_([qk])\.", r".txt_attn_\1_norm."),
        (r"\.attn\.norm_([qk])\.", r".img_attn_\1_norm."),
        (r"\.attn\.add_([qkv])_proj\.", r".txt_attn_qkv[\1]."),
        (r"^(double_blocks\..*)\.attn\.to_([qkv])\.", r"\1.img_attn_qkv[\2]."),
        (r"\.attn\.to_([qkv])\.", r".self_attn_qkv[\1]."),
        (r"\.attn\.to_out\.0\.", ".img_attn_proj."),
        (r"\.attn\.to_add_out\.", ".txt_attn_proj."),
        (r"\.ff\.", ".img_mlp."),
        (r"\.ff_context\.", ".txt_mlp."),
        (r"\.net\.0\.proj\.", ".fc1."),
        (r"\.net\.2\.", ".fc2."),
        (r"^norm_out\.linear\.", "final_layer.adaLN_modulation.1."),
        (r"^proj_out\.", "final_layer.linear."),
        (r"\[q\]", "[0]"),
        (r"\[k\]", "[1]"),
        (r"\[v\]", "[2]"),
    )
    swapped_halves = ("norm_out.linear",)

    def __init__(self, **parts: Any) -> None:
        super().__init__(**parts)
        use_maskless_attention(self.vae)

    @classmethod
    def component_classes(cls) -> dict[str, Any]:
        """The class of each part."""
        from diffusers import AutoencoderKLHunyuanVideo, HunyuanVideoTransformer3DModel
        from transformers import AutoTokenizer, CLIPTextModel, LlamaModel

        return {
            "transformer": HunyuanVideoTransformer3DModel,
            "vae": AutoencoderKLHunyuanVideo,
            "text_encoder": LlamaModel,
            "tokenizer": AutoTokenizer,
            "text_encoder_2": CLIPTextModel,
            "tokenizer_2": AutoTokenizer,
        }

    @property
    def patch_size(self) -> tuple[int, int, int]:
        """Latent frames, rows and columns a token."""
        config = self.parts["transformer"].config
        return config.patch_size_t, config.patch_size, config.patch_size

    def _encode(self, prompts: Sequence[str]) -> Condition:
        """Llama features `[B, 256, D]` with their mask, and CLIP's pooled `[B, P]`, as `encode_prompt` gives them."""
        from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video import DEFAULT_PROMPT_TEMPLATE

        pad = partial(self._tokenize, padding="max_length", truncation=True)
        start = int(DEFAULT_PROMPT_TEMPLATE["crop_start"])  # the system message tells Llama what to look for, no more
        asked = [str(DEFAULT_PROMPT_TEMPLATE["template"]).format(prompt) for prompt in prompts]
        tokens = pad("tokenizer", asked, max_length=TEXT_LENGTH + start)
        llama = self.parts["text_encoder"](tokens.input_ids, tokens.attention_mask, output_hidden_states=True)
        clip = self.parts["text_encoder_2"](pad("tokenizer_2", list(prompts), max_length=POOLED_LENGTH).input_ids)
        return Condition(
            llama.hidden_states[LLAMA_LAYER][:, start:], tokens.attention_mask[:, start:], clip.pooler_output
        )

    def _tokenize(self, tokenizer: str, prompts: list[str], **options: Any) -> Any:
        return self.parts[tokenizer](prompts, return_tensors="pt", **options).to(self.device)

    def _velocity(self, latents: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
        transformer = self.parts["transformer"]
        own = condition.map(lambda part: part.to(transformer.dtype))
        guidance = torch.full_like(sigma, self.embedded_guidance, dtype=transformer.dtype) * 1000.0
        velocity: Tensor = transformer(
            latents.to(transformer.dtype), sigma * NUM_TRAIN_TIMESTEPS, own.embeds, own.mask, own.pooled,
            guidance=guidance if transformer.config.guidance_embeds else None, return_dict=False,
        )[0]  # fmt: skip
        return velocity.to(latents.dtype)

    def _to_vae(self, latents: Tensor) -> Tensor:
        return latents / float(self.vae.config.scaling_factor)

    def _from_vae(self, latents: Tensor) -> Tensor:
        return latents * float(self.vae.config.scaling_factor)

    def _decode(self, latents: Tensor, grad_frames: range | None) -> Tensor:
        if grad_frames is not None:
            raise ValueError("no window of HunyuanVideo's decoder is exact")
        return decode_tiles(self.vae, latents, recompute=self.decoding.checkpoint)

    def stock_call(self, num_steps: int, shift: float) -> StockCall:
        """As most; `guidance_scale` is an input of a network that was distilled to take it."""
        stock = super().stock_call(num_steps, shift)
        told = self.embedded_guidance if self.parts["transformer"].config.guidance_embeds else 1.0
        return replace(
            stock, call={**stock.call, "guidance_scale": told},
            note=f"guidance_scale={told} is an input of the network, told as in training: one call a step",
        )  # fmt: skip
