"""VideoReward: visual quality, motion quality and text alignment of clips (arXiv 2501.13918; KwaiVGI/VideoAlign, MIT).

By Qwen2-VL-2B. Each is read at a special token of its own and normalised to about N(0, 1). Attention is causal and the
prompt stands before the last token only, so the first two do not depend on it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from rats_video.config.fields import Config, PositiveFloat
from rats_video.errors import UserError
from rats_video.meta import META, CountedTokens
from rats_video.reading import DAMAGED, read_json
from rats_video.rewards.base import RewardContext, WeightsFolder
from rats_video.rewards.files import load_checkpoint_tensors, load_tokenizer
from rats_video.rewards.prompted import Condition, score_in_chunks
from rats_video.rewards.qwen import (
    QWEN2_VL_2B,
    Question,
    Qwen2VLConfig,
    QwenJudge,
    empty_qwen,
    load_head,
    load_qwen,
    qwen_config,
)
from rats_video.rewards.qwen_vision import PAIR, PixelRule
from rats_video.types import RewardScores


class VideoAlignWeightsConfig(Config):
    """Weights of the parts in a clip's score."""

    vq: float = Field(1.0, description="visual quality")
    mq: float = Field(1.0, description="motion quality")
    ta: float = Field(1.0, description="text alignment")


class VideoAlignConfig(Qwen2VLConfig):
    """Visual and motion quality and fit to the prompt (VideoReward, arXiv 2501.13918): each about N(0, 1), and summed.

    The first two do not depend on the prompt. Two frames a second are looked at, at least 4.
    """

    per = "clip"
    source = "KlingTeam/VideoReward"

    kind: Literal["video_align"]
    path: WeightsFolder = "models/VideoReward"
    fps: PositiveFloat | None = Field(None, description="frames a second of the clips; null = of the run's clip")
    weights: VideoAlignWeightsConfig = VideoAlignWeightsConfig()

    def build(self, context: RewardContext) -> VideoAlignReward:
        """Load a hub folder whose weights are converted to safetensors, the LoRA unmerged.

        Raises:
            UserError: a file is missing, or does not hold what it should.
        """
        folder, fps = self.folder(context.where, "path"), self.clip_fps(context)
        settings = VideoAlignSettings.read(folder / "model_config.json")
        saved = last_checkpoint(folder)
        tensors = merge_lora(load_checkpoint_tensors(saved), settings.lora_scale, saved)
        outputs = len(PARTS) if len(tensors.get("rm_head.weight", ())) == len(PARTS) else 1
        model = load_qwen(tensors, qwen_config(folder, QWEN2_VL_2B), getattr(torch, self.dtype), saved)
        head = nn.Linear(model.config.text_config.hidden_size, outputs, bias=False)
        load_head(tensors, head, saved)
        fix = "give a whole download of KlingTeam/VideoReward"
        tokenizer = load_tokenizer(saved / "tokenizer", model.config.text_config.vocab_size, fix=fix)
        known = tokenizer.get_vocab()
        if unknown := [token for token in VIDEO_ALIGN.answers if token not in known]:
            raise UserError(f"its tokenizer does not know {unknown[0]}", where=str(saved / "tokenizer"), fix=fix)
        return VideoAlignReward(model, head, tokenizer, self, settings, fps).to(context.device)

    def on_meta(self, context: RewardContext) -> VideoAlignReward:
        """The same without weights."""
        model, width = empty_qwen(self, QWEN2_VL_2B)
        settings, fps = VideoAlignSettings(), self.clip_fps(context)
        with META:
            head = nn.Linear(width, 1, bias=False)
            return VideoAlignReward(model, head, CountedTokens(), self, settings, fps)

    def clip_fps(self, context: RewardContext) -> float:
        """Frames a second of the clips to be scored; raises UserError, which names the key, if they are not known."""
        if self.fps is not None:
            return self.fps
        if context.clip is None:
            raise UserError(
                "frames a second of the clips are not known here", where=f"{context.where}.fps", fix="set it"
            )
        return context.clip.fps


VIDEO_ALIGN = Question(  # prompt_template.py, "detailed_special"
    "video_align.txt", ("<|VQ_reward|>", "<|MQ_reward|>", "<|TA_reward|>")
)
PARTS = ("vq", "mq", "ta")
_WRAPPED = "base_model.model."  # peft's, around every name
_LORA = (".base_layer.weight", ".lora_A.default.weight", ".lora_B.default.weight")
_LEAST_PIXELS = 128 * 28 * 28  # vision_process.py
_LEAST_FRAMES, _MOST_FRAMES = 4, 768


@dataclass(frozen=True)
class VideoAlignSettings:
    """Content of a checkpoint's model_config.json; the published one's by default.

    Args:
        most_pixels: of a frame.
        fps: frames a second that are looked at.
        lora_scale: of the LoRA that is merged into the weights: alpha / r.
        normal: mean and standard deviation of each part.
    """

    most_pixels: int = 448 * 448
    fps: float = 2.0
    lora_scale: float = 128 / 64
    normal: Mapping[str, tuple[float, float]] = field(
        default_factory=lambda: {"vq": (3.6757, 2.2476), "mq": (1.1646, 1.3811), "ta": (2.8105, 2.5121)}
    )

    @classmethod
    def read(cls, file: Path) -> VideoAlignSettings:
        """The settings of a file; raises UserError if it does not hold them."""
        try:
            read = read_json(file)
            data, lora, inference = read["data_config"], read["peft_lora_config"], read["inference_config"]
            rank = math.sqrt(lora["lora_r"]) if lora.get("use_rslora") else lora["lora_r"]
            return cls(
                most_pixels=int(data["max_frame_pixels"]),
                fps=float(data["fps"]),
                lora_scale=lora["lora_alpha"] / rank,
                normal={
                    part: (float(inference[f"{part.upper()}_mean"]), float(inference[f"{part.upper()}_std"]))
                    for part in PARTS
                },
            )
        except DAMAGED as error:
            reason = f"it has no {error}" if isinstance(error, KeyError) else str(error)
            raise UserError(f"not VideoReward's settings: {reason}", where=str(file)) from error


