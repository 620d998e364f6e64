"""Wan 2.1 and 2.2 A14B image-to-video, from any folder that `diffusers.WanImageToVideoPipeline` loads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from rats_video.backbones.experts import HIGH_NOISE, LOW_NOISE
from rats_video.backbones.family import need_picture
from rats_video.backbones.wan import TEXT_LENGTH, WanBackbone
from rats_video.condition import Condition, GivenFrames
from rats_video.errors import UserError
from rats_video.types import ClipSpec

IMAGE_ENCODER, IMAGE_PROCESSOR = "image_encoder", "image_processor"
GRAY = 0.5  # of the frames that are not given, as the VAE sees them: 0 in its own range of -1 ... 1


class WanImageBackbone(WanBackbone):
    """As Wan, with a given first frame, or the first and the last, in further channels of the denoiser's input.

    They are the VAE's latents of a clip whose other frames are gray, and a mask of the given frames, one channel for
    each pixel frame of a latent one. Wan 2.1 also attends to what a CLIP sees of the pictures; 2.2 A14B has none.
    """

    pipelines = ("WanImageToVideoPipeline",)
    takes_last_picture = True
    needs_picture = True
    optional_parts = (LOW_NOISE, IMAGE_ENCODER, IMAGE_PROCESSOR)
    original_names: ClassVar[tuple[tuple[str, str], ...]] = (
        (r"^condition_embedder\.image_embedder\.norm1\.", "img_emb.proj.0."),
        (r"^condition_embedder\.image_embedder\.ff\.net\.0\.proj\.", "img_emb.proj.1."),
        (r"^condition_embedder\.image_embedder\.ff\.net\.2\.", "img_emb.proj.3."),
        (r"^condition_embedder\.image_embedder\.norm2\.", "img_emb.proj.4."),
        (r"^condition_embedder\.image_embedder\.pos_embed$", "img_emb.emb_pos"),
        (r"\.attn2\.add_([kv])_proj\.", r".cross_attn.\1_img."),
        (r"\.attn2\.norm_added_k\.", ".cross_attn.norm_k_img."),
        *WanBackbone.original_names,
    )

    def __init__(self, **parts: Any) -> None:
        super().__init__(**parts)
        self.needs_last_picture = parts[HIGH_NOISE].config.pos_embed_seq_len is not None

    @classmethod
    def knows(cls, index: Mapping[str, Any]) -> bool:
        """True but for TI2V-5B, which Wan itself loads: its given frame is held, without further channels."""
        return index["_class_name"] in cls.pipelines and not index.get("expand_timesteps")

    @classmethod
    def component_classes(cls) -> dict[str, Any]:
        """Those of Wan, and the image encoder's, which 2.2 has not."""
        from transformers import CLIPImageProcessor, CLIPVisionModel

        return {
            **super().component_classes(), IMAGE_ENCODER: CLIPVisionModel, IMAGE_PROCESSOR: CLIPImageProcessor,
        }  # fmt: skip

    def _encode(self, prompts: Sequence[str]) -> Condition:
        """As Wan; beside an image's features the prompt must have all of its 512 rows, which tell the two apart."""
        text = super()._encode(prompts)
        if self.parts.get(IMAGE_ENCODER) is None:
            return text
        rows = text.embeds.new_zeros(len(text), TEXT_LENGTH - text.embeds.shape[1], text.embeds.shape[2])
        return Condition(torch.cat([text.embeds, rows], dim=1))

    def _velocity(self, latents: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
        need_picture(condition)
        return super()._velocity(latents, sigma, condition)

    @torch.no_grad()
    def given_frames(self, clip: ClipSpec, first: Tensor, last: Tensor | None = None) -> GivenFrames:
        """What the denoiser is told of the first frames `[B, 3, height, width]` in [0, 1], and of the last ones."""
        if last is None and self.needs_last_picture:
            what = "this Wan makes videos from a first and a last picture, and no last one is given"
            raise UserError(what, where="last_image", fix="name one, or use a model that takes a first one alone")
        batch, stride = len(first), self.temporal_stride
        _, frames, rows, columns = self.latent_shape(clip)
        video = first.new_full((batch, clip.num_frames, 3, clip.height, clip.width), GRAY)
        mask = first.new_zeros(batch, frames * stride, rows, columns)  # the first latent frame's pixel frame, 4 times
        video[:, 0], mask[:, :stride] = first, 1
        if last is not None:
            video[:, -1], mask[:, -1] = last, 1
        mask = mask.unflatten(1, (frames, stride)).transpose(1, 2).to(self.device)
        pictures = first[:, None] if last is None else torch.stack([first, last], dim=1)
        return GivenFrames(channels=torch.cat([mask, self.encode(video)], dim=1), image=self._see(pictures))

    def _see(self, pictures: Tensor) -> Tensor | None:
        """The image encoder's features of pictures `[B, N, 3, height, width]`: `[B, N * L, D]`."""
        encoder = self.parts.get(IMAGE_ENCODER)
        if encoder is None:
            return None
        pixels = (pictures.flatten(0, 1).clamp(0, 1) * 255).round().to(torch.uint8)
        if pictures.is_meta:  # of a plan: the processor takes numbers
            inputs = pixels.new_empty(len(pixels), 3, encoder.config.image_size, encoder.config.image_size)
        else:
            inputs = self.parts[IMAGE_PROCESSOR](images=list(pixels.cpu()), return_tensors="pt").pixel_values
        seen = encoder(inputs.to(self.device, encoder.dtype), output_hidden_states=True).hidden_states[-2]
        return seen.unflatten(0, pictures.shape[:2]).flatten(1, 2)  # type: ignore[no-any-return]
