"""PickScore and CLIP score: how well each frame fits the prompt, by a CLIP model in transformers' format."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from rats_video.rewards.files import load_tokenizer, load_transformers_model
from rats_video.rewards.frames import FrameReward, FrameRewardConfig
from rats_video.rewards.prompted import Condition


class BaseClipConfig(FrameRewardConfig):
    """A CLIP model as transformers saves it."""

    tokenizer: str | None = Field(
        None, description="folder of its tokenizer, where `path` has none; all CLIP text models share one"
    )


class PickScoreConfig(BaseClipConfig):
    """People's preference and fit to the prompt (arXiv 2305.01569): exp(logit_scale) * cos(frame, prompt), 18 to 24."""

    source = "yuvalkirstain/PickScore_v1"

    kind: Literal["pickscore"]
    path: str = "models/PickScore_v1"


class ClipScoreConfig(BaseClipConfig):
    """Fit to the prompt (CLIP score): cos(frame, prompt), about 0.2 to 0.35."""

    source = "openai/clip-vit-large-patch14"

    kind: Literal["clip_score"]
    path: str = "models/clip-vit-large-patch14"


Pixels = Callable[[Tensor, int], Tensor]
"""`(frames [N, 3, height, width] in [0, 1], size) -> [N, 3, size, size]`: what an image encoder takes."""

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)  # of CLIP's training images, red, green, blue
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


class ClipReward(FrameReward):
    """`scale * cos(frame, prompt)` for each scored frame.

    Args:
        model: a `CLIPModel`.
        tokenizer: its tokenizer.
        cfg: which frames are scored, and how many at a time.
        scaled: multiply by the model's own exp(logit_scale), as PickScore does; otherwise the plain cosine.
        pixels: how frames are brought to the model's size.
    """

    def __init__(
        self, model: Any, tokenizer: Any, cfg: FrameRewardConfig, *, scaled: bool, pixels: Pixels | None = None
    ) -> None:
        super().__init__(cfg)
        self.model = model.requires_grad_(requires_grad=False).eval()
        self.tokenizer = tokenizer
        self.scale = float(model.logit_scale.exp()) if scaled else 1.0
        self.text_limit = int(model.config.text_config.max_position_embeddings)
        self.pixels = pixels or clip_pixels

    def condition(self, prompts: Sequence[str]) -> Condition:
        """Unit features `[B, D]` of the prompts."""
        tokens = self.tokenizer(
            list(prompts), padding=True, truncation=True, max_length=self.text_limit, return_tensors="pt"
        ).to(self.model.device)
        features = self.model.get_text_features(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask)
        return {"text": F.normalize(features.pooler_output.float(), dim=-1)}

    def token_counts(self, prompts: Sequence[str]) -> list[int]:
        """Tokens of each prompt with start and end."""
        return [len(self.tokenizer(prompt, verbose=False).input_ids) for prompt in prompts]

    def score_frames(self, frames: Tensor, condition: Condition) -> Tensor:
        """Scores `[N]` of frames `[N, 3, height, width]` in [0, 1]."""
        return self.scale * (image_features(self.model, frames, self.pixels) * condition["text"]).sum(dim=-1)

    @classmethod
    def load(
        cls, folder: Path, tokenizer: Path, cfg: FrameRewardConfig, device: torch.device, *, scaled: bool
    ) -> ClipReward:
        """Load a frozen reward; raises UserError if a folder does not hold what it should, whole and in safetensors."""
        from transformers import CLIPModel

        model = load_transformers_model(CLIPModel, folder, "clip", getattr(torch, cfg.dtype))
        words = load_clip_tokenizer(tokenizer, model.config.text_config.vocab_size)
        return cls(model.to(device), words, cfg, scaled=scaled)


def load_clip_tokenizer(folder: Path, words: int) -> Any:
    """The tokenizer of a folder; raises UserError if it has none, or one of not as many words as the model's."""
    fix = "give a folder with CLIP's tokenizer as `tokenizer`, e.g. of openai/clip-vit-large-patch14"
    return load_tokenizer(folder, words, fix=fix)


def image_features(model: Any, frames: Tensor, pixels: Pixels) -> Tensor:
    """Unit features `[N, D]` of frames `[N, 3, height, width]` in [0, 1] by a model with towers for images and text."""
    seen = pixels(frames, model.config.vision_config.image_size).to(model.dtype)
    return F.normalize(model.get_image_features(pixel_values=seen).pooler_output.float(), dim=-1)


def clip_pixels(frames: Tensor, size: int) -> Tensor:
    """What CLIP's image processor makes of frames `[N, 3, height, width]` in [0, 1]: `[N, 3, size, size]`.

    Short side to `size` (bicubic, antialiased), centre crop, CLIP's mean and standard deviation.
    """
    return normalize(centre_square(frames, size), CLIP_MEAN, CLIP_STD)


def centre_square(frames: Tensor, size: int, *, half: Callable[[float], int] = math.floor) -> Tensor:
    """Frames `[N, 3, height, width]` with their short side brought to `size` and cropped: `[N, 3, size, size]`.

    Args:
        frames: in [0, 1].
        size: in pixels.
        half: where a crop begins whose margin is odd; transformers rounds half pixels down, torchvision as `round`.
    """
    height, width = frames.shape[-2:]
    short = min(height, width)
    target = (int(size * height / short), int(size * width / short))
    top, left = (half((side - size) / 2) for side in target)
    return resize_bicubic(frames, target)[..., top : top + size, left : left + size]


def resize_bicubic(frames: Tensor, size: tuple[int, int]) -> Tensor:
    """Frames `[N, 3, height, width]` in [0, 1] at another size, still in [0, 1] and in float32.

    Antialiased, as image processors do it. Bicubic overshoots [0, 1]; it is clamped straight-through, so that those
    pixels keep their gradient.
    """
    resized = F.interpolate(frames.float(), size, mode="bicubic", antialias=True)
    return resized + (resized.clamp(0, 1) - resized).detach()


def normalize(frames: Tensor, mean: tuple[float, float, float], std: tuple[float, float, float]) -> Tensor:
    """`(frames - mean) / std`, channel by channel, of frames `[N, 3, height, width]`."""
    return (frames - frames.new_tensor(mean).view(3, 1, 1)) / frames.new_tensor(std).view(3, 1, 1)
