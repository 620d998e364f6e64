"""A learned video reward for small vocabularies: does the clip show each word of the prompt, and is it well made?"""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from einops import rearrange
from pydantic import Field
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from rats_video.errors import UserError, first_line, warn
from rats_video.meta import META
from rats_video.reading import DAMAGED, load_tensors, read_sizes
from rats_video.rewards.base import BaseRewardConfig, RewardContext
from rats_video.rewards.files import read_config
from rats_video.types import RewardScores


class WordRewardConfig(BaseRewardConfig):
    """Words of the prompt that are shown, and quality: a small network of `rats-video train reward`."""

    per = "frame"
    source = "embedded, or rats-video train reward"

    kind: Literal["word"] = "word"
    path: str = Field(description="folder with config.json and model.safetensors, or the name of an embedded one")
    blind_to: tuple[str, ...] = Field((), description="words that do not count, e.g. to study what a flawed judge does")

    def build(self, context: RewardContext) -> WordReward:
        """Load it."""
        return WordReward.load(self.folder(context.where, "path"), context.device, self.blind_to)

    def on_meta(self, context: RewardContext) -> WordReward:
        """The same without weights; raises UserError if its config.json is not a word reward's."""
        folder = self.folder(context.where, "path")
        try:
            with META:
                return WordReward(**read_config(folder)).requires_grad_(requires_grad=False).eval()
        except (TypeError, ValueError) as error:
            raise UserError(f"not a word reward: {error}", where=str(folder)) from error


Encoder = Literal["frames", "volume"]
_WORD = re.compile(r"\w+(?:['\u2019-]\w+)*")
_INPUTS = 6  # red, green, blue, contrast with the border, x, y
_CONTRAST_OFFSET = 1e-4
_CONTRAST_SHARPNESS = 8.0  # of the first attention; a pure colour stands off gray by 1 to 1.7
_MOTION_SCALE = 10.0  # a fast shape moves 0.07 of the half-width a frame; brought to the size of the other features


