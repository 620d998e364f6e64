"""The base model, and the roles that are built on it: student, teacher, fake score."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import torch

from rats_video.assets import resolve_folder
from rats_video.backbones.apply_compute import apply_compute, use_decode_dtype
from rats_video.backbones.base import PipelineBackbone
from rats_video.backbones.compute import FullWeightsConfig, LoraConfig
from rats_video.backbones.kinds import find_family, load_backbone
from rats_video.backbones.low_bit_folder import refuse_low_bit
from rats_video.backbones.small_decoder import as_published, load_small_decoder
from rats_video.backbones.text_cache import TextCache
from rats_video.datasets.prompts.split import PromptSplit, check_prompt, load_prompts, prompt_files
from rats_video.diffusion.guidance import scale_of
from rats_video.distillation.checks import check_compute
from rats_video.distillation.compute import encode_prompts, move_to_device
from rats_video.distillation.folder_settings import warn_of_differences
from rats_video.distillation.initial_student import start_from
from rats_video.distillation.pictures import check_family, give_pictures
from rats_video.distillation.settings import DistillConfig
from rats_video.errors import UserError, warn
from rats_video.inference.style import add_style, base_styles
from rats_video.methods.teacher import EmaTeacherConfig
from rats_video.optim import ema_update_

NEGATIVE = "teacher.negative_prompt"


def build_backbone(cfg: DistillConfig, device: torch.device, *, text: TextCache | None = None) -> PipelineBackbone:
    """The base model, checked against the clip size and the way it is to be decoded.

    Warns where the run differs from what the folder states. If its prompts are encoded already, it comes without text
    encoder.
    """
    folder, dtype = resolve_folder(cfg.model, where="model"), getattr(torch, cfg.compute.dtype)
    check_compute(cfg, device)
    check_family(cfg, find_family(folder, cfg.backbone))
    styles = base_styles(cfg.base_loras, where="base_loras")
    first = device if cfg.compute.offload == "none" and not cfg.parallel.shard else "cpu"
    backbone = load_backbone(
        folder, first, dtype, cfg.backbone, with_text=text is None, quantization=cfg.compute.quantization
    )
    for style in styles:
        add_style(backbone, style, where="base_loras")
    prepare_base(cfg, backbone, device)
    give_pictures(cfg, backbone)
    warn_of_differences(cfg, backbone)
    move_to_device(cfg, backbone, device)
    if cfg.compute.cache_text:
        backbone.cache_text(text or encode_prompts(cfg, backbone))
    return backbone


def prepare_base(cfg: DistillConfig, backbone: PipelineBackbone, device: torch.device) -> None:
    """Give the base model the run's clip, guidance and decoding.

    Raises:
        UserError: it cannot make or decode such clips.
    """
    backbone.decoding, backbone.fps = cfg.compute.decode, cfg.clip.fps
    backbone.embedded_guidance = cfg.embedded_guidance
    backbone.small_decoder = None  # a plan prepares one base for many settings
    if cfg.compute.decode.small is not None:
        folder = Path(cfg.compute.decode.small)
        names = ("latent_channels", "spatial_stride", "temporal_stride")
        for_latents = {name: getattr(backbone, name) for name in names}
        is_plan = device.type == "meta" and not folder.exists()
        backbone.small_decoder = (
            as_published(**for_latents)
            if is_plan
            else load_small_decoder(folder, **for_latents, where="compute.decode.small")
        ).to(device)
    use_decode_dtype(backbone, getattr(torch, cfg.compute.decode.dtype))
    backbone.latent_shape(cfg.clip.spec)
    backbone.guidance(cfg.teacher.further_guidance)
    for section, options in (("teacher", cfg.teacher), ("evaluation", cfg.evaluation)):
        try:
            scale_of(backbone, options.guidance_scale, options.guidance_scale_2)
        except UserError as error:
            raise UserError(error.what, where=f"{section}.{error.where}", fix=error.fix) from error
    if backbone.small_decoder is not None or backbone.exact_window:
        return
    if cfg.compute.decode.offload:
        raise UserError(
            f"{backbone.family}'s VAE is not decoded frame by frame: nothing waits between frames",
            where="compute.decode.offload", fix="set it to false; compute.decode.checkpoint saves memory exactly",
        )  # fmt: skip
    if cfg.compute.decode.window is not None:
        raise UserError(
            f"each frame that {backbone.family}'s VAE decodes depends on later ones: a window would change them",
            where="compute.decode.window", fix="set it to null; compute.decode.checkpoint saves memory exactly",
        )  # fmt: skip


def checked_prompts(cfg: DistillConfig, backbone: PipelineBackbone) -> PromptSplit:
    """The run's prompts, each of them known to the model's text encoder; warns, once, of those it reads in part."""
    prompts = load_prompts(cfg.prompts)
    everything = (*prompts.train, *prompts.heldout)
    if backbone.unknown_words(" ".join(dict.fromkeys(" ".join(everything).split()))):  # once, before one by one
        for prompt in everything:
            check_prompt(prompt, backbone, where="prompts", files=prompt_files(cfg.prompts))
    if prompts.dropped:
        warn(f"{prompts.dropped} were there already and are left out", where="prompts")
    if negative := cfg.teacher.negative_prompt:
        check_prompt(negative, backbone, where=NEGATIVE)
        if note := backbone.truncation_note(negative):
            warn(f"is {note}", where=NEGATIVE)
        if cfg.teacher.calls_per_step == 1:
            warn("does nothing without guidance", where=NEGATIVE)
    misread = Counter(filter(None, map(backbone.truncation_note, everything)))
    for how, count in misread.items():
        warn(f"{count} of {len(everything)} are {how}", where="prompts")
    return prompts


def build_roles(cfg: DistillConfig, backbone: PipelineBackbone) -> tuple[PipelineBackbone, PipelineBackbone]:
    """Student and teacher: models of their own, or adapters on one denoiser; a frozen teacher is the base itself."""
    has_average = isinstance(cfg.teacher, EmaTeacherConfig)
    match cfg.student.weights:
        case FullWeightsConfig():
            refuse_low_bit(backbone.denoiser, where="student.weights.kind")
            student, teacher = backbone.with_own_denoiser(), backbone.with_own_denoiser() if has_average else backbone
            _initialise(cfg, student)
        case LoraConfig() as lora:
            student = _seeded_adapter(backbone, "student", lora, cfg.seed)
            _initialise(cfg, student)
            average = lora.model_copy(update={"dtype": "float32"})  # small steps vanish in bfloat16
            teacher = backbone.with_adapter("teacher", average) if has_average else backbone
    if has_average:  # the average starts where the student does
        ema_update_(teacher.weights, student.weights, decay=0.0)
    for weight in teacher.weights.values():
        weight.requires_grad = False
    apply_compute(cfg.compute, student, teacher)
    return student, teacher


def _initialise(cfg: DistillConfig, student: PipelineBackbone) -> None:
    if cfg.student.init is not None and student.device.type != "meta":  # a plan needs no weights
        start_from(cfg, cfg.student.init, student)


def build_fake_score(cfg: DistillConfig, student: PipelineBackbone, teacher: PipelineBackbone) -> PipelineBackbone:
    """A third role that trains, of the student's kind of weights, for methods that model what the student makes.

    It starts as the base model: a full one as a copy of the teacher, an adapter as one that changes nothing.
    """
    match cfg.student.weights:
        case FullWeightsConfig():
            fake = teacher.with_own_denoiser()
            apply_compute(cfg.compute, fake)
        case LoraConfig() as lora:
            fake = _seeded_adapter(student, "fake_score", lora, cfg.seed + 1)
    for weight in fake.weights.values():
        weight.requires_grad = True
    return fake


def _seeded_adapter(backbone: PipelineBackbone, name: str, lora: LoraConfig, seed: int) -> PipelineBackbone:
    """A role whose adapter starts from this seed: `with_adapter` draws A from torch's global generator."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return backbone.with_adapter(name, lora)
