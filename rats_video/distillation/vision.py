"""The frozen networks of a discriminator of pixels, loaded or without weights."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rats_video.assets import resolve_folder
from rats_video.errors import UserError
from rats_video.meta import META, LongPrompts, empty_model
from rats_video.methods.vision import VisionConfig, WordVisionConfig
from rats_video.rewards.base import RewardContext
from rats_video.rewards.clip_score import VIT_L, load_clip_tokenizer
from rats_video.rewards.clip_text import ClipText
from rats_video.rewards.files import load_transformers_model, read_config
from rats_video.rewards.pixels import IMAGENET_MEAN, IMAGENET_STD, normalize
from rats_video.rewards.word import FrameEncoder, WordReward, WordRewardConfig, words_in

WHERE = "method.gan.vision"
DINO_L = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "patch_size": 14, "image_size": 518}
"""Sizes for a plan, where the folder is not there: dinov2-large."""


class DinoClip(nn.Module):
    """Layers of a DINOv2, and a CLIP's unit features of prompts.

    Args:
        dino: transformers' `Dinov2Model`.
        clip: transformers' `CLIPModel`, of which the text tower is kept.
        tokenizer: CLIP's.
        layers: hidden states that are taken; 0 is the embedded patches.

    Raises:
        UserError: the model has no such layer.
    """

    def __init__(self, dino: Any, clip: Any, tokenizer: Any, layers: Sequence[int]) -> None:
        super().__init__()
        if max(layers) > (deepest := dino.config.num_hidden_layers):
            raise UserError(f"has no layer {max(layers)}: its last is {deepest}", where=f"{WHERE}.layers")
        clip.vision_model = clip.visual_projection = None
        self.dino, self.clip, self.layers = dino, clip, tuple(layers)
        self.reader = ClipText(tokenizer, clip.config.text_config.max_position_embeddings)
        self.widths, self.text_width = [dino.config.hidden_size] * len(self.layers), clip.config.projection_dim
        self.requires_grad_(requires_grad=False).eval()

    def maps(self, frames: Tensor) -> tuple[Tensor, ...]:
        """Of frames in their own size, as SenseFlow shows them; raises UserError if they are smaller than a patch."""
        patch = self.dino.config.patch_size
        rows, columns = frames.shape[-2] // patch, frames.shape[-1] // patch
        if not rows * columns:
            raise UserError(
                f"sees patches of {patch} x {patch} pixels, more than a frame has", where=WHERE,
                fix="train on larger clips, or set method.gan=null",
            )  # fmt: skip
        pixels = normalize(frames, IMAGENET_MEAN, IMAGENET_STD).to(self.dino.dtype)
        states = self.dino(pixel_values=pixels, output_hidden_states=True).hidden_states
        return tuple(states[i][:, 1:].float().transpose(1, 2).unflatten(2, (rows, columns)) for i in self.layers)

    @torch.no_grad()
    def text(self, prompts: Sequence[str]) -> Tensor:
        """CLIP's."""
        return self.reader.unit_features(self.clip, prompts)


class WordVision(nn.Module):
    """The convolutions of a word reward, and which of its words a prompt has."""

    def __init__(self, reward: WordReward, *, where: str) -> None:
        super().__init__()
        if not isinstance(reward.encoder, FrameEncoder):
            raise UserError("is a word reward of whole clips, not of frames", where=where)
        self.reward, self.stem = reward, reward.encoder.stem
        self.widths = [layer.out_channels for layer in self.stem if isinstance(layer, nn.Conv2d)]
        self.text_width = len(reward.words)
        self.requires_grad_(requires_grad=False).eval()

    def maps(self, frames: Tensor) -> tuple[Tensor, ...]:
        """After each activation."""
        features, found = self.reward.cues(frames), []
        for layer in self.stem:
            features = layer(features)
            if isinstance(layer, nn.SiLU):
                found.append(features)
        return tuple(found)

    def text(self, prompts: Sequence[str]) -> Tensor:
        """1 for each word that is there, else 0."""
        said = [set(words_in(prompt)) for prompt in prompts]
        return torch.tensor([[float(word in words) for word in self.reward.words] for words in said])


Vision = DinoClip | WordVision


def build_vision(cfg: VisionConfig, device: torch.device) -> Vision:
    """Load it, frozen; raises UserError if a folder does not hold it, whole and in safetensors."""
    if isinstance(cfg, WordVisionConfig):
        where = f"{WHERE}.path"
        reward = WordRewardConfig(path=cfg.path).build(RewardContext(WHERE, device))
        return WordVision(reward, where=where).to(device)
    from transformers import CLIPModel, Dinov2Model

    dtype = getattr(torch, cfg.dtype)
    dino = load_transformers_model(Dinov2Model, resolve_folder(cfg.path, where=f"{WHERE}.path"), "dinov2", dtype)
    folder = resolve_folder(cfg.clip, where=f"{WHERE}.clip")
    clip = load_transformers_model(CLIPModel, folder, "clip", dtype)
    tokenizer = load_clip_tokenizer(folder, clip.config.text_config.vocab_size)
    return DinoClip(dino, clip, tokenizer, cfg.layers).to(device)


def vision_on_meta(cfg: VisionConfig) -> Vision:
    """The same without weights, with the sizes of its folders, or the published ones where there are none."""
    if isinstance(cfg, WordVisionConfig):
        return WordVision(WordRewardConfig(path=cfg.path).on_meta(RewardContext(WHERE, META)), where=f"{WHERE}.path")
    from transformers import CLIPModel, Dinov2Model

    dino, clip = (
        empty_model(kind, read_config(folder) if (folder := Path(path).expanduser()).is_dir() else sizes, where=path)
        for kind, path, sizes in ((Dinov2Model, cfg.path, DINO_L), (CLIPModel, cfg.clip, VIT_L))
    )
    return DinoClip(dino, clip, LongPrompts(), cfg.layers).to(getattr(torch, cfg.dtype))
