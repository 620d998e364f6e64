"""What ComfyUI takes for granted of a denoiser, by the class that diffusers has for it.

Read from ComfyUI 0.10.0: comfy/model_detection.py, comfy/ldm/wan/model.py, comfy/ldm/lightricks/{model,av_model}.py.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from rats_video.backbones.family import DENOISER
from rats_video.export.base import ExportedStudent
from rats_video.reading import read_json

CONFIG = "config"  # the header's key


@dataclass(frozen=True)
class ComfyModel:
    """A kind of denoiser as ComfyUI builds it.

    Args:
        name: for messages.
        fixed: by key of diffusers' config, the values that it can be built with; ComfyUI reads them nowhere.
        lora_programs: the programs that a LoRA under the original names was tried in.
        for_musubi: whether musubi-tuner has it too; its names of a LoRA's layers are Kohya's.
        lora_refused: why it has no LoRA under them; or nothing.
        shift_node: the node that shifts its noise levels for KSampler, where one makes ours.
        ruined_by: the node that must not be there.
        guidance_node: that tells its network the guidance scale it was trained with.
        takes_frame_rate: whether its conditioning has a frame rate.
        picture_node: that takes the picture of image to video, and gives the latent to sample.
        picture_channels: further channels of its input that a picture may take.
        header: what ComfyUI reads from the `config` of the file's header, by key of diffusers' config; or nothing.
        header_fixed: what else it reads there, the same for every model of the kind.
        whole_fixed: values beside `fixed` that a whole denoiser must have, and a LoRA need not.
        sound_nodes: that join its latent with the sound's, take them apart, and decode the sound.
    """

    name: str
    fixed: Mapping[str, tuple[Any, ...]]
    header: Mapping[str, str] = field(default_factory=dict)
    header_fixed: Mapping[str, Any] = field(default_factory=dict)
    whole_fixed: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    sound_nodes: str = ""
    lora_programs: str = ""
    for_musubi: bool = False
    lora_refused: str = ""
    shift_node: str | None = None
    ruined_by: str | None = None
    takes_frame_rate: bool = False
    guidance_node: str | None = None
    picture_channels: int = 0
    picture_node: str = ""

    def refusal(self, config: Mapping[str, Any], *, is_lora: bool) -> str:
        """Why ComfyUI cannot take a student of it, a clause that names each value that differs; or nothing.

        Args:
            config: of diffusers' denoiser; what it does not state is diffusers' default, which is right.
            is_lora: True for a LoRA alone.
        """
        taken, made = config.get("in_channels"), config.get("out_channels")
        if is_lora and self.lora_refused:
            return f"a LoRA on {self.name} cannot be checked: {self.lora_refused}"
        if taken is not None and made is not None and taken not in {made, made + self.picture_channels}:
            other = f" or {made + self.picture_channels}" if self.picture_channels else ""
            return f"its {self.name} takes {taken} channels and makes {made}: ComfyUI's takes {made}{other}"
        if wrong := _differing(config, self.fixed):
            return f"ComfyUI cannot load a {self.name} of {', '.join(wrong)}"
        if not is_lora and (newer := _differing(config, self.whole_fixed)):
            return f"a whole {self.name} of {', '.join(newer)} cannot be checked: diffusers' converter cannot read it"
        if not is_lora and config.get("pos_embed_seq_len") is not None:
            return f"a {self.name} of first and last pictures cannot be checked: diffusers' converter knows no emb_pos"
        return ""

    def config(self, config: Mapping[str, Any], *, is_causal: bool) -> dict[str, str]:
        """The header's `config`, a JSON object as a string, or nothing where ComfyUI reads none.

        Args:
            config: of diffusers' denoiser.
            is_causal: whether a latent frame lies where its first pixel frame does.
        """
        if not self.header:
            return {}
        sizes = {theirs: config[ours] for ours, theirs in self.header.items() if ours in config}
        causal = {"causal_temporal_positioning": is_causal}
        return {CONFIG: json.dumps({"transformer": {**sizes, **causal, **self.header_fixed}})}


_RMS = ("rms_norm_across_heads",)
_LTX_SIZES = {
    name: name
    for name in (
        "in_channels", "num_attention_heads", "attention_head_dim", "cross_attention_dim", "num_layers",
        "caption_channels",
    )
}  # fmt: skip
_LTX2_AUDIO = {
    name: name
    for name in ("audio_num_attention_heads", "audio_attention_head_dim", "audio_cross_attention_dim")
}  # fmt: skip
_LTX_FIXED = {
    "patch_size": (1,), "patch_size_t": (1,), "qk_norm": _RMS, "norm_eps": (1e-6,), "norm_elementwise_affine": (False,),
    "attention_bias": (True,), "attention_out_bias": (True,), "activation_fn": ("gelu-approximate",),
}  # fmt: skip
MODELS: Mapping[str, ComfyModel] = {
    "WanTransformer3DModel": ComfyModel(
        "Wan",
        fixed={
            "attention_head_dim": (128,), "patch_size": ((1, 2, 2),), "text_dim": (4096,), "freq_dim": (256,),
            "out_channels": (16, 48), "qk_norm": _RMS, "cross_attn_norm": (True,), "eps": (1e-6,),
            "image_dim": (None, 1280), "pos_embed_seq_len": (None, 514),
        },
        picture_channels=20,
        picture_node="WanImageToVideo, into WanFirstLastFrameToVideo with a last one, or for TI2V-5B into "
        "Wan22ImageToVideoLatent, which gives the latent to sample",
        lora_programs="This is for ComfyUI, LightX2V and DiffSynth-Studio, which take it as it is. For musubi-tuner "
        "there is the same under its names in `musubi-tuner`",
        for_musubi=True,
        shift_node="ModelSamplingSD3",
    ),
    "LTXVideoTransformer3DModel": ComfyModel(
        "LTX-Video",
        fixed=_LTX_FIXED,
        header=_LTX_SIZES,
        lora_programs="This is for ComfyUI. LightX2V, DiffSynth-Studio and musubi-tuner have no LTX-Video",
        ruined_by="ModelSamplingSD3",
        takes_frame_rate=True,
        picture_node="LTXVImgToVideo with `strength` 1, which gives the latent to sample",
    ),
    "LTX2VideoTransformer3DModel": ComfyModel(
        "LTX-2",
        # Comfy's model divides the sound's 128 numbers into 8 channels of 16 bands.
        fixed={**_LTX_FIXED, "audio_patch_size": (1,), "audio_patch_size_t": (1,), "audio_in_channels": (128,)},
        # What LTX-2.3 and later ones have besides, diffusers' converter of whole denoisers does not know.
        whole_fixed={
            "gated_attn": (False,), "cross_attn_mod": (False,), "audio_gated_attn": (False,),
            "audio_cross_attn_mod": (False,), "use_prompt_embeddings": (True,), "causal_offset": (1,),
            "ff_bias": (True,), "audio_ff_bias": (True,), "use_keyframes_abs_pos_embedding": (False,),
            "rope_double_precision": (True,),
        },
        header={
            **_LTX_SIZES, **_LTX2_AUDIO, "audio_in_channels": "audio_in_channels", "rope_type": "rope_type",
            "rope_theta": "positional_embedding_theta", "timestep_scale_multiplier": "timestep_scale_multiplier",
            "cross_attn_timestep_scale_multiplier": "av_ca_timestep_scale_multiplier",
        },
        header_fixed={
            "causal_temporal_positioning": True, "use_middle_indices_grid": True, "frequencies_precision": "float64",
        },
        lora_programs="This is for ComfyUI, which takes it as it is",
        ruined_by="ModelSamplingSD3",
        takes_frame_rate=True,
        picture_node="LTXVImgToVideo with `strength` 1, which gives the latent of the pictures",
        sound_nodes="LTXVEmptyLatentAudio makes the sound's latent, LTXVConcatAVLatent joins it to the pictures' "
        "before SamplerCustom, LTXVSeparateAVLatent takes them apart behind it, and LTXVAudioVAEDecode plays the sound",
    ),
    "HunyuanVideoTransformer3DModel": ComfyModel(
        "HunyuanVideo",
        fixed={
            "num_attention_heads": (24,), "attention_head_dim": (128,), "mlp_ratio": (4.0,), "text_embed_dim": (4096,),
            "pooled_projection_dim": (768,), "patch_size": (2,), "patch_size_t": (1,), "qk_norm": ("rms_norm",),
            "rope_axes_dim": ((16, 56, 56),), "rope_theta": (256.0,), "out_channels": (16,),
        },
        lora_refused="diffusers' converter cannot read the token refiner's, whose three matrices were published as one",
        guidance_node="FluxGuidance",
    ),
}  # fmt: skip


TAKEN_AS_THEY_ARE = ("FluxTransformer2DModel", "SD3Transformer2DModel", "QwenImageTransformer2DModel")
"""Denoisers that ComfyUI takes under diffusers' names: `convert_diffusers_mmdit` in comfy/model_detection.py, and
`model_lora_keys_unet` in comfy/lora.py; Qwen-Image's names are its own. LoRAs of all three ran in ComfyUI 0.10.0."""


