"""A latent reward of the tiny model, and tiny Qwen2-VL rewards; other tests have a reward of their own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from qwen_judges import Judge, Made, load

from rats_video.backbones.wan import WanBackbone
from rats_video.distillation.run_rewards import latent_space
from rats_video.distillation.settings import DistillConfig
from rats_video.rewards.latent import LatentReward, LatentSpace
from rats_video.rewards.word import WordReward, WordRewardConfig
from rats_video.types import ClipSpec

MakeConfig = Callable[..., DistillConfig]
Command = Callable[..., Any]

SHAPE = {"width": 8, "blocks": 2, "coarse": 2}


@pytest.fixture
def space(tiny_wan: Path, backbone: WanBackbone, clip: ClipSpec) -> LatentSpace:
    return latent_space(tiny_wan, backbone, clip)


@pytest.fixture
def reward(space: LatentSpace, reward_folders: tuple[Path, Path]) -> LatentReward:
    torch.manual_seed(2)
    imitated = WordRewardConfig(path=str(reward_folders[0]))
    made = LatentReward(space, imitated, WordReward.load(reward_folders[0]), **SHAPE)
    for block in made.sketch.blocks:
        torch.nn.init.normal_(block.time.weight, std=0.1)  # as if trained: at first blocks change nothing
    return made.requires_grad_(requires_grad=False).eval()


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Made]:
    import tiny_qwen

    root = tmp_path_factory.mktemp("qwen")
    align, hpsv3 = root / "VideoReward", root / "HPSv3"
    tokenizer = align / "checkpoint-100" / "tokenizer"
    return {
        "video_align": Made(align, tokenizer, *tiny_qwen.build_video_align(align)),
        "hpsv3": Made(hpsv3, root / "base", *tiny_qwen.build_hpsv3(hpsv3, root / "base")),
    }


@pytest.fixture(scope="module")
def rewards(made: dict[str, Made]) -> dict[str, Judge]:
    return {kind: load(one, kind) for kind, one in made.items()}
