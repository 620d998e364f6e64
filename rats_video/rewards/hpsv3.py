"""HPSv3: people's preference of a frame, by Qwen2-VL-7B with a small head (github MizzenAI/HPSv3, MIT)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from rats_video.meta import META, CountedTokens
from rats_video.rewards.base import RewardContext, WeightsFolder
from rats_video.rewards.files import load_checkpoint_tensors, load_tokenizer
from rats_video.rewards.frames import FrameChoice, FrameReward, FrameRewardConfig
from rats_video.rewards.prompted import Condition
from rats_video.rewards.qwen import (
    QWEN2_VL_7B,
    Question,
    Qwen2VLConfig,
    QwenJudge,
    empty_qwen,
    load_head,
    load_qwen,
    qwen_config,
)
from rats_video.rewards.qwen_vision import PixelRule


class HPSv3Config(Qwen2VLConfig, FrameRewardConfig):
    """People's preference and fit to the prompt (HPSv3, arXiv 2508.03789): mean of a normal distribution, 0 to 15."""

    per = "frame"
    source = "MizzenAI/HPSv3"

    kind: Literal["hpsv3"]
    path: WeightsFolder = "models/HPSv3"
    tokenizer: str = Field("models/Qwen2-VL-7B-Instruct", description="folder of the tokenizer of Qwen2-VL")
    frames: FrameChoice = Field(
        4, description="score that many, evenly spaced from first to last; null = all; or {kind: window or ends}"
    )

    def build(self, context: RewardContext) -> HPSv3Reward:
        """Load it; raises UserError if a folder does not hold what it should, whole and in safetensors."""
        folder, words = self.folder(context.where, "path"), self.folder(context.where, "tokenizer")
        tensors = load_checkpoint_tensors(folder)
        model = load_qwen(tensors, qwen_config(folder, QWEN2_VL_7B), getattr(torch, self.dtype), folder)
        head = hpsv3_head(model.config.text_config.hidden_size)
        load_head(tensors, head, folder)
        fix = "give the folder of Qwen/Qwen2-VL-7B-Instruct as `tokenizer`"
        tokenizer = load_tokenizer(words, model.config.text_config.vocab_size, HPSV3.answers, fix=fix)
        return HPSv3Reward(model, head, tokenizer, self).to(context.device)

    def on_meta(self, context: RewardContext) -> HPSv3Reward:  # noqa: ARG002
        """The same without weights."""
        model, width = empty_qwen(self, QWEN2_VL_7B)
        with META:
            return HPSv3Reward(model, hpsv3_head(width), CountedTokens(), self)


HPSV3 = Question("hpsv3.txt", ("<|Reward|>",))  # hpsv3/dataset/data_collator_qwen.py
_PIXELS = 256 * 28 * 28  # hpsv3/inference.py: at least and at most


class HPSv3Reward(FrameReward):
    """`mu` of HPSv3's normal distribution, for each scored frame.

    Args:
        model: a `Qwen2VLModel`.
        head: from its hidden state at the answer to mu and sigma (`hpsv3_head`).
        tokenizer: Qwen2-VL's, with the answer's token.
        cfg: which frames are scored, and how many at a time.
    """

    def __init__(self, model: Any, head: nn.Module, tokenizer: Any, cfg: HPSv3Config) -> None:
        super().__init__(cfg)
        self.judge = QwenJudge(model, tokenizer, HPSV3, PixelRule(_PIXELS, _PIXELS, cfg.round_pixels))
        self.head = head.requires_grad_(requires_grad=False).eval()

    def condition(self, prompts: Sequence[str]) -> Condition:
        """The question with each prompt in it, as tokens."""
        return self.judge.read(prompts)

    def check_prompts(self, prompts: Sequence[str]) -> None:
        """Raise UserError for a prompt that holds the answer's token."""
        self.judge.read(prompts)

    def score_frames(self, frames: Tensor, condition: Condition) -> Tensor:
        """Scores `[N]` of frames `[N, 3, height, width]` in [0, 1]."""
        scores: Tensor = self.head(self.judge(frames[:, None], condition))[:, 0, 0]
        return scores


def hpsv3_head(width: int) -> nn.Module:
    """Hidden states `[..., width]` to mu and sigma `[..., 2]` ("ranknet" in hpsv3/model/qwen2vl_trainer.py)."""
    return nn.Sequential(
        nn.Linear(width, 1024), nn.ReLU(), nn.Dropout(0.05), nn.Linear(1024, 16), nn.ReLU(), nn.Linear(16, 2)
    )
