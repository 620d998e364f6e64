"""The declaration of a family of models: names, sizes and what differs from one diffusers pipeline to the next."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal

from torch import Tensor

from rats_video.backbones.stock import StockCall
from rats_video.condition import Condition
from rats_video.config.guidance import AudioVideoGuidance
from rats_video.diffusion.guidance import plain_guidance
from rats_video.errors import UserError
from rats_video.sound import Sound
from rats_video.types import ClipSpec, FurtherGuidance, Guide

NUM_TRAIN_TIMESTEPS = 1000
DENOISER = "transformer"  # the name of the part, or of the first of several


class Family(ABC):
    """A family declares these in a file of its own, as a subclass of `PipelineBackbone`, which adds the rest."""

    family: ClassVar[str]
    """For messages: "Wan"."""
    pipelines: tuple[str, ...]
    """Diffusers' names of the pipelines of this family, first the one that exports are for."""
    denoiser_parts: tuple[str, ...] = (DENOISER,)
    """The parts that denoise; two for a model of two experts."""
    optional_parts: ClassVar[tuple[str, ...]] = ()
    """Parts that some folders of the family lack: `model_index.json` gives them as `[null, null]` or not at all."""
    settings: ClassVar[tuple[str, ...]] = ()
    """Plain values of `model_index.json` that the constructor gets beside the parts, where they are there."""
    options: ClassVar[Mapping[str, Any]] = {}
    """Further arguments of the constructor, for a family of the user's own."""
    lora_targets: tuple[str, ...]
    """Names of the linear layers that LoRA adapts unless the configuration names others."""
    main_tokenizer: ClassVar[str] = "tokenizer"
    """The part that reads the whole prompt, where there are several."""
    text_limit: int
    """Tokens of a prompt that the text encoder reads; the rest is cut off, as the family's pipeline does."""
    makes: ClassVar[Literal["video", "image"]] = "video"
    """The word for its clips in messages: an image is a clip of one frame."""
    has_sound: ClassVar[bool] = False
    """True if its clips have sound, whose latents come with the pictures'."""
    text_first: ClassVar[bool] = False
    """True if the denoiser's blocks give the text's features before the latents'."""
    exact_window: ClassVar[bool] = True
    """True if decoding a window of latent frames with gradient keeps all pixel values: no later frame counts."""
    has_small_decoder: ClassVar[bool] = True
    """False if no TAEHV is published for its latents (`small_decoder.py`)."""
    can_share_tokens: ClassVar[bool] = False
    """True if diffusers can spread the tokens of one clip over processes (`parallel.context`)."""
    depth_keys: ClassVar[tuple[str, ...]] = ("num_layers",)
    """Keys of the denoiser's configuration that say how often a block repeats."""
    original_names: ClassVar[tuple[tuple[str, str], ...]] = ()
    """Patterns and replacements, in turn, from diffusers' names of weights to those the model was published with.

    These are ComfyUI's names; a family without them has no `comfyui` export. Where one published matrix holds several
    of diffusers', each gets the same name with its place among them: `qkv[0].weight`, `qkv[1].weight`.
    """
    needs_picture: ClassVar[bool] = False
    """True if its videos start from a picture, always."""
    takes_last_picture: ClassVar[bool] = False
    """True if a video that starts from a picture may also end at one."""
    needs_last_picture: bool = False
    """True if every video ends at a picture as well."""
    swapped_halves: ClassVar[tuple[str, ...]] = ()
    """Layers, by diffusers' name, whose upper and lower half of rows were published the other way round."""
    lora_alpha_tensors: ClassVar[bool] = True
    """False if diffusers reads no alpha beside a LoRA under the original names."""

    @classmethod
    def knows(cls, index: Mapping[str, Any]) -> bool:
        """True if this family loads the folder of this `model_index.json`.

        Its pipeline is the family's own, or another one of the same networks: what makes a video from an image, say.
        """
        if index["_class_name"] in cls.pipelines:
            return True
        networks = {name: kind for name, kind in cls.classes_in(index).items() if hasattr(kind, "forward")}
        return all(
            index.get(name, [None, None])[1] == kind.__name__
            for name, kind in networks.items()
            if name not in cls.optional_parts
        )

    @classmethod
    def native_clip(cls, index: Mapping[str, Any], configs: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:  # noqa: ARG003
        """The clip sizes and rate of the model's training that neither its folder nor its pipeline's defaults give."""
        return {"fps": 24.0}

    @classmethod
    def further_guidance(cls, configs: Mapping[str, Mapping[str, Any]]) -> AudioVideoGuidance | None:  # noqa: ARG003
        """The pipeline's default guidance beside the scale of the text; None where there is none."""
        return None

    @staticmethod
    def has_part(name: str, index: Mapping[str, Any], configs: Mapping[str, Mapping[str, Any]]) -> bool:
        """True if `model_index.json` names the optional part, or says nothing of it and it is there."""
        return index[name] not in (None, [None, None]) if name in index else name in configs

    @classmethod
    def check(cls, index: Mapping[str, Any], configs: Mapping[str, Mapping[str, Any]], where: str) -> None:  # noqa: ARG003
        """Refuse, by its small files, what the family cannot load: weights of 100 GB need not be read for that.

        Args:
            index: `model_index.json`.
            configs: of each part.
            where: the folder, for messages.

        Raises:
            UserError: the denoiser takes more than noise and text, or no picture where the family needs one.
        """
        denoiser = configs.get(DENOISER, {})
        taken, made = denoiser.get("in_channels"), denoiser.get("out_channels")
        if taken is None or made is None:
            return
        takes = f"its transformer takes {taken} channels and makes {made}"
        if cls.needs_picture and taken <= made:
            fix = "give an image-to-video model"
            raise UserError(f"{takes}: it has none for a picture", where=where, fix=fix)
        if not cls.needs_picture and taken != made:
            fix = f"give a text-to-{cls.makes} model"
            raise UserError(f"{takes}: it needs an image or a video to start from", where=where, fix=fix)

    @classmethod
    @abstractmethod
    def component_classes(cls) -> dict[str, Any]:
        """The class of each part, each with `from_pretrained`; imported inside, they are heavy."""

    @classmethod
    def classes_in(cls, index: Mapping[str, Any]) -> dict[str, Any]:  # noqa: ARG003
        """`component_classes` of the folder of this `model_index.json`, where its versions differ in them."""
        return cls.component_classes()

    @property
    def pictures(self) -> Literal["none", "optional", "needed"]:
        """If its videos start from a picture."""
        return "needed" if self.needs_picture else "none"

    @property
    @abstractmethod
    def patch_size(self) -> tuple[int, int, int]:
        """Latent frames, rows and columns a token."""

    def guidance_by_level(self, scale: float, scale_2: float) -> Callable[[Tensor], Tensor]:  # noqa: ARG002
        """Guidance scales `[B]` of noise levels `[B]`, for a model of two experts.

        Raises:
            UserError: it is none.
        """
        raise UserError(f"this {self.family} has no second expert", where="guidance_scale_2", fix="leave it out")

    @abstractmethod
    def _encode(self, prompts: Sequence[str]) -> Condition:
        """Encode B prompts as the family's pipeline does."""

    @abstractmethod
    def _velocity(self, latents: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
        """One call of the denoiser, as the family's pipeline makes it, turned into `noise - x0`."""

    @abstractmethod
    def _to_vae(self, latents: Tensor) -> Tensor:
        """Latents as the VAE wants them: the denoiser's normalisation undone."""

    @abstractmethod
    def _from_vae(self, latents: Tensor) -> Tensor:
        """The inverse of `_to_vae`."""

    def _posterior_mean(self, pixels: Tensor) -> Tensor:
        """The VAE's own latents of pixels `[B, 3, T, height, width]` in [-1, 1]."""
        mean: Tensor = self.vae.encode(pixels).latent_dist.mode()  # type: ignore[attr-defined]  # the subclass's
        return mean

    @abstractmethod
    def _decode(self, latents: Tensor, grad_frames: range | None) -> Tensor:
        """Pixels `[B, 3, T, height, width]`, about [-1, 1] and not clamped, of the VAE's own latents."""

    def guide(self, cond: Tensor, uncond: Tensor, scale: float | Tensor) -> Tensor:
        """The guided velocity of two, `[B, C, F, H, W]` each: with the prompt and with the negative one."""
        return plain_guidance(cond, uncond, scale)

    def guidance(self, further: FurtherGuidance | None = None) -> Guide:
        """The guidance of the family: `guide`, and beyond the text `further`.

        Raises:
            UserError: it knows no such further guidance.
        """
        if further is not None:
            what = f"{self.family} is guided by the text alone"
            raise UserError(what, where="teacher.further_guidance", fix="set it to null")
        return Guide.of(self.guide)

    def split(self, latents: Tensor) -> Mapping[str, Tensor]:
        """The named parts of latents, `[B, C, F, H, W]` each: `video`, and `audio` for clips with sound."""
        return {"video": latents}

    def decode_sound(self, latents: Tensor) -> Sound | None:  # noqa: ARG002
        """The sound of clips, differentiable; None of a family whose clips have none."""
        return None

    def _decode_tiles(self, latents: Tensor, grad_frames: range | None) -> Tensor:  # noqa: ARG002  # no gradient
        """As `_decode`, by the VAE's own tiles."""
        pixels: Tensor = self.vae.decode(latents, return_dict=False)[0]  # type: ignore[attr-defined]  # the subclass's
        return pixels

    def stated(self, scheduler: Mapping[str, Any], clip: ClipSpec) -> dict[str, float]:  # noqa: ARG002
        """The settings that a pipeline's own files give, by the run's keys: `shift`, and sizes where only one will do.

        Args:
            scheduler: the pipeline's `scheduler_config.json`.
            clip: for schedulers whose shift depends on its size.
        """
        shift = scheduler.get("flow_shift", scheduler.get("shift"))
        is_number = isinstance(shift, int | float) and shift > 0
        return {"shift": shift} if is_number and not scheduler.get("use_dynamic_shifting") else {}

    def stock_call(self, num_steps: int, shift: float) -> StockCall:
        """The family's stock pipeline, told to make our steps; an export compares its clips with ours.

        By default the pipeline passes the scheduler sigmas 1 ... 1/N, which are shifted once.
        """
        from diffusers import FlowMatchEulerDiscreteScheduler

        return StockCall(
            FlowMatchEulerDiscreteScheduler(shift=shift), {"num_inference_steps": num_steps, "guidance_scale": 1.0}
        )

    @property
    def picture_pipeline(self) -> str:
        """Diffusers' name of the pipeline that makes a video from a picture."""
        return self.pipelines[0]

    def picture_call(self, stock: StockCall) -> StockCall:
        """The same call of `picture_pipeline`."""
        return stock

    def stock_prompt(self, prompt: str) -> str:
        """The part of a prompt that the stock pipeline understands: for most families all of it."""
        return prompt


def need_picture(condition: Condition) -> Tensor:
    """The further channels of a picture; raises UserError where none is given."""
    if condition.given is None or condition.given.channels is None:
        raise UserError("makes a video from a picture, and none is given", where="model", fix="give one a prompt")
    return condition.given.channels


def refuse_last(last: Tensor | None, model: str) -> None:
    """Refuse a picture that a video would end at; raises UserError."""
    if last is not None:
        raise UserError(f"{model} takes a first frame alone", where="last_image", fix="leave it out")


def dynamic_shift(scheduler: Mapping[str, Any], tokens: int) -> dict[str, float]:
    """`exp(mu)`, mu running from `base_shift` at `base_image_seq_len` tokens to `max_shift` at `max_image_seq_len`."""
    first, last = scheduler["base_image_seq_len"], scheduler["max_image_seq_len"]
    share = (tokens - first) / (last - first)
    return {"shift": math.exp(scheduler["base_shift"] + share * (scheduler["max_shift"] - scheduler["base_shift"]))}


def token_timesteps(levels: Tensor, tokens: int) -> Tensor:
    """Timesteps of noise levels: `[B]` of `[B]`, and of `[B, F]` one a token, `tokens` of which a latent frame has."""
    timesteps = levels * NUM_TRAIN_TIMESTEPS
    return timesteps if levels.ndim == 1 else timesteps.repeat_interleave(tokens, dim=1)
