"""PickScore and CLIP score: how well each frame fits the prompt, by a CLIP model in transformers' format."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from rats_video.meta import LongPrompts
from rats_video.rewards.base import RewardContext, WeightsFolder
from rats_video.rewards.clip_text import ClipText, cleaned
from rats_video.rewards.files import load_tokenizer, load_transformers_model
from rats_video.rewards.frames import FrameReward, FrameRewardConfig
from rats_video.rewards.pixels import Pixels, clip_pixels, processor_pixels
from rats_video.rewards.prompted import Condition

# Sizes for a plan, where the folder is not there: PickScore and HPSv2.1 are a CLIP ViT-H/14, the usual CLIP a ViT-L/14.
VIT_H = {
    "projection_dim": 1024,
    "text_config": {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16},
    "vision_config": {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32,
                      "num_attention_heads": 16, "patch_size": 14},
}  # fmt: skip
VIT_L = {
    "projection_dim": 768,
    "text_config": {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12},
    "vision_config": {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24,
                      "num_attention_heads": 16, "patch_size": 14},
}  # fmt: skip


class BaseClipConfig(FrameRewardConfig):
    """A CLIP model as transformers saves it."""

    tokenizer: str | None = Field(
        None, description="folder of its tokenizer, where `path` has none; all CLIP text models share one"
    )


class PickScoreConfig(BaseClipConfig):
    """People's preference and fit to the prompt (arXiv 2305.01569): exp(logit_scale) * cos(frame, prompt), 18 to 24."""

    source = "yuvalkirstain/PickScore_v1"

    kind: Literal["pickscore"]
    path: WeightsFolder = "models/PickScore_v1"

    def build(self, context: RewardContext) -> ClipReward:
        """Load it."""
        model, tokenizer = load_clip(self, context)
        scale = float(model.logit_scale.detach().exp())
        return ClipReward(model, tokenizer, self, scale=scale, pixels=processor_pixels, clean=str)

    def on_meta(self, context: RewardContext) -> ClipReward:  # noqa: ARG002
        """The same without weights; its scale has no value there and stays 1."""
        model = self.empty_model("CLIPModel", self.hub_config(VIT_H))
        return ClipReward(model, LongPrompts(), self, pixels=processor_pixels)


class ClipScoreConfig(BaseClipConfig):
    """Fit to the prompt (CLIP score): cos(frame, prompt), about 0.2 to 0.35.

    Text and pixels are prepared by OpenAI's code (github openai/CLIP). transformers' processor, and what builds on it
    (torchmetrics), cleans no text and crops another row where a margin is odd.
    """

    source = "openai/clip-vit-large-patch14"

    kind: Literal["clip_score"]
    path: WeightsFolder = "models/clip-vit-large-patch14"

    def build(self, context: RewardContext) -> ClipReward:
        """Load it."""
        return ClipReward(*load_clip(self, context), self, pixels=clip_pixels)

    def on_meta(self, context: RewardContext) -> ClipReward:  # noqa: ARG002
        """The same without weights."""
        model = self.empty_model("CLIPModel", self.hub_config(VIT_L))
        return ClipReward(model, LongPrompts(), self, pixels=clip_pixels)


class ClipReward(FrameReward):
    """`scale * cos(frame, prompt)` for each scored frame.

    Args:
        model: a `CLIPModel`.
        tokenizer: its tokenizer.
        cfg: which frames are scored, and how many at a time.
        scale: of the cosine; PickScore's is the model's own exp(logit_scale).
        pixels: brings frames to the model's size.
        clean: what is done to a prompt before the tokenizer reads it.
    """

    def __init__(
        self, model: Any, tokenizer: Any, cfg: FrameRewardConfig, *, scale: float = 1.0, pixels: Pixels,
        clean: Callable[[str], str] = cleaned,
    ) -> None:  # fmt: skip
        super().__init__(cfg)
        self.model = model.requires_grad_(requires_grad=False).eval()
        self.scale, self.pixels = scale, pixels
        self.text_limit = int(model.config.text_config.max_position_embeddings)
        self.text = ClipText(tokenizer, self.text_limit, clean)

    def condition(self, prompts: Sequence[str]) -> Condition:
        """Unit features `[B, D]` of the prompts."""
        return {"text": self.text.unit_features(self.model, prompts)}

    def token_counts(self, prompts: Sequence[str]) -> list[int]:
        """Tokens of each prompt with start and end."""
        return self.text.counts(prompts)

    def score_frames(self, frames: Tensor, condition: Condition) -> Tensor:
        """Scores `[N]` of frames `[N, 3, height, width]` in [0, 1]."""
        return self.scale * (image_features(self.model, frames, self.pixels) * condition["text"]).sum(dim=-1)


def load_clip(cfg: BaseClipConfig, context: RewardContext) -> tuple[Any, Any]:
    """The model on its device, and its tokenizer.

    Raises:
        UserError: a folder does not hold what it should, whole and in safetensors.
    """
    from transformers import CLIPModel

    folder, words = cfg.folder(context.where, "path"), cfg.folder(context.where, "tokenizer", "path")
    model = load_transformers_model(CLIPModel, folder, "clip", getattr(torch, cfg.dtype))
    tokenizer = load_clip_tokenizer(words, model.config.text_config.vocab_size)
    return model.to(context.device), tokenizer


def load_clip_tokenizer(folder: Path, words: int) -> Any:
    """The tokenizer of a folder; raises UserError unless it has as many words as the model."""
    fix = "give a folder with CLIP's tokenizer as `tokenizer`, e.g. of openai/clip-vit-large-patch14"
    return load_tokenizer(folder, words, fix=fix)


def image_features(model: Any, frames: Tensor, pixels: Pixels) -> Tensor:
    """Unit features `[N, D]` of frames `[N, 3, height, width]` in [0, 1] by a model with towers for images and text."""
    seen = pixels(frames, model.config.vision_config.image_size).to(model.dtype)
    return F.normalize(model.get_image_features(pixel_values=seen).pooler_output.float(), dim=-1)
