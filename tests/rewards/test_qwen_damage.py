"""Both Qwen2-VL rewards: damaged downloads, and what cannot be scored, are one line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_qwen
import torch
from qwen_judges import CPU, SPEC, Judge, Made, load
from safetensors.torch import load_file, save_file
from torch import Tensor

from rats_video.errors import UserError
from rats_video.rewards.reward import build_reward
from rats_video.rewards.video_align import (
    VideoAlignConfig,
    VideoAlignReward,
)

pytestmark = pytest.mark.pipeline

Damage = Callable[[dict[str, Tensor]], dict[str, Tensor]]


def without(part: str) -> Damage:
    return lambda tensors: {name: tensor for name, tensor in tensors.items() if part not in name}


def renamed(old: str, new: str) -> Damage:
    return lambda tensors: {name.replace(old, new): tensor for name, tensor in tensors.items()}


def reshaped(part: str) -> Damage:
    return lambda tensors: {n: torch.zeros(5, 7) if part in n else tensor for n, tensor in tensors.items()}


LAYER = "base_model.model.model.layers.0.mlp.up_proj"


@pytest.mark.parametrize(
    ("kind", "damage", "line"),
    [
        (
            "hpsv3",
            without("layers.1.mlp.up_proj"),
            "lacks 1 of 45 tensors, the first is language_model.layers.1.mlp.up",
        ),
        (
            "hpsv3",
            renamed("visual.merger.ln_q", "visual.merger.norm"),
            "lacks 2 of 45 tensors, the first is visual.mer",
        ),
        ("hpsv3", lambda tensors: tensors | {"extra": torch.ones(1)}, "holds 1 tensors too many, the first is extra"),
        ("hpsv3", reshaped("model.norm.weight"), "language_model.norm.weight is [5, 7], must be [32]"),
        ("hpsv3", without("rm_head.5.bias"), "lacks 1 of 6 tensors, the first is rm_head.5.bias"),
        ("hpsv3", reshaped("rm_head.0.weight"), "rm_head.0.weight is [5, 7], must be [1024, 32]"),
        ("hpsv3", without("embed_tokens"), "lacks 1 of 45 tensors, the first is language_model.embed_tokens.weight"),
        ("video_align", without("rm_head"), "lacks 1 of 1 tensors, the first is rm_head.weight"),
        ("video_align", reshaped("rm_head"), "rm_head.weight is [5, 7], must be [1, 32]"),
        ("video_align", without(f"{LAYER}.lora_A"), "lacks model.layers.0.mlp.up_proj.lora_A.default.weight of a LoRA"),
        ("video_align", without(f"{LAYER}.base_layer"), "lacks model.layers.0.mlp.up_proj.base_layer.weight of a LoRA"),
        ("video_align", without(f"{LAYER}.lora_"), "lacks model.layers.0.mlp.up_proj.lora_A.default.weight of a LoRA"),
        (
            "video_align",
            without(LAYER),
            "lacks 1 of 45 tensors, the first is language_model.layers.0.mlp.up_proj.weigh",
        ),
        (
            "video_align",
            reshaped(f"{LAYER}.lora_B"),
            "model.layers.0.mlp.up_proj and its LoRA do not fit: [48, 32], [4",
        ),
        (
            "video_align",
            renamed("base_model.", ""),
            "model.lm_head.weight does not begin with base_model.model., as al",
        ),
    ],
)
def test_damaged_weights_are_one_line(
    made: dict[str, Made], tmp_path: Path, kind: str, damage: Damage, line: str
) -> None:
    one, folder = made[kind], tmp_path / "copy"
    shutil.copytree(one.folder, folder)
    (file,) = folder.rglob("*.safetensors")
    save_file({name: tensor.clone() for name, tensor in damage(load_file(file)).items()}, file)
    with pytest.raises(UserError) as caught:
        load(Made(folder, one.tokenizer, None, None), kind)
    where = folder if kind == "hpsv3" else folder / "checkpoint-100"
    assert str(caught.value).startswith(f"{where}: {line}")
    assert len(str(caught.value).splitlines()) == 1


def edit(file: str, change: Callable[[Any], Any]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        content = json.loads((folder / file).read_text())
        change(content)
        (folder / file).write_text(json.dumps(content))

    return apply


def pickled(folder: Path) -> None:
    (file,) = folder.rglob("*.safetensors")
    file.rename(file.with_suffix(".pth"))


def other_words(folder: Path) -> None:
    shutil.rmtree(folder / "checkpoint-100/tokenizer")
    tiny_qwen.build_tokenizer(folder / "checkpoint-100/tokenizer", "<|VQ|>", "<|MQ_reward|>", "<|TA_reward|>")


@pytest.mark.parametrize(
    ("kind", "damage", "line"),
    [
        ("hpsv3", pickled, ": only has pickled weights, which can run code when they are loaded (rats-video rewards"),
        ("video_align", pickled, "/checkpoint-100: only has pickled weights, which can run code when they are loaded"),
        ("video_align", lambda folder: (folder / "model_config.json").unlink(), "/model_config.json: not VideoReward"),
        ("video_align", edit("model_config.json", lambda c: c["inference_config"].pop("MQ_std")),
         "/model_config.json: not VideoReward's settings: it has no 'MQ_std'"),
        ("video_align", edit("model_config.json", lambda c: c["peft_lora_config"].update(lora_r=0)),
         "/model_config.json: not VideoReward's settings: "),
        ("video_align", lambda folder: shutil.rmtree(folder / "checkpoint-100/tokenizer"),
         "/checkpoint-100/tokenizer: no tokenizer in it (give a whole download of KlingTeam/VideoReward)"),
        ("video_align", lambda folder: tiny_qwen.build_tokenizer(folder / "checkpoint-100/tokenizer"),
         "/checkpoint-100/tokenizer: its tokenizer has 333 tokens, the model 336 (give a whole download of Kling"),
        ("video_align", other_words, "/checkpoint-100/tokenizer: its tokenizer does not know <|VQ_reward|> (give"),
        ("hpsv3", lambda folder: (folder / "config.json").write_text("{"), "/config.json: is no readable"),
        ("hpsv3", edit("config.json", lambda c: c["text_config"].update(hidden_size="wide")),
         ": not the sizes of a Qwen2-VL: "),
    ],
)  # fmt: skip
def test_damaged_folders_are_one_line(
    made: dict[str, Made], tmp_path: Path, kind: str, damage: Callable[[Path], None], line: str
) -> None:
    one, folder = made[kind], tmp_path / "copy"
    shutil.copytree(one.folder, folder)
    damage(folder)
    with pytest.raises(UserError) as caught:
        load(Made(folder, one.tokenizer, None, None), kind)
    assert str(caught.value).startswith(f"{folder}{line}")
    assert len(str(caught.value).splitlines()) == 1


def test_what_cannot_be_scored_is_one_line(made: dict[str, Made], rewards: dict[str, Judge]) -> None:
    with pytest.raises(UserError, match=r"^prompt: 'a <\|MQ_reward\|>' holds <\|MQ_reward\|>, at which this reward"):
        rewards["video_align"].check_prompts(["a b", "a <|MQ_reward|>"])
    with pytest.raises(UserError, match="holds"):
        rewards["hpsv3"].check_prompts(["<|Reward|>"])
    with pytest.raises(UserError, match=r"^clip\.num_frames: VideoReward judges motion: it needs clips of at least 2"):
        rewards["video_align"](torch.rand(1, 1, 3, 56, 84), ["a"])
    cfg = VideoAlignConfig(kind="video_align", path=str(made["video_align"].folder))
    with pytest.raises(UserError, match=r"^heldout\.fps: frames a second of the clips are not known here \(set it\)"):
        build_reward(cfg, CPU, where="heldout")
    known = build_reward(cfg.model_copy(update={"fps": 2.0}), CPU, where="heldout", clip=SPEC)
    assert isinstance(known, VideoAlignReward)
    assert known.looks_at(7).tolist() == [0, 1, 2, 4, 5, 6]
