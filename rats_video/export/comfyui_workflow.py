"""A ready workflow for an export, with the files that it names beside the export's own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rats_video.export.base import ExportedStudent
from rats_video.export.comfyui_card import high_noise_calls, sampler_name
from rats_video.export.comfyui_graph import Graph, Output
from rats_video.export.pictures import EXAMPLE, LAST_EXAMPLE
from rats_video.export.usage import sigma_string

API = "workflow_api.json"
TI2V_LATENT = "Wan22ImageToVideoLatent"
# The names under which Comfy-Org publishes the bases, by the name of diffusers' folder; high noise before low.
BASES: Mapping[str, tuple[str, ...]] = {
    "Wan2.1-T2V-1.3B-Diffusers": ("wan2.1_t2v_1.3B_fp16.safetensors",),
    "Wan2.1-T2V-14B-Diffusers": ("wan2.1_t2v_14B_fp16.safetensors",),
    "Wan2.1-I2V-14B-480P-Diffusers": ("wan2.1_i2v_480p_14B_fp16.safetensors",),
    "Wan2.2-I2V-A14B-Diffusers": (
        "wan2.2_i2v_high_noise_14B_fp16.safetensors", "wan2.2_i2v_low_noise_14B_fp16.safetensors",
    ),
    "Wan2.2-TI2V-5B-Diffusers": ("wan2.2_ti2v_5B_fp16.safetensors",),
    "HunyuanVideo": ("hunyuan_video_t2v_720p_bf16.safetensors",),
    "Wan2.2-T2V-A14B-Diffusers": (
        "wan2.2_t2v_high_noise_14B_fp16.safetensors", "wan2.2_t2v_low_noise_14B_fp16.safetensors",
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Needs:
    """The files that a workflow takes beside the export's, by folder below `models`.

    Args:
        text_encoder: in `text_encoders`.
        text_type: as CLIPLoader calls it.
        vae: in `vae`; or in `checkpoints`, where one holds it.
        source: repositories on the hub that have them.
        latent: the node that makes an empty clip.
        vae_of_checkpoint: whether the VAE, and the base of a LoRA, come from a checkpoint.
        clip_vision: in `clip_vision`, for a model that attends to what it sees of the picture; or nothing.
        text_encoder_2: in `text_encoders`, for a model with two; or nothing.
        guidance: the scale that the network is told; None for one that takes none.
    """

    text_encoder: str
    text_type: str
    vae: str
    latent: str
    source: str
    vae_of_checkpoint: bool = False
    clip_vision: str = ""
    text_encoder_2: str = ""
    guidance: float | None = None

    def files(self, bases: Sequence[str]) -> list[str]:
        """Their places in ComfyUI's folder, those of a LoRA's base too."""
        vae = f"models/{'checkpoints' if self.vae_of_checkpoint else 'vae'}/{self.vae}"
        diffusion = [] if self.vae_of_checkpoint else [f"models/diffusion_models/{name}" for name in bases]
        seen = [f"models/clip_vision/{self.clip_vision}"] if self.clip_vision else []
        texts = [f"models/text_encoders/{name}" for name in (self.text_encoder, self.text_encoder_2) if name]
        return [*texts, vae, *seen, *diffusion]


_UMT5 = ("umt5_xxl_fp8_e4m3fn_scaled.safetensors", "wan")
NEEDS: Mapping[tuple[str, int], Needs] = {
    ("WanTransformer3DModel", 16): Needs(
        *_UMT5, "wan_2.1_vae.safetensors", "EmptyHunyuanLatentVideo", "Comfy-Org/Wan_2.1_ComfyUI_repackaged and "
        "Comfy-Org/Wan_2.2_ComfyUI_Repackaged",
    ),
    ("WanTransformer3DModel", 48): Needs(
        *_UMT5, "wan2.2_vae.safetensors", "Wan22ImageToVideoLatent", "Comfy-Org/Wan_2.2_ComfyUI_Repackaged"
    ),
    ("HunyuanVideoTransformer3DModel", 16): Needs(
        "llava_llama3_fp8_scaled.safetensors", "hunyuan_video", "hunyuan_video_vae_bf16.safetensors",
        "EmptyHunyuanLatentVideo", "Comfy-Org/HunyuanVideo_repackaged", text_encoder_2="clip_l.safetensors",
    ),
    ("LTXVideoTransformer3DModel", 128): Needs(
        "t5xxl_fp16.safetensors", "ltxv", "ltx-video-2b-v0.9.safetensors", "EmptyLTXVLatentVideo",
        "comfyanonymous/flux_text_encoders and Lightricks/LTX-Video", vae_of_checkpoint=True,
    ),
}  # fmt: skip
"""By the denoiser's class and its latent channels: models of other widths have no VAE in ComfyUI."""


