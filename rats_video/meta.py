"""Models on the meta device: shapes without memory."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from rats_video.errors import UserError, first_line
from rats_video.reading import DAMAGED

META = torch.device("meta")


def empty_model(kind: Any, config: Mapping[str, Any], *, where: str) -> nn.Module:
    """A diffusers or transformers model of that configuration on the meta device.

    Raises:
        UserError: the class does not take the configuration.
    """
    try:
        with META:
            if hasattr(kind, "from_config"):
                model: nn.Module = kind.from_config(dict(config))
            else:
                model = kind(kind.config_class(**config))
    except DAMAGED as error:
        raise UserError(f"does not fit {kind.__name__}: {first_line(error)}", where=where) from error
    return model.eval()


class LongPrompts:
    """In place of a tokenizer that is not there: every prompt is as long as the model takes."""

    unk_token_id = None

    def __call__(self, prompts: str | Sequence[str], *, max_length: int = 77, **_: Any) -> Any:
        """Ids and mask `[B, max_length]`."""
        from transformers import BatchEncoding

        rows = 1 if isinstance(prompts, str) else len(prompts)
        ids = torch.ones(rows, max_length, dtype=torch.long)
        return BatchEncoding({"input_ids": ids, "attention_mask": torch.ones_like(ids)})

    def apply_chat_template(self, messages: Sequence[Mapping[str, str]], **_: Any) -> str:
        """The last message alone."""
        return messages[-1]["content"]


class CountedTokens:
    """In place of a tokenizer that is not there: special tokens are known, other text has a token for four letters."""

    def __init__(self) -> None:
        self._special: dict[str, int] = {}

    def convert_tokens_to_ids(self, token: str) -> int:
        """The number of a special token."""
        return self._special.setdefault(token, len(self._special) + 1)

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        """As a tokenizer's."""
        pieces = re.split(r"(<\|\w+\|>)", text)
        tokens = (
            [self.convert_tokens_to_ids(piece)] if i % 2 else [0] * -(-len(piece) // 4)
            for i, piece in enumerate(pieces)
        )
        return {"input_ids": [number for piece in tokens for number in piece]}
