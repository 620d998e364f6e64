"""CLIP's prompts: token ids by the original code, for text that its cleaning changes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rats_video.rewards.clip_text import ClipText, cleaned

KNOWN = json.loads((Path(__file__).parents[1] / "fixtures" / "clip_tokens.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """CLIP's, with the part of its vocabulary that the prompts need."""
    from transformers import CLIPTokenizer

    vocab = KNOWN["vocab"] | {"<|startoftext|>": 49406, "<|endoftext|>": 49407}
    return CLIPTokenizer(vocab=vocab, merges=[tuple(pair.split()) for pair in KNOWN["merges"]])


@pytest.mark.parametrize(("prompt", "ids"), KNOWN["prompts"])
def test_tokens_are_the_originals(tokenizer: Any, prompt: str, ids: list[int]) -> None:
    text = ClipText(tokenizer, 77)
    assert text.tokens([prompt]).input_ids.tolist() == [ids]
    assert text.counts([prompt]) == [len(ids)]
    assert ClipText(tokenizer, 5).tokens([prompt]).input_ids.tolist() == [[*ids[:4], 49407]]  # as ViCLIP cuts at 32


def test_without_cleaning_these_are_other_tokens(tokenizer: Any) -> None:
    """Those of PickScore's code, which reads prompts as they are."""
    plain = ClipText(tokenizer, 77, clean=str)
    differ = [prompt for prompt, ids in KNOWN["prompts"] if plain.tokens([prompt]).input_ids.tolist() != [ids]]
    assert differ == [
        "naïve café — 東京の夜景 🌃 Ångström ½ ﬁne",
        "Tom &amp; Jerry &lt;3 cats", "schÃ¶ne GrÃ¼ÃŸe", "it’s a “quoted” {word}", "rock &amp;amp; roll",  # noqa: RUF001
        "ＡＢＣ　１２３！",  # noqa: RUF001
    ]  # fmt: skip


def test_cleaning_leaves_plain_words() -> None:
    assert cleaned("  A Red\n fox ") == "a red fox"
    assert cleaned("") == ""
