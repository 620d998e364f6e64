"""Tiny random CLIP and SigLIP models, and a CLIP tokenizer of letters."""

from __future__ import annotations

import string
from pathlib import Path

import torch

TOWER = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
VOCABULARY = 54


def save_tokenizer(folder: Path) -> None:
    """One that takes words apart into letters; the last two of its tokens start and end a prompt."""
    from transformers import CLIPTokenizer

    letters = string.ascii_lowercase
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    CLIPTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[]).save_pretrained(folder)


def save_clip(folder: Path, size: int, length: int) -> None:
    """A CLIPModel for images of `size` pixels and prompts of `length` tokens, with its tokenizer."""
    from transformers import CLIPConfig, CLIPModel

    tokens = {"vocab_size": VOCABULARY, "bos_token_id": 52, "eos_token_id": 53, "pad_token_id": 53}
    config = CLIPConfig(
        text_config={**TOWER, **tokens, "max_position_embeddings": length},
        vision_config={**TOWER, "image_size": size, "patch_size": 8},
        projection_dim=8,
    )
    torch.manual_seed(0)
    model = CLIPModel(config)
    with torch.no_grad():  # fresh weights are so small that every image looks the same
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.mul_(2)
    model.save_pretrained(folder)
    save_tokenizer(folder)


def save_siglip(folder: Path, size: int) -> None:
    """A SiglipModel for images of `size` pixels."""
    from transformers import SiglipConfig, SiglipModel

    text = {**TOWER, "vocab_size": VOCABULARY, "bos_token_id": 52, "eos_token_id": 53}
    config = SiglipConfig(text_config=text, vision_config={**TOWER, "image_size": size, "patch_size": 8})
    torch.manual_seed(0)
    SiglipModel(config).save_pretrained(folder)
