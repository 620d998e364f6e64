"""Tiny random VideoReward and HPSv3 checkpoints in the published layout, and the model that each one stands for."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from PIL import Image
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import Tensor, nn
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessorPil,
)

from rats_video.assets import ASSETS
from rats_video.rewards.qwen_vision import PixelRule
from rats_video.seeds import seeded

CLIP = PixelRule(128 * 28 * 28, 448 * 448)  # the published rules
IMAGE = PixelRule(256 * 28 * 28, 256 * 28 * 28)
WIDTH = 32
INFERENCE = {"VQ_mean": 0.5, "VQ_std": 2.0, "MQ_mean": -0.25, "MQ_std": 0.5, "TA_mean": 1.0, "TA_std": 4.0}
MARKS = ("im_start", "im_end", "vision_start", "vision_end", "image_pad", "video_pad")
PUBLISHED = {"model.visual.": "visual.", "model.language_model.": "model."}  # names up to transformers 4.51


def build_tokenizer(folder: Path, *extra: str) -> Any:
    texts = [(ASSETS / name).read_text() for name in ("video_align.txt", "hpsv3.txt")]
    words = sorted({word for text in texts for word in re.findall(r"\w+|[^\w\s]+", text)} | set("abcdefgh"))
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(["<unk>", *words])}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")
    fast.add_tokens([f"<|{mark}|>" for mark in MARKS] + list(extra), special_tokens=True)
    fast.save_pretrained(folder)
    return fast


def build_model(words: int) -> Qwen2VLForConditionalGeneration:
    text = {
        "hidden_size": WIDTH, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 1, "vocab_size": words, "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]},
    }  # fmt: skip
    vision = {"depth": 1, "embed_dim": 16, "hidden_size": WIDTH, "num_heads": 2, "mlp_ratio": 2}
    model = Qwen2VLForConditionalGeneration(Qwen2VLConfig(text_config=text, vision_config=vision)).eval()
    with torch.no_grad():  # fresh weights are so small that nothing that is shown or said matters
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.mul_(6)
            else:
                weight.add_(0.1 * torch.randn_like(weight))
        model.model.language_model.embed_tokens.weight.mul_(5)
        model.model.visual.blocks[0].attn.qkv.weight.mul_(3)  # else attention is even, wherever patches are
    return model


def build_video_align(folder: Path, outputs: int = 1) -> tuple[Qwen2VLForConditionalGeneration, Tensor]:
    """Write it, LoRA unmerged, and return the model merged by peft and the weight of its head."""
    torch.manual_seed(0)
    saved = folder / "checkpoint-100"
    words = build_tokenizer(saved / "tokenizer", "<|VQ_reward|>", "<|MQ_reward|>", "<|TA_reward|>")
    model, head = build_model(len(words)), torch.randn(outputs, WIDTH)
    model.config.save_pretrained(folder)
    layers = [
        name for name, part in model.named_modules() if isinstance(part, nn.Linear) and "language_model.layers" in name
    ]
    wrapped = get_peft_model(model, LoraConfig(r=4, lora_alpha=6, target_modules=layers))
    for name, weight in wrapped.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(weight, std=0.3)
    tensors = {
        re.sub("^base_model.model.(model.visual.|model.language_model.)", _published, name): tensor.clone()
        for name, tensor in wrapped.state_dict().items()
    }
    save_file(tensors | {"base_model.model.rm_head.weight": head}, saved / "model.safetensors")
    (folder / "model_config.json").write_text(json.dumps({
        "data_config": {"max_frame_pixels": 150_000, "fps": 2.0},
        "peft_lora_config": {"lora_r": 4, "lora_alpha": 6, "use_rslora": False},
        "inference_config": INFERENCE,
    }))  # fmt: skip
    return wrapped.merge_and_unload(), head


def build_hpsv3(folder: Path, tokenizer: Path) -> tuple[Qwen2VLForConditionalGeneration, nn.Module]:
    """Write it and the tokenizer of its base, which lacks the answer's token; return the model and its head."""
    torch.manual_seed(1)
    folder.mkdir()
    model = build_model(len(build_tokenizer(tokenizer)) + 1)
    head = nn.Sequential(
        nn.Linear(WIDTH, 1024), nn.ReLU(), nn.Dropout(0.05), nn.Linear(1024, 16), nn.ReLU(), nn.Linear(16, 2)
    ).eval()
    model.config.save_pretrained(folder)
    tensors = {
        re.sub("^(model.visual.|model.language_model.)", lambda found: PUBLISHED[found[0]], name): tensor.clone()
        for name, tensor in model.state_dict().items()
    }
    save_file(tensors | {f"rm_head.{name}": t for name, t in head.state_dict().items()}, folder / "HPSv3.safetensors")
    return model, head


def _published(found: re.Match[str]) -> str:
    return f"base_model.model.{PUBLISHED[found[1]]}"


def steps(*shape: int, seed: int = 1) -> Tensor:
    """Smooth clips in whole steps of 1/255, as PIL has them."""
    coarse = torch.rand(shape[0] * shape[1], 3, 5, 6, generator=seeded(seed))
    frames = torch.nn.functional.interpolate(coarse, shape[-2:], mode="bilinear")
    return ((frames * 255).round() / 255).unflatten(0, shape[:2])


def processed(frames: Tensor, rule: PixelRule) -> tuple[Tensor, Tensor]:
    """Rows `[N, patches, 3, 2, 14, 14]` and grids by transformers, of frames `[N, 3, height, width]`."""
    images = [Image.fromarray((f * 255).round().byte().permute(1, 2, 0).numpy()) for f in frames]
    size = {"shortest_edge": rule.least, "longest_edge": rule.most}
    found = Qwen2VLImageProcessorPil(size=size)(images, return_tensors="pt")
    return found.pixel_values.unflatten(0, (len(images), -1)).unflatten(2, (3, 2, 14, 14)), found.image_grid_thw
