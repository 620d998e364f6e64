"""The parts of a prompt that a tokenizer does not take in."""

from __future__ import annotations

from typing import Any


def unknown_words(tokenizer: Any, prompt: str) -> list[str]:
    """Words of the prompt that a tokenizer of whole words does not know; one of subwords spells them."""
    if type(tokenizer.backend_tokenizer.model).__name__ != "WordLevel":
        return []
    unknown = tokenizer.unk_token_id
    return [word for word in prompt.split() if unknown in tokenizer(word, add_special_tokens=False).input_ids]


def truncation_note(tokenizer: Any, prompt: str, limit: int) -> str:
    """The loss where `limit` tokens of a prompt are read, as a clause for a message; or nothing."""
    ids = tokenizer(prompt, verbose=False).input_ids
    if len(ids) > limit:
        return f"longer than the {limit} tokens this model reads"
    return "written with characters this model does not know" if tokenizer.unk_token_id in ids else ""
