"""Prompts as CLIP reads them: cleaned as its authors clean them, then taken apart by its tokenizer."""

from __future__ import annotations

import html
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.nn import functional as F


def cleaned(prompt: str) -> str:
    """The text that the tokenizer is given (github openai/CLIP, clip/simple_tokenizer.py; HPSv2's and ViCLIP's alike).

    Wrongly decoded text, ligatures, curly quotes and full-width letters are mended (ftfy), HTML entities read, twice;
    white space becomes single spaces, and letters small.
    """
    import ftfy

    return " ".join(html.unescape(html.unescape(ftfy.fix_text(prompt))).split()).lower()


@dataclass(frozen=True)
class ClipText:
    """CLIP's tokenizer, and what happens to a prompt before.

    Args:
        tokenizer: CLIP's, as transformers has it.
        limit: tokens that the model reads, with start and end; the rest is cut.
        clean: changes a prompt first; `str` for models that read it as it is.
    """

    tokenizer: Any
    limit: int
    clean: Callable[[str], str] = cleaned

    def tokens(self, prompts: Sequence[str]) -> Any:
        """`input_ids` and `attention_mask` `[B, L]` of the prompts."""
        return self.tokenizer(
            [self.clean(prompt) for prompt in prompts],
            padding=True, truncation=True, max_length=self.limit, return_tensors="pt",
        )  # fmt: skip

    def unit_features(self, model: Any, prompts: Sequence[str]) -> Tensor:
        """Unit features `[B, D]` of the prompts, by transformers' CLIP or CLAP."""
        tokens = self.tokens(prompts).to(model.device)
        features = model.get_text_features(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask)
        return F.normalize(features.pooler_output.float(), dim=-1)

    def counts(self, prompts: Sequence[str]) -> list[int]:
        """Tokens of each prompt with start and end, before any is cut."""
        return [len(self.tokenizer(self.clean(prompt), verbose=False).input_ids) for prompt in prompts]
