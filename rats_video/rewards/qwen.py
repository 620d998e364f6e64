"""Rewards that are a Qwen2-VL: it is shown pixels and a fixed question, and read at special tokens of that question.

transformers' own path computes 3-D rotary positions. The published rewards call the language model with embeddings
alone: they were trained, and are run, with plain sequential positions. The logits over words are never computed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from einops import rearrange
from pydantic import Field
from torch import Tensor, nn

from rats_video.assets import ASSETS
from rats_video.config.fields import PositiveInt
from rats_video.errors import UserError
from rats_video.meta import empty_model
from rats_video.reading import DAMAGED, read_sizes
from rats_video.rewards.base import BaseRewardConfig
from rats_video.rewards.files import check_keys
from rats_video.rewards.prompted import Condition
from rats_video.rewards.qwen_vision import MERGE, PixelRule, patch_rows


class Qwen2VLConfig(BaseRewardConfig):
    """Settings of a reward that is a Qwen2-VL."""

    path: str = Field(description="folder of the reward's weights, in safetensors")
    chunk: PositiveInt = Field(1, description="clips or frames a forward; they are recomputed in backward")
    dtype: Literal["float32", "bfloat16"] = Field("bfloat16", description="of the model's weights; its head is float32")
    round_pixels: bool = Field(
        True,  # noqa: FBT003
        description="round resized frames to whole steps of 1/255, as in the published code; gradient passes through",
    )


_OPENING = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<|vision_start|>"
_CLOSING = "<|im_end|>\n<|im_start|>assistant\n"
_LOGITS, _HEAD = "lm_head.", "rm_head."  # of a checkpoint; the first is not used

_ROPE = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}
QWEN2_VL_2B = {
    "text_config": {"hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12,
                    "num_key_value_heads": 2, "vocab_size": 151936, "rms_norm_eps": 1e-6, "rope_parameters": _ROPE},
    "vision_config": {"hidden_size": 1536},
}  # fmt: skip
QWEN2_VL_7B = {
    "text_config": {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28,
                    "num_key_value_heads": 4, "vocab_size": 152064, "rms_norm_eps": 1e-6, "rope_parameters": _ROPE},
    "vision_config": {"hidden_size": 3584},
}  # fmt: skip


@dataclass(frozen=True)
class Question:
    """The text beside the pixels.

    Args:
        file: the published text, in rats_video/assets; the prompt replaces `{text_prompt}`.
        answers: the special tokens at which scores are read, in that order.
    """

    file: str
    answers: tuple[str, ...]

    def text(self, prompt: str) -> str:
        """The text after the pixels; raises UserError for a prompt with one of the special tokens."""
        for token in self.answers:
            if token in prompt:
                raise UserError(f"{prompt!r} holds {token}, at which this reward is read", where="prompt")
        template = (ASSETS / self.file).read_text(encoding="utf-8")
        return "<|vision_end|>" + template.format(text_prompt=prompt) + _CLOSING


class QwenJudge(nn.Module):
    """Qwen2-VL's hidden states at the answers to a question about clips.

    Args:
        model: a `Qwen2VLModel`: vision tower and language model, no head.
        tokenizer: its tokenizer, which knows the question's special tokens.
        question: the text beside the pixels.
        rule: sizes that frames are resized to.
    """

    def __init__(self, model: Any, tokenizer: Any, question: Question, rule: PixelRule) -> None:
        super().__init__()
        self.model = model.requires_grad_(requires_grad=False).eval()
        self.tokenizer = tokenizer
        self.question = question
        self.rule = rule
        self._opening = self._ids(_OPENING)

    def read(self, prompts: Sequence[str]) -> Condition:
        """Tokens `[B, L]` after the pixels, and the places of the answers among them, `[B, answers]`.

        Shorter prompts are padded at the end, which no earlier token sees: attention is causal.
        """
        texts = [self._ids(self.question.text(prompt)) for prompt in prompts]
        answers = [self.tokenizer.convert_tokens_to_ids(token) for token in self.question.answers]
        length = max(map(len, texts))
        return {
            "text": self._tensor([text + [0] * (length - len(text)) for text in texts]),
            "answers": self._tensor([[text.index(answer) for answer in answers] for text in texts]),
        }

    def forward(self, clips: Tensor, condition: Condition) -> Tensor:
        """Hidden states `[N, answers, D]`, float32, for clips `[N, T, 3, height, width]` in [0, 1]."""
        rows, grid = patch_rows(clips, self.rule)
        seen = self._see(rows, grid, len(clips))
        embed, language = self.model.language_model.embed_tokens, self.model.language_model
        opening = embed(self._tensor([self._opening])).expand(len(clips), -1, -1)
        embeds = torch.cat([opening, seen.to(opening.dtype), embed(condition["text"])], dim=1)
        positions = torch.arange(embeds.shape[1], device=embeds.device).expand(3, len(clips), -1)
        hidden = language(inputs_embeds=embeds, position_ids=positions, use_cache=False).last_hidden_state
        places = condition["answers"] + opening.shape[1] + seen.shape[1]
        states: Tensor = hidden.gather(1, places[..., None].expand(-1, -1, hidden.shape[-1]))
        return states.float()

    def _see(self, rows: Tensor, grid: tuple[int, int, int], num_clips: int) -> Tensor:
        pairs, height, width = grid
        index = torch.arange(height * width, device=rows.device).view(height, width)
        index = rearrange(index, "(h m) (w n) -> (h w m n)", m=MERGE, n=MERGE).repeat(num_clips * pairs)
        seen = self.model.visual(
            rows.to(self.model.dtype),
            grid_thw=torch.tensor([grid] * num_clips),  # on the CPU, where its numbers are read
            position_ids=torch.stack([index // width, index % width], dim=-1),
        )
        features: Tensor = seen.pooler_output.unflatten(0, (num_clips, -1))
        return features

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _tensor(self, rows: list[list[int]]) -> Tensor:
        return torch.tensor(rows, device=self.model.device)


def qwen_config(folder: Path, published: Mapping[str, Any]) -> dict[str, Any]:
    """Sizes of the network: from the `config.json` in its folder if that is a Qwen2-VL's, else the published ones."""
    file = folder / "config.json"
    try:
        config: dict[str, Any] = read_sizes(file)
        return config if config["model_type"] == "qwen2_vl" else dict(published)
    except FileNotFoundError:
        return dict(published)
    except DAMAGED as error:
        raise UserError("is no readable configuration of a model", where=str(file)) from error