class VideoAlignReward(nn.Module):
    """Scores clips by the weighted sum of three normalised parts.

    Args:
        model: a `Qwen2VLModel`.
        head: a bias-free linear layer from its hidden states to one score, or to three of which each token has its own.
        tokenizer: with the three special tokens.
        cfg: weights of the parts, and the clips of a forward.
        settings: of the checkpoint.
        fps: frames a second of the clips that are scored.
    """

    def __init__(
        self, model: Any, head: nn.Linear, tokenizer: Any, cfg: VideoAlignConfig, settings: VideoAlignSettings,
        fps: float,
    ) -> None:  # fmt: skip
        super().__init__()
        self.judge = QwenJudge(
            model, tokenizer, VIDEO_ALIGN, PixelRule(_LEAST_PIXELS, settings.most_pixels, cfg.round_pixels)
        )
        self.head = head.requires_grad_(requires_grad=False).eval()
        self.cfg, self.settings, self.fps = cfg, settings, fps

    def looks_at(self, num_frames: int) -> Tensor:
        """Indices of the frames that are scored."""
        return sampled_frames(num_frames, self.fps, self.settings.fps)

    def check_prompts(self, prompts: Sequence[str]) -> None:
        """Raise UserError for a prompt that holds a special token."""
        self.judge.read(prompts)

    def forward(self, videos: Tensor, prompts: Sequence[str]) -> RewardScores:
        """Score `[B, T, 3, height, width]` in [0, 1]; the parts are normalised, but not weighted."""
        clips = videos[:, self.looks_at(videos.shape[1]).to(videos.device)]
        scores = score_in_chunks(self._score, clips, self.judge.read(prompts), self.cfg.chunk)
        parts = {
            part: (score - self.settings.normal[part][0]) / self.settings.normal[part][1]
            for part, score in zip(PARTS, scores.unbind(dim=1), strict=True)
        }
        weights = self.cfg.weights
        return RewardScores(weights.vq * parts["vq"] + weights.mq * parts["mq"] + weights.ta * parts["ta"], parts=parts)

    def _score(self, clips: Tensor, condition: Condition) -> Tensor:
        scores: Tensor = self.head(self.judge(clips, condition))  # [N, 3 tokens, 1 or 3]
        return scores.diagonal(dim1=1, dim2=2) if scores.shape[-1] == len(PARTS) else scores[..., 0]


def sampled_frames(num_frames: int, fps: float, wanted_fps: float) -> Tensor:
    """Indices of the frames that are looked at: `wanted_fps`, an even number, at least 4 (vision_process.py).

    Raises:
        UserError: the clip is a single frame.
    """
    if num_frames < PAIR:
        raise UserError("VideoReward judges motion: it needs clips of at least 2 frames", where="clip.num_frames")
    most = min(_MOST_FRAMES, num_frames) // PAIR * PAIR
    count = round(min(max(num_frames / fps * wanted_fps, _LEAST_FRAMES), most) / PAIR) * PAIR
    return torch.linspace(0, num_frames - 1, count).round().long()


def last_checkpoint(folder: Path) -> Path:
    """`checkpoint-STEP` with the highest step in a folder, or the folder itself if there is none."""
    steps = [path for path in folder.glob("checkpoint-*") if path.name.rpartition("-")[2].isdecimal()]
    return max(steps, key=lambda path: int(path.name.rpartition("-")[2]), default=folder)


def merge_lora(tensors: Mapping[str, Tensor], scale: float, where: Path) -> dict[str, Tensor]:
    """The model's own names and weights from those of peft: `W + scale * B @ A`.

    Raises:
        UserError: a name is not peft's, or a LoRA is not whole.
    """
    if foreign := sorted(name for name in tensors if not name.startswith(_WRAPPED)):
        raise UserError(f"{foreign[0]} does not begin with {_WRAPPED}, as all its names do", where=str(where))
    own = {name.removeprefix(_WRAPPED): tensor for name, tensor in tensors.items()}
    plain = {name.replace(".base_layer.", "."): tensor for name, tensor in own.items() if ".lora_" not in name}
    layers = {name.rpartition(mark)[0] for name in own for mark in _LORA if mark in name}
    for layer in sorted(layers):
        if missing := [mark for mark in _LORA if layer + mark not in own]:
            raise UserError(f"lacks {layer}{missing[0]} of a LoRA", where=str(where))
        base, down, up = (own[layer + mark] for mark in _LORA)
        if base.shape != (up.shape[0], down.shape[1]) or up.shape[1] != down.shape[0]:
            shapes = ", ".join(str(list(matrix.shape)) for matrix in (base, down, up))
            raise UserError(f"{layer} and its LoRA do not fit: {shapes}", where=str(where))
        plain[f"{layer}.weight"] = (base.float() + scale * up.float() @ down.float()).to(base.dtype)
    return plain