def refusal(config: Mapping[str, Any], *, is_lora: bool) -> str:
    """Why ComfyUI cannot take a student whose denoiser has this configuration of diffusers; or nothing."""
    kind = str(config.get("_class_name"))
    if kind in TAKEN_AS_THEY_ARE:
        return f"ComfyUI takes a {kind} under diffusers' names, so it has no file of its own"
    if (model := MODELS.get(kind)) is None:
        return f"no names are known here for the weights of a {kind} but diffusers'"
    return model.refusal(config, is_lora=is_lora)


def denoiser_config(exported: ExportedStudent) -> dict[str, Any]:
    """Of diffusers' denoiser."""
    return dict(read_json(exported.base / DENOISER / "config.json"))


def only_diffusers(exported: ExportedStudent) -> str:
    """The programs that take weights under diffusers' names, as they were run."""
    config = denoiser_config(exported)
    if (kind := config["_class_name"]) in TAKEN_AS_THEY_ARE:
        if exported.is_lora:
            others = " LightX2V, DiffSynth-Studio and musubi-tuner apply nothing of it." if "Qwen" in kind else ""
            return f"This is for diffusers and ComfyUI, whose LoraLoaderModelOnly takes it as it is.{others}"
        return "This is for diffusers and ComfyUI; weights in several files have to be joined for ComfyUI."
    if exported.is_lora:
        others = "ComfyUI, LightX2V, DiffSynth-Studio and musubi-tuner would apply nothing of a LoRA under them, "
        others += "DiffSynth-Studio without a word"
    else:
        others = "ComfyUI cannot tell what model it is (`Could not detect model type`)"
    offer = "" if refusal(config, is_lora=exported.is_lora) else "; take `--format comfyui` there"
    return f"This is for diffusers alone, whose names its weights have. {others}{offer}."


def _differing(config: Mapping[str, Any], wanted: Mapping[str, tuple[Any, ...]]) -> list[str]:
    """Each key whose value is none of those wanted, with both; what the configuration does not state is right."""
    return [
        f"{key} {_plain(config[key])} (not {' or '.join(str(_plain(value)) for value in values)})"
        for key, values in wanted.items()
        if key in config and _plain(config[key]) not in map(_plain, values)
    ]


def _plain(value: Any) -> Any:
    """A value as JSON has it."""
    return list(value) if isinstance(value, tuple) else value