def needs_of(exported: ExportedStudent, config: Mapping[str, Any]) -> Needs | None:
    """The files of a denoiser of that configuration of diffusers; None where ComfyUI has no VAE for it."""
    needs = NEEDS.get((config["_class_name"], config["out_channels"]))
    if needs is not None and exported.pipeline == "LTXConditionPipeline":
        return replace(needs, vae="ltx-video-2b-v0.9.5.safetensors")
    if needs is not None and config.get("image_dim"):
        return replace(needs, clip_vision="clip_vision_h.safetensors")
    if needs is not None and config.get("guidance_embeds"):
        return replace(needs, guidance=exported.card.embedded_guidance)
    return needs


def workflow_steps(exported: ExportedStudent) -> int:
    """The number of calls of the workflow."""
    return 4 if 4 in exported.sigmas else max(exported.sigmas)


def page_file(exported: ExportedStudent) -> str:
    """The workflow's place in ComfyUI's folder, where its page lists it."""
    return f"user/default/workflows/{exported.file_stem}.json"


def workflow_section(exported: ExportedStudent, needs: Needs) -> str:
    """What to do with the workflow, for the card."""
    others = needs.files(base_files(exported) if exported.is_lora else ())
    pictures = "" if exported.pictures is None else ", `input`"
    return (
        f"Copy `models`{pictures} and `user` over ComfyUI's folder. Its list of workflows then has "
        f"`{exported.file_stem}`, which makes a clip in {workflow_steps(exported)} calls; `{API}` is the same "
        f"for its server. It also takes {', '.join(f'`{file}`' for file in others)}, of {needs.source} on "
        "the hub; choose other ones in their nodes."
    )


def workflow(exported: ExportedStudent, needs: Needs, files: Sequence[str], steps: int) -> Graph:
    """The export's clip in that many calls: loaders, prompt, sampler or two, decoder, video."""
    graph = Graph()
    vae, models = _loaders(graph, exported, needs, files)
    clip = _text_encoder(graph, needs)
    (positive,) = graph.add("CLIPTextEncode", clip=clip, text=exported.prompts[0])
    (negative,) = graph.add("CLIPTextEncode", clip=clip, text="")
    if needs.guidance is not None:
        (positive,) = graph.add("FluxGuidance", conditioning=positive, guidance=needs.guidance)
    rate = exported.card.clip["fps"]
    latent: Output | None = None
    if exported.pictures is not None:
        positive, negative, latent = _pictured(graph, exported, needs, vae, positive, negative)
    if needs.text_type == "ltxv":
        positive, negative = graph.add("LTXVConditioning", positive=positive, negative=negative, frame_rate=rate)
    if latent is None:
        of_vae = {"vae": vae} if needs.latent == TI2V_LATENT else {}
        (latent,) = graph.add(needs.latent, **of_vae, **_sizes(exported))
    (sampler,) = graph.add("KSamplerSelect", sampler_name=sampler_name(exported))
    (line,) = graph.add("ManualSigmas", sigmas=sigma_string(exported.sigmas[steps]))
    first = high_noise_calls(exported, steps)
    lines = (line,) if first == steps else graph.add("SplitSigmas", sigmas=line, step=first)
    for model, sigmas in zip(models, lines, strict=False):
        again = 0 if sigmas == lines[0] or sampler_name(exported) == "euler" else 1  # the second draws noise of its own
        latent, _ = graph.add(
            "SamplerCustom", model=model, positive=positive, negative=negative, sampler=sampler, sigmas=sigmas,
            latent_image=latent, add_noise=sigmas == lines[0], noise_seed=again, cfg=1.0,
        )  # fmt: skip
    (images,) = graph.add("VAEDecode", samples=latent, vae=vae)
    (video,) = graph.add("CreateVideo", images=images, fps=rate)
    graph.add("SaveVideo", video=video, filename_prefix=f"video/{exported.file_stem}", format="auto", codec="auto")
    return graph


