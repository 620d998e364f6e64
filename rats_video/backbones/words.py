"""The parts of a prompt that a tokenizer does not take in."""

from __future__ import annotations

from typing import Any

_STRANGE = "\ue000"  # of the private use area: in no vocabulary


def unknown_words(tokenizer: Any, prompt: str) -> list[str]:
    """Words of the prompt that a tokenizer of whole words does not know; one of subwords spells them."""
    if type(tokenizer.backend_tokenizer.model).__name__ != "WordLevel":
        return []
    unknown = tokenizer.unk_token_id
    return [word for word in prompt.split() if unknown in tokenizer(word, add_special_tokens=False).input_ids]


def known_words(tokenizer: Any) -> list[str]:
    """All words of a tokenizer of whole words, in order; none of one of subwords."""
    if type(tokenizer.backend_tokenizer.model).__name__ != "WordLevel":
        return []
    return sorted(set(tokenizer.get_vocab()) - set(tokenizer.all_special_tokens))


def truncation_note(tokenizer: Any, prompt: str, limit: int) -> str:
    """The loss where `limit` tokens of a prompt are read, as a clause for a message; or nothing."""
    ids = tokenizer(prompt, verbose=False).input_ids
    if len(ids) > limit:
        return f"longer than the {limit} tokens this model reads"
    return "written with characters this model does not know" if unknown_id(tokenizer) in ids else ""


def unknown_id(tokenizer: Any) -> int | None:
    """The id that an unknown character becomes, or None where every character can be spelled.

    The model that splits words is asked: `unk_token_id` is another for UMT5, whose class numbers it by T5's rule.
    """
    pieces = tokenizer.backend_tokenizer.model.tokenize(_STRANGE)
    return pieces[0].id if len(pieces) == 1 else None


def loses_spaces(tokenizer: Any) -> bool:
    """True if words run together: a byte-level tokenizer that is taken for a SentencePiece one drops every space."""
    return bool(tokenizer("a red circle").input_ids == tokenizer("aredcircle").input_ids)