def empty_qwen(cfg: Qwen2VLConfig, published: Mapping[str, Any]) -> tuple[Any, int]:
    """A `Qwen2VLModel` without weights, and the width of its hidden states."""
    from transformers import Qwen2VLModel

    model: Any = empty_model(Qwen2VLModel, qwen_config(Path(cfg.path).expanduser(), published), where=cfg.path)
    return model.to(getattr(torch, cfg.dtype)), int(model.config.text_config.hidden_size)


def load_qwen(tensors: Mapping[str, Tensor], config: Mapping[str, Any], dtype: torch.dtype, where: Path) -> Any:
    """A `Qwen2VLModel` of these weights; raises UserError unless they are its own to the last key and shape.

    Args:
        tensors: by Qwen2-VL's names, today's or those up to transformers 4.51 (`visual.*`, `model.layers.*`).
        config: its sizes; the number of words comes from the weights, since special tokens change it.
        dtype: to convert them to.
        where: the checkpoint, for messages.
    """
    from accelerate import init_empty_weights
    from huggingface_hub.errors import StrictDataclassError
    from transformers import Qwen2VLConfig, Qwen2VLModel

    named = {
        re.sub(r"^model\.(?!visual\.|language_model\.)", "language_model.", name).removeprefix("model."): tensor
        for name, tensor in tensors.items()
        if not name.startswith((_LOGITS, _HEAD))
    }
    try:
        sizes = Qwen2VLConfig(**config)
    except (StrictDataclassError, TypeError, ValueError, KeyError, AttributeError) as error:
        what = f"not the sizes of a Qwen2-VL: {' '.join(str(error).split())}"
        raise UserError(what, where=str(where), fix="see config.json") from error
    sizes.text_config.vocab_size = len(named.get("language_model.embed_tokens.weight", ()))
    with init_empty_weights(include_buffers=False):  # the frequencies of rotary positions are in no checkpoint
        model = Qwen2VLModel(sizes)
    check_keys(named, model.state_dict(), where=where)
    model.load_state_dict({name: tensor.to(dtype) for name, tensor in named.items()}, assign=True)
    return model


def load_head(tensors: Mapping[str, Tensor], head: nn.Module, where: Path) -> None:
    """Fill a head, in float32, from its part of a checkpoint; raises UserError unless that fits to the last key."""
    found = {name: tensor for name, tensor in tensors.items() if name.startswith(_HEAD)}
    check_keys(found, {f"{_HEAD}{name}": weight for name, weight in head.state_dict().items()}, where=where)
    head.load_state_dict({name.removeprefix(_HEAD): tensor for name, tensor in found.items()})