def _text_encoder(graph: Graph, needs: Needs) -> Output:
    kind: dict[str, Any] = {"type": needs.text_type, "device": "default"}
    if needs.text_encoder_2:
        names = {"clip_name1": needs.text_encoder_2, "clip_name2": needs.text_encoder}
        return graph.add("DualCLIPLoader", **names, **kind)[0]
    return graph.add("CLIPLoader", clip_name=needs.text_encoder, **kind)[0]


def _sizes(exported: ExportedStudent) -> dict[str, int]:
    size = exported.size
    return {"width": size["width"], "height": size["height"], "length": size["num_frames"], "batch_size": 1}


def _pictured(
    graph: Graph, exported: ExportedStudent, needs: Needs, vae: Output, positive: Output, negative: Output
) -> tuple[Output, Output, Output]:
    """The prompts and the latent of a clip that starts from the picture in ComfyUI's folder, fitted as in training."""
    sizes, has_last = _sizes(exported), exported.pictures is not None and exported.pictures.last is not None
    pictures: list[Output] = []
    for name in (EXAMPLE, LAST_EXAMPLE)[: 1 + has_last]:
        loaded, _ = graph.add("LoadImage", image=f"{exported.file_stem}-{name}")
        pictures += graph.add(
            "ImageScale", image=loaded, upscale_method="bicubic", width=sizes["width"], height=sizes["height"],
            crop="center",
        )  # fmt: skip
    if needs.latent == TI2V_LATENT:
        (latent,) = graph.add(TI2V_LATENT, vae=vae, start_image=pictures[0], **sizes)
        return positive, negative, latent
    prompts = {"positive": positive, "negative": negative, "vae": vae}
    if needs.text_type == "ltxv":
        made = graph.add("LTXVImgToVideo", **prompts, image=pictures[0], **sizes, strength=1.0)
        return made[0], made[1], made[2]
    seen: list[Output] = []
    if needs.clip_vision:
        (vision,) = graph.add("CLIPVisionLoader", clip_name=needs.clip_vision)
        for picture in pictures:
            seen += graph.add("CLIPVisionEncode", clip_vision=vision, image=picture, crop="center")
    ends = dict(zip(("start_image", "end_image"), pictures, strict=False))
    if has_last:
        ends |= dict(zip(("clip_vision_start_image", "clip_vision_end_image"), seen, strict=False))
    elif seen:
        ends |= {"clip_vision_output": seen[0]}
    node = "WanFirstLastFrameToVideo" if has_last else "WanImageToVideo"
    made = graph.add(node, **prompts, **ends, **sizes)
    return made[0], made[1], made[2]


def base_files(exported: ExportedStudent) -> tuple[str, ...]:
    """The base's own files in ComfyUI, one an expert; a guess from its name where it is not a published one."""
    name = exported.base_id.rpartition("/")[2]
    noises = ("_high_noise", "_low_noise") if exported.boundary is not None else ("",)
    return BASES.get(name, tuple(f"{name}{noise}.safetensors" for noise in noises))


def _loaders(
    graph: Graph, exported: ExportedStudent, needs: Needs, files: Sequence[str]
) -> tuple[Output, list[Output]]:
    """The VAE, and a model an expert."""
    base: Output | None = None
    if needs.vae_of_checkpoint:
        base, _, vae = graph.add("CheckpointLoaderSimple", ckpt_name=needs.vae)
    else:
        (vae,) = graph.add("VAELoader", vae_name=needs.vae)
    models = []
    for file, of_base in zip(files, base_files(exported), strict=True):
        name = of_base if exported.is_lora else file
        (model,) = (
            (base,) if exported.is_lora and base else graph.add("UNETLoader", unet_name=name, weight_dtype="default")
        )
        if exported.is_lora:
            (model,) = graph.add("LoraLoaderModelOnly", model=model, lora_name=file, strength_model=1.0)
        models.append(model)
    return vae, models
