"""PickScore and CLIP score: how well each frame fits the prompt, by a CLIP model in transformers' format."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from rats_video.config.reward import ClipScorer
from rats_video.errors import UserError, warn
from rats_video.types import RewardScores

_MEAN = (0.48145466, 0.4578275, 0.40821073)  # of CLIP's training images, red, green, blue
_STD = (0.26862954, 0.26130258, 0.27577711)


class ClipReward(nn.Module):
    """`scale * cos(frame, prompt)` for each scored frame; a clip's score is their mean.

    A frame that is not scored takes the score of the nearest one that is (the earlier of two), so a gate by latent
    frames works with few scored frames too; gradient goes to the scored ones alone.

    Args:
        model: a `CLIPModel`.
        tokenizer: its tokenizer.
        cfg: which frames are scored, and how many at a time.
        scaled: multiply by the model's own exp(logit_scale), as PickScore does; otherwise the plain cosine.
    """

    def __init__(self, model: Any, tokenizer: Any, cfg: ClipScorer, *, scaled: bool) -> None:
        super().__init__()
        self.model = model.requires_grad_(requires_grad=False).eval()
        self.tokenizer, self.cfg = tokenizer, cfg
        self.scale = float(model.logit_scale.exp()) if scaled else 1.0
        self.text_limit: int = model.config.text_config.max_position_embeddings
        self._size: int = model.config.vision_config.image_size
        self._warned = False

    def forward(self, videos: Tensor, prompts: Sequence[str]) -> RewardScores:
        """Score `[B, T, 3, height, width]` in [0, 1]; a prompt longer than CLIP reads is cut, with one warning."""
        batch, num_frames = videos.shape[:2]
        scored = scored_frames(num_frames, self.cfg.frames).to(videos.device)
        pixels = videos[:, scored].flatten(0, 1)
        recompute = torch.is_grad_enabled() and pixels.requires_grad
        images = torch.cat([
            checkpoint(self.image_features, part, use_reentrant=False) if recompute else self.image_features(part)
            for part in pixels.split(self.cfg.chunk)
        ])  # fmt: skip
        cosine = (images.unflatten(0, (batch, -1)) * self.text_features(prompts)[:, None]).sum(dim=-1)
        scores = self.scale * cosine  # [B, scored]
        distance = (torch.arange(num_frames, device=videos.device)[:, None] - scored).abs()
        return RewardScores(clip=scores.mean(dim=1), frames=scores[:, distance.argmin(dim=1)])

    def image_features(self, frames: Tensor) -> Tensor:
        """Unit features `[N, D]` of frames `[N, 3, height, width]` in [0, 1]."""
        pixels = clip_pixels(frames, self._size).to(self.model.dtype)
        return F.normalize(self.model.get_image_features(pixel_values=pixels).pooler_output.float(), dim=-1)

    @torch.no_grad()
    def text_features(self, prompts: Sequence[str]) -> Tensor:
        """Unit features `[B, D]` of prompts."""
        self.check_prompts(prompts)
        tokens = self.tokenizer(
            list(prompts), padding=True, truncation=True, max_length=self.text_limit, return_tensors="pt"
        ).to(self.model.device)
        features = self.model.get_text_features(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask)
        return F.normalize(features.pooler_output.float(), dim=-1)

    def check_prompts(self, prompts: Sequence[str]) -> None:
        """Warn, once in the reward's life, of prompts whose end CLIP does not read."""
        if not self._warned:
            lengths = [len(self.tokenizer(prompt, verbose=False).input_ids) for prompt in prompts]
            long = sum(length > self.text_limit for length in lengths)
            if long:
                self._warned = True
                warn(f"{long} of {len(prompts)} prompts are longer than the {self.text_limit} tokens this reward reads")

    @classmethod
    def load(cls, folder: Path, tokenizer: Path, cfg: ClipScorer, device: torch.device, *, scaled: bool) -> ClipReward:
        """Load a frozen reward; raises UserError if a folder does not hold what it should, whole and in safetensors."""
        from transformers import AutoTokenizer

        model = _load_model(folder, getattr(torch, cfg.dtype))
        words = model.config.text_config.vocab_size
        # Without its files transformers would make up an empty tokenizer, which takes every prompt for the same one.
        known = len(AutoTokenizer.from_pretrained(tokenizer)) if has_tokenizer(tokenizer) else None
        if known != words:
            what = f"its tokenizer has {known} tokens, the model {words}" if known else "no tokenizer in it"
            fix = "give a folder with CLIP's tokenizer as `tokenizer`, e.g. of openai/clip-vit-large-patch14"
            raise UserError(what, where=str(tokenizer), fix=fix)
        return cls(model.to(device), AutoTokenizer.from_pretrained(tokenizer), cfg, scaled=scaled)


def scored_frames(num_frames: int, count: int | None) -> Tensor:
    """Indices of the frames that are scored: all, or `count` evenly spaced ones with the first and the last."""
    if count is None or count >= num_frames:
        return torch.arange(num_frames)
    return torch.linspace(0, num_frames - 1, count).round().long()


def clip_pixels(frames: Tensor, size: int) -> Tensor:
    """What CLIP's image processor makes of frames `[N, 3, height, width]` in [0, 1]: `[N, 3, size, size]`.

    Short side to `size` (bicubic, antialiased), centre crop, CLIP's mean and standard deviation. Bicubic overshoots
    [0, 1]; it is clamped straight-through, so that those pixels keep their gradient.
    """
    height, width = frames.shape[-2:]
    short = min(height, width)
    target = (int(size * height / short), int(size * width / short))
    resized = F.interpolate(frames.float(), target, mode="bicubic", antialias=True)
    top, left = (target[0] - size) // 2, (target[1] - size) // 2
    cropped = resized[..., top : top + size, left : left + size]
    clamped = cropped + (cropped.clamp(0, 1) - cropped).detach()
    return (clamped - clamped.new_tensor(_MEAN).view(3, 1, 1)) / clamped.new_tensor(_STD).view(3, 1, 1)


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder holds the files of a CLIP tokenizer."""
    return (folder / "tokenizer.json").is_file() or all(
        (folder / name).is_file() for name in ("vocab.json", "merges.txt")
    )


def _load_model(folder: Path, dtype: torch.dtype) -> Any:
    from safetensors import SafetensorError
    from transformers import CLIPModel
    from transformers.utils import logging

    _check_files(folder)
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # its report of missing weights is a table; ours is a line
    logging.disable_progress_bar()
    try:
        model, report = CLIPModel.from_pretrained(folder, dtype=dtype, use_safetensors=True, output_loading_info=True)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"cannot load it as a CLIPModel: {reason}", where=str(folder)) from error
    finally:
        logging.set_verbosity(verbosity)
    if missing := sorted(report["missing_keys"]):
        raise UserError(f"lacks {len(missing)} weights of a CLIPModel, e.g. {missing[0]}", where=str(folder))
    return model


def _check_files(folder: Path) -> None:
    try:
        kind = json.loads((folder / "config.json").read_text())["model_type"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            "not a CLIPModel: no readable config.json in it",
            where=str(folder),
            fix="give the folder of a hub download",
        ) from error
    if kind != "clip":
        raise UserError(f"is a {kind!r} model, not a CLIPModel (model_type 'clip')", where=str(folder))
    if not list(folder.glob("*.safetensors")) and list(folder.glob("*.bin")):
        raise UserError(
            "only has pickled weights, which can run code when they are loaded",
            where=str(folder), fix="if you trust them: CLIPModel.from_pretrained(folder).save_pretrained(folder)",
        )  # fmt: skip
