"""The base of every family: loading a pipeline folder, roles on one base, cached text, noise, pixels."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import torch
from torch import Generator, Tensor, nn

from rats_video.backbones.compute import DecodeConfig, LoraConfig
from rats_video.backbones.family import DENOISER, Family
from rats_video.backbones.folder import load_parts, read_configs, read_index
from rats_video.backbones.lora import LORA_FILE, Adapters, has_adapter, read_adapter
from rats_video.backbones.sizes import divide_clip
from rats_video.backbones.small_decoder import SmallDecoder
from rats_video.backbones.text_cache import TextCache
from rats_video.backbones.words import known_words, truncation_note, unknown_words
from rats_video.condition import Condition, GivenFrames
from rats_video.diffusion.schedule import sigma_grid
from rats_video.errors import UserError
from rats_video.types import ClipSpec, FirstFrames

TEXT_ENCODERS = ("text_encoder", "connectors")  # what the names of their parts begin with


class PipelineBackbone(Family):
    """A diffusers pipeline's models behind the `Backbone` protocol; a family is a subclass in a file of its own.

    An instance is the base model or one *role* on it: `with_own_denoiser()` has weights of its own,
    `with_adapter(name)` shares them and differs by a LoRA adapter that each of its calls switches on.

    Args:
        parts: the pipeline's components by the names of its folders, their weights frozen but for the denoiser's; and
            the `settings` of its `model_index.json`.
    """

    def __init__(self, **parts: Any) -> None:
        self.parts = parts
        self.vae: Any = parts["vae"]
        for name in set(parts) - set(self.denoiser_parts):
            if isinstance(parts[name], nn.Module):
                parts[name].requires_grad_(requires_grad=False).eval()
        self.adapters: Adapters | None = None
        self.role: str | None = None
        self.decoding = DecodeConfig()
        self.embedded_guidance = 6.0  # for models that were distilled to take their guidance scale as an input
        self.fps = 25.0  # of the clips asked for, for models that are told it
        self.in_tiles = False  # decoding by the VAE's own tiles, for clips that are only looked at
        self.small_decoder: SmallDecoder | None = None
        self.first_frames: FirstFrames | None = None
        self.text_cache: TextCache | None = None
        self.autocast: torch.dtype | None = None

    # ------------------------------------------------------------------------------------------------------ loading

    @classmethod
    def from_pretrained(
        cls,
        folder: Path,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        *,
        with_text: bool = True,
        with_denoiser: bool = True,
        quantization: str = "none",
    ) -> Self:
        """Load a pipeline folder, its VAE in float32; without its denoiser it has the shapes, on `meta`.

        With `quantization`, `int8` or `nf4`, the matrices of the denoiser's blocks are in few bits (`low_bit.py`).

        Raises:
            UserError: a component is missing, is not of this family, or its weights do not fit.
        """
        index = read_index(folder)
        if not cls.knows(index):
            fix = f"give one of: {', '.join(cls.pipelines)}"
            raise UserError(f"is a {index['_class_name']}", where=str(folder), fix=fix)
        cls.check(index, configs := read_configs(folder, cls.family), str(folder))
        classes = {
            name: kind
            for name, kind in cls.classes_in(index).items()
            if (with_text or not name.startswith(TEXT_ENCODERS))
            and (name not in cls.optional_parts or cls.has_part(name, index, configs))
        }
        shapes = set() if with_denoiser else {DENOISER, *cls.optional_parts} & classes.keys()
        fix = f"give a folder that diffusers.{cls.pipelines[0]} loads"
        bits = dict.fromkeys(cls.denoiser_parts, quantization)
        loaded = load_parts(folder, classes, device, dtype, family=cls.family, fix=fix, shapes=shapes, bits=bits)
        return cls(**loaded, **{name: index[name] for name in cls.settings if name in index}, **cls.options)

    def load_denoiser(self, folder: Path) -> Self:
        """The same model with the denoiser of another folder, e.g. a student's; raises UserError if it does not fit."""
        classes = {name: kind for name, kind in self.component_classes().items() if name in self.denoiser_parts}
        fix = "give the folder of a student"
        return self._with_denoisers(load_parts(folder, classes, self.device, self.dtype, family=self.family, fix=fix))

    # -------------------------------------------------------------------------------------------------------- roles

    @property
    def denoisers(self) -> dict[str, Any]:
        """The denoising parts by name."""
        return {name: self.parts[name] for name in self.denoiser_parts}

    @property
    def denoiser(self) -> nn.Module:
        """The network, or the experts as one module, whose calls are counted as NFE."""
        networks: dict[str, nn.Module] = self.denoisers
        return next(iter(networks.values())) if len(networks) == 1 else nn.ModuleDict(networks)

    @property
    def weights(self) -> dict[str, nn.Parameter]:
        """This role's own weights: its adapter's, or all of the denoiser's."""
        if self.adapters is not None and self.role is not None:
            return self.adapters.weights(self.role)
        return {name: weight for name, weight in self.denoiser.named_parameters() if ".lora_" not in name}

    @property
    def device(self) -> torch.device:
        """The device that computes: the VAE is always there, a denoiser's weights may wait elsewhere."""
        device: torch.device = next(self.vae.parameters()).device
        return device

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the denoiser's weights, but for the few that a family keeps in float32."""
        dtype: torch.dtype = next(iter(self.denoisers.values())).dtype
        return dtype

    @property
    def decoder(self) -> nn.Module:
        """The network that turns latents into pixels: the small decoder, where there is one, or the VAE."""
        return self.parts["vae"] if self.small_decoder is None else self.small_decoder

    def with_own_denoiser(self) -> Self:
        """The same model with its own copy of the denoiser; VAE and text encoder are shared.

        The copy's weights are float32, which training and averages need; it computes in the base's precision.
        """
        assert self.adapters is None, "the copy would carry the adapters along"
        other = self._with_denoisers({name: copy.deepcopy(net).float() for name, net in self.denoisers.items()})
        other.autocast = None if self.dtype == torch.float32 else self.dtype
        return other

    def _with_denoisers(self, networks: dict[str, Any]) -> Self:
        other = type(self)(**{**self.parts, **networks})
        for name in ("decoding", "embedded_guidance", "fps", "in_tiles", "small_decoder", "text_cache", "first_frames"):
            setattr(other, name, getattr(self, name))
        return other

    def with_adapter(self, name: str, cfg: LoraConfig) -> Self:
        """A role on the same denoiser: a new adapter of that name, which changes nothing until it is trained."""
        if self.adapters is None:
            self.adapters = Adapters(self.denoisers)
        self.adapters.add(name, cfg, self.lora_targets)
        role = copy.copy(self)
        role.role = name
        return role

    def save_role(self, folder: Path) -> None:
        """Write this role as diffusers does: a LoRA file for an adapter, otherwise a folder a denoising part."""
        if self.adapters is not None and self.role is not None:
            self.adapters.save(self.role, folder)
        else:
            for name, network in self.denoisers.items():
                network.save_pretrained(folder / name)

    def load_role(self, folder: Path, name: str = "student") -> Self:
        """A role that `save_role` wrote: an adapter on this denoiser, or a model with its own.

        Raises:
            UserError: it is not there, is damaged, or was trained on another base.
        """
        if not has_adapter(folder):
            return self.load_denoiser(folder)
        cfg, tensors = read_adapter(folder, self.denoiser_parts)
        role = self.with_adapter(name, cfg)
        assert role.adapters is not None
        role.adapters.load(name, tensors, where=folder / LORA_FILE)
        return role

    # ---------------------------------------------------------------------------------------------- latents and text

    @property
    def latent_channels(self) -> int:
        """C of the latents; a picture's channels come beside them."""
        return int(self.parts[DENOISER].config["out_channels" if self.needs_picture else "in_channels"])

    @property
    def temporal_stride(self) -> int:
        """Pixel frames a latent frame, but for the first, which holds one."""
        return int(self.vae.temporal_compression_ratio)

    @property
    def spatial_stride(self) -> int:
        """Pixels a latent row or column."""
        return int(self.vae.spatial_compression_ratio)

    def latent_shape(self, clip: ClipSpec) -> tuple[int, int, int, int]:
        """`(C, F, H, W)` of a clip's latents.

        Raises:
            UserError: the VAE or the transformer's patches cannot divide the clip.
        """
        return self.latent_channels, *divide_clip(clip, self.temporal_stride, self.spatial_stride, self.patch_size)

    def sample_noise(self, batch: int, clip: ClipSpec, generator: Generator) -> Tensor:
        """Standard normal `[B, C, F, H, W]`; drawn where the generator lives, so a CPU one is the same everywhere."""
        return torch.randn(batch, *self.latent_shape(clip), generator=generator, device=generator.device).to(
            self.device
        )

    def sigmas(self, num_steps: int, shift: float) -> Tensor:
        """`[num_steps + 1]` noise levels, 1 ... 0."""
        return sigma_grid(num_steps, shift)

    def nearest_levels(self, sigma: Tensor) -> Tensor:
        """The noise levels `[B]` nearest to these that the model can be called at: for most families themselves."""
        return sigma

    def given_frames(self, clip: ClipSpec, first: Tensor, last: Tensor | None = None) -> GivenFrames:  # noqa: ARG002
        """Turn first frames `[B, 3, height, width]` in [0, 1] of clips into what the model is told of them.

        Raises:
            UserError: the model makes videos from text alone, or takes no last frame.
        """
        fix = "leave the picture out, or use an image-to-video model"
        raise UserError(f"{self.family} makes {self.makes}s from text alone", where="image", fix=fix)

    def unknown_words(self, prompt: str) -> list[str]:
        """Words of the prompt that a tokenizer of whole words does not know; a subword one spells them (`misread`)."""
        return unknown_words(self.parts[self.main_tokenizer], prompt)

    def known_words(self) -> list[str]:
        """All words that a tokenizer of whole words knows."""
        return known_words(self.parts[self.main_tokenizer])

    def truncation_note(self, prompt: str) -> str:
        """The part of a prompt that the text encoder never sees, as a clause for a message; or nothing."""
        return truncation_note(self.parts[self.main_tokenizer], prompt, self.text_limit)

    @torch.no_grad()
    def encode_text(self, prompts: Sequence[str]) -> Condition:
        """Encode B prompts, or look them up where `cache_text` has encoded them."""
        return self._encode(prompts) if self.text_cache is None else self.text_cache.look_up(prompts, self.device)

    def cache_text(self, cache: TextCache) -> None:
        """Look prompts up from now on, and free the text encoders; call it before any role is made."""
        self.text_cache = cache
        self.parts = {name: part for name, part in self.parts.items() if not name.startswith(TEXT_ENCODERS)}

    # ------------------------------------------------------------------------------------------------------- calls

    def velocity(self, latents: Tensor, sigma: Tensor, condition: Condition, **changed: Any) -> Tensor:
        """`noise - x0`, `[B, C, F, H, W]`, in the dtype of `latents`, at noise levels `sigma` `[B]`; 0 in given frames.

        Wan takes `[B, F]` too, 0 where a frame is given; `changed` are for guidance that calls the network otherwise.
        """
        if self.adapters is not None:
            self.adapters.use(self.role)
        latents = condition.hold(latents)
        if self.autocast is None:
            return condition.at_rest(self._velocity(latents, sigma, condition, **changed))
        with torch.autocast(self.device.type, self.autocast):
            return condition.at_rest(self._velocity(latents, sigma, condition, **changed))

    @torch.no_grad()
    def encode(self, videos: Tensor) -> Tensor:
        """Latents `[B, C, F, H, W]` of pixels `[B, T, 3, height, width]` in [0, 1]: normalised posterior mean, float32.

        Raises:
            UserError: the VAE or the transformer's patches cannot divide the clips.
        """
        _, frames, _, height, width = videos.shape
        self.latent_shape(ClipSpec(frames, height, width, self.fps))
        pixels = videos.to(self.device, next(self.vae.parameters()).dtype).transpose(1, 2) * 2 - 1
        return self._from_vae(self._posterior_mean(pixels).float())

    def use_tiles(self) -> None:
        """Decode in tiles from now on, as diffusers does: less memory, blended seams, no gradient."""
        self.vae.enable_tiling()
        self.in_tiles = True

    def decode(self, latents: Tensor, grad_frames: range | None = None) -> Tensor:
        """Pixels `[B, T, 3, height, width]` in [0, 1], differentiable.

        Saturated pixels are clamped straight-through: diffusers' own decode clamps hard, and a reward could then
        never pull a saturated pixel back. A small decoder, where there is one, stands in for the VAE. Whatever these
        compute in, pixels have the dtype of `latents`.
        """
        dtype = next(self.decoder.parameters()).dtype
        if self.small_decoder is None:
            decode = self._decode_tiles if self.in_tiles else self._decode
            decoded = decode(self._to_vae(latents).to(dtype), grad_frames)
        else:
            decoded = self.small_decoder(latents.to(dtype), self.decoding, grad_frames)
        pixels = (decoded.to(latents.dtype).transpose(1, 2) + 1) / 2
        return pixels + (pixels.clamp(0, 1) - pixels).detach()
