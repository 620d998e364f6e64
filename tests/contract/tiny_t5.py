"""A T5 tokenizer of a few words and a random encoder, as LTX-Video and CogVideoX take them."""

from __future__ import annotations

from typing import Any

from transformers import T5Config, T5EncoderModel, T5Tokenizer

WORDS = ("a", "fast", "slow", "red", "green", "circle", "square", "moving", "left", "on", "gray", "background")


def tiny_t5(width: int) -> tuple[Any, Any]:
    """Tokenizer and encoder."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -9.0), *((f"▁{word}", -2.0) for word in WORDS)]
    tokenizer = T5Tokenizer(vocab=pieces, extra_ids=0)
    config = T5Config(
        vocab_size=len(tokenizer), d_model=width, d_kv=width // 2, d_ff=2 * width, num_layers=1, num_heads=2,
        dropout_rate=0.0,
    )  # fmt: skip
    return tokenizer, T5EncoderModel(config)