class WordReward(nn.Module):
    """Scores clips by the words they show (alignment) and by how well they are made (quality).

    `score = mean over the prompt's words of log P(word shown) + quality_weight * log P(undamaged)`, at most 0. The
    probabilities are read from the pixels alone, for each frame (with a temporal context of a few frames) and for the
    clip; the clip's alignment is half its own and half the mean of its frames', so that every frame set right counts.

    Args:
        words: the vocabulary of words that are scored; all other words of a prompt are ignored.
        encoder: "frames" (2-D convolutions, attention pooling with coordinates, temporal convolutions) or "volume"
            (3-D convolutions, average and maximum pooling).
        width: feature channels.
        any_prompt: score a prompt without a known word by quality alone, its alignment 0; otherwise refuse it.
        quality_weight: of log P(undamaged) beside the words, at least 0.

    Attributes:
        scored: the words that count; all, unless some are taken out.
    """

    def __init__(
        self,
        words: Sequence[str],
        encoder: Encoder = "frames",
        width: int = 128,
        *,
        any_prompt: bool = False,
        quality_weight: float = 0.1,
    ) -> None:
        super().__init__()
        if not 0 <= quality_weight < math.inf:
            raise ValueError(f"its quality_weight is {quality_weight}")
        self.words = self.scored = tuple(words)
        self.any_prompt, self.quality_weight = any_prompt, quality_weight
        self.config = {
            "words": list(words), "encoder": encoder, "width": width,
            "any_prompt": any_prompt, "quality_weight": quality_weight,
        }  # fmt: skip
        self.encoder = FrameEncoder(width) if encoder == "frames" else VolumeEncoder(width)
        self.frame_head = nn.Linear(width, len(words) + 1)
        self.clip_head = nn.Sequential(nn.Linear(2 * width, width), nn.SiLU(), nn.Linear(width, len(words) + 1))

    def logits(self, videos: Tensor) -> tuple[Tensor, Tensor]:
        """Log-odds of each word, and last of being undamaged: clip `[B, V + 1]` and frame `[B, T, V + 1]`."""
        batch = len(videos)
        cues = self.cues(rearrange(videos, "b t c h w -> (b t) c h w"))
        features = self.encoder(rearrange(cues, "(b t) c h w -> b t c h w", b=batch))
        pooled = torch.cat([features.mean(dim=1), features.amax(dim=1)], dim=-1)
        return self.clip_head(pooled), self.frame_head(features)

    @staticmethod
    def cues(frames: Tensor) -> Tensor:
        """Frames `[N, 3, height, width]` in [0, 1] as the encoder sees them, `[N, 6, height / 2, width / 2]`."""
        # Half the resolution: shapes stay legible, and no gradient can reward patterns finer than two pixels.
        frames = F.avg_pool2d(frames * 2 - 1, 2)
        return torch.cat([frames, _contrast(frames), _coordinates(frames)], dim=1)

    def forward(self, videos: Tensor, prompts: Sequence[str]) -> RewardScores:
        """Score `[B, T, 3, height, width]` in [0, 1]; may raise UserError for a prompt without a known word."""
        clip, frames = self.logits(videos)
        mentioned = self.mentioned_words(prompts).to(clip)
        frame_alignment = _mean_log_probability(frames[..., :-1], mentioned[:, None])
        alignment = (_mean_log_probability(clip[:, :-1], mentioned) + frame_alignment.mean(dim=1)) / 2
        quality, frame_quality = F.logsigmoid(clip[:, -1]), F.logsigmoid(frames[..., -1])
        return RewardScores(
            clip=alignment + self.quality_weight * quality,
            frames=frame_alignment + self.quality_weight * frame_quality,
            parts={"alignment": alignment, "quality": quality},
        )

    def check_prompts(self, prompts: Sequence[str]) -> None:
        """Raise UserError for a prompt without a known word, or warn if these are scored by quality alone."""
        unknown = (~self.mentioned_words(prompts).any(dim=1)).sum()
        if unknown and self.scored:
            warn(f"{unknown} of {len(prompts)} prompts hold no word that the reward knows: quality alone is scored")

    def mentioned_words(self, prompts: Sequence[str]) -> Tensor:
        """`[B, V]` bool: which words of the vocabulary each prompt contains."""
        said = [set(words_in(prompt)) & set(self.scored) for prompt in prompts]
        if not self.any_prompt and not all(said):
            prompt = prompts[said.index(set())]
            fix = f"use {', '.join(self.scored)}"
            raise UserError(f"the reward knows no word of {prompt!r}", where="prompt", fix=fix)
        return torch.tensor([[word in known for word in self.words] for known in said], dtype=torch.bool)

    def save(self, folder: Path) -> None:
        """Write `config.json` and `model.safetensors`."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(self.config, indent=2) + "\n")
        save_file(self.state_dict(), folder / "model.safetensors")

    @classmethod
    def load(cls, folder: Path, device: torch.device | str = "cpu", blind_to: Sequence[str] = ()) -> WordReward:
        """Load a frozen reward; raises UserError if the folder does not hold one, or it does not know these words."""
        try:
            config, tensors = read_sizes(folder / "config.json"), load_tensors(folder / "model.safetensors")
            if not all(isinstance(word, str) for word in config["words"]):
                raise TypeError("its words are no text")
            with META:  # the file is as large as it says, the network it asks for may be larger
                cls(**config).load_state_dict(tensors, assign=True)
            reward = cls(**config)
            reward.load_state_dict(tensors)
        except DAMAGED as error:
            reason = first_line(error)
            raise UserError(f"not a word reward: {reason}", where=str(folder)) from error
        if unknown := sorted(set(blind_to) - set(reward.words)):
            raise UserError(
                f"the reward does not know {unknown[0]!r}", where="blind_to", fix=f"it knows {', '.join(reward.words)}"
            )
        reward.scored = tuple(word for word in reward.words if word not in blind_to)
        return reward.requires_grad_(requires_grad=False).eval().to(device)


def words_in(text: str) -> list[str]:
    """The words of a text in lower case, without punctuation around them."""
    return _WORD.findall(text.lower())


def _mean_log_probability(logits: Tensor, mentioned: Tensor) -> Tensor:
    """Mean over the mentioned words of log P(word), over the last dimension; 0 where none is."""
    return (F.logsigmoid(logits) * mentioned).sum(dim=-1) / mentioned.sum(dim=-1).clamp(min=1)


class FrameEncoder(nn.Module):
    """Pixels and cues `[B, T, 6, H, W]` to features `[B, T, D]`: space first, then time.

    Each attention head keeps the features of what it looks at, its place, and how far it moves in a frame. Heads start
    out looking at what stands off the border: without that, five words took over ten times as many steps.
    """

    def __init__(self, width: int, num_heads: int = 4) -> None:
        super().__init__()
        channels = (_INPUTS, 24, 48, 64)
        self.stem = nn.Sequential(*(
            layer
            for i, (inputs, outputs) in enumerate(itertools.pairwise(channels))
            for layer in (
                nn.Conv2d(inputs, outputs, 3 if i else 5, stride=2 if i < 2 else 1, padding=1 if i else 2),
                nn.GroupNorm(8, outputs),
                nn.SiLU(),
            )
        ))  # fmt: skip
        self.attention = nn.Conv2d(channels[-1] + 1, num_heads, 1)
        nn.init.constant_(self.attention.weight[:, -1], _CONTRAST_SHARPNESS)
        self.project = nn.Linear(channels[-1] * (2 + num_heads) + 4 * num_heads, width)
        self.temporal = nn.ModuleList(nn.Conv1d(width, width, 5, padding=2, padding_mode="replicate") for _ in range(3))

    def forward(self, cues: Tensor) -> Tensor:
        """Encode."""
        batch = cues.shape[0]
        frames = rearrange(cues, "b t c h w -> (b t) c h w")
        features = self.stem(frames)
        contrast = F.adaptive_avg_pool2d(frames[:, 3:4], features.shape[-2:])
        weights = self.attention(torch.cat([features, contrast], dim=1)).flatten(2).softmax(dim=-1)  # [B T, heads, HW]
        positions = torch.einsum("nhp,ncp->nhc", weights, _coordinates(features).flatten(2)).flatten(1)
        attended = torch.einsum("nhp,ncp->nhc", weights, features.flatten(2)).flatten(1)
        tracks = rearrange(positions, "(b t) d -> b t d", b=batch)
        motion = rearrange(_MOTION_SCALE * tracks.diff(dim=1, prepend=tracks[:, :1]), "b t d -> (b t) d")
        pooled = torch.cat([features.mean(dim=(2, 3)), features.amax(dim=(2, 3)), attended, positions, motion], dim=-1)
        hidden: Tensor = rearrange(self.project(pooled), "(b t) d -> b d t", b=batch)
        for layer in self.temporal:
            hidden = hidden + F.silu(layer(hidden))
        return hidden.transpose(1, 2)


class VolumeEncoder(nn.Module):
    """Pixels and cues `[B, T, 6, H, W]` to features `[B, T, D]`: space and time together."""

    def __init__(self, width: int) -> None:
        super().__init__()
        channels = (_INPUTS, 24, 48, 64)
        self.layers = nn.ModuleList(
            nn.Conv3d(inputs, outputs, (3, 4, 4), stride=(1, 2, 2), padding=(1, 1, 1))
            for inputs, outputs in itertools.pairwise(channels)
        )
        self.norms = nn.ModuleList(nn.GroupNorm(4, outputs) for outputs in channels[1:])
        self.project = nn.Conv1d(channels[-1] * 18, width, 3, padding=1)

    def forward(self, cues: Tensor) -> Tensor:
        """Encode."""
        hidden = rearrange(cues, "b t c h w -> b c t h w")
        for layer, norm in zip(self.layers, self.norms, strict=True):
            hidden = F.gelu(norm(layer(hidden)))
        frames = rearrange(hidden, "b c t h w -> (b t) c h w")
        pooled = torch.cat([F.adaptive_avg_pool2d(frames, 4).flatten(1), frames.mean((2, 3)), frames.amax((2, 3))], 1)
        projected: Tensor = self.project(rearrange(pooled, "(b t) d -> b d t", b=len(cues)))
        return projected.transpose(1, 2)


def _contrast(images: Tensor) -> Tensor:
    """Distance of each pixel from the mean of the border, `[N, C, H, W]` to `[N, 1, H, W]`."""
    sides = (images[..., 0, :], images[..., -1, :], images[..., 0], images[..., -1])
    border = torch.cat(sides, dim=-1).mean(dim=-1)[..., None, None]
    # The root's slope has no bound at zero: the offset keeps the gradient finite on a plain background.
    return ((images - border).square().sum(dim=1, keepdim=True) + _CONTRAST_OFFSET).sqrt()


def _coordinates(images: Tensor) -> Tensor:
    """X and y in [-1, 1] for `[N, C, H, W]`: `[N, 2, H, W]`."""
    height, width = images.shape[-2:]
    y = torch.linspace(-1, 1, height, device=images.device, dtype=images.dtype)
    x = torch.linspace(-1, 1, width, device=images.device, dtype=images.dtype)
    grid = torch.stack(torch.meshgrid(x, y, indexing="xy"))
    return grid.expand(len(images), -1, -1, -1)
