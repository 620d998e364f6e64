"""Subject consistency: VBench's own loop on transformers' models, gradient, frames chosen, folders refused."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from rats_video.errors import UserError
from rats_video.rewards.reward import build_reward, reward_on_meta
from rats_video.rewards.self_test import self_test
from rats_video.rewards.subject_consistency import (
    SubjectConsistency,
    SubjectConsistencyConfig,
    dino_pixels,
    dino_positions,
)
from rats_video.seeds import seeded
from rats_video.types import ClipSpec

pytestmark = pytest.mark.pipeline

SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


@pytest.fixture(scope="module", params=["vit", "dinov2"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random DINO: as published, the ViT has no pooling layer."""
    from transformers import Dinov2Config, Dinov2Model, ViTConfig, ViTModel

    torch.manual_seed(0)
    model = (
        ViTModel(ViTConfig(**SIZES, patch_size=32), add_pooling_layer=False)
        if request.param == "vit"
        else Dinov2Model(Dinov2Config(**SIZES, patch_size=28, image_size=56))
    )
    with torch.no_grad():  # fresh weights are so small that every image looks the same
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.mul_(8)
    path = tmp_path_factory.mktemp("dino") / request.param
    model.save_pretrained(path)
    return path


def reward_of(folder: Path, **options: Any) -> SubjectConsistency:
    cfg = SubjectConsistencyConfig(kind="subject_consistency", path=str(folder), **options)
    reward = build_reward(cfg, torch.device("cpu"), where="reward")
    assert isinstance(reward, SubjectConsistency)
    return reward


@pytest.fixture(scope="module")
def videos() -> Tensor:
    return torch.rand(2, 4, 3, 48, 72, generator=seeded(1))


def test_score_is_vbench_loop(folder: Path, videos: Tensor) -> None:
    from transformers import AutoModel

    model = AutoModel.from_pretrained(folder)
    resampled = model.embeddings.interpolate_pos_encoding
    model.embeddings.interpolate_pos_encoding = partial(dino_positions, model.embeddings)
    options = {"interpolate_pos_encoding": True} if folder.name == "vit" else {}
    mean, std = (torch.tensor(rgb).view(3, 1, 1) for rgb in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    expected = []
    for clip in videos:
        similarities, seen = [], []
        for frame in clip:
            image = (F.interpolate(frame[None], (224, 336), mode="bilinear") - mean) / std
            with torch.no_grad():
                feature = model(image, **options).last_hidden_state[:, 0]
            if seen:
                pair = [max(0.0, F.cosine_similarity(other, feature).item()) for other in (seen[-1], seen[0])]
                similarities.append(sum(pair) / 2)
            seen.append(feature)
        expected.append(similarities)
    with torch.no_grad():
        scores = reward_of(folder)(videos, ["a", "b"])
    assert scores.frames is not None
    assert scores.clip.max() < 0.995  # else anything would pass
    torch.testing.assert_close(scores.clip, torch.tensor(expected).mean(dim=1), atol=1e-4, rtol=0)
    torch.testing.assert_close(scores.frames[:, 1:], torch.tensor(expected), atol=1e-4, rtol=0)
    assert torch.equal(scores.frames[:, 0], scores.frames[:, 1])
    tokens = torch.zeros(1, 1, SIZES["hidden_size"])
    theirs = dino_positions(model.embeddings, tokens, 224, 336)
    tokens = torch.zeros(1, theirs.shape[1], SIZES["hidden_size"])
    assert (resampled(tokens, 224, 336) - theirs).abs().max() > 1e-3  # transformers' own are others


@pytest.mark.parametrize(
    ("height", "width", "known"),
    [
        (224, 224, [0.84147, -0.7568, -0.9638, 0.99952]),
        (224, 395, [0.84147, -0.9296, -1.09014, 1.1274]),
        (398, 224, [0.84147, -0.80593, -0.83331, 0.87938]),
        (224, 320, [0.84147, -0.9011, -1.04728, 1.0769]),
    ],
)
def test_positions_are_the_originals(height: int, width: int, known: list[float]) -> None:
    """By `interpolate_pos_encoding` of github facebookresearch/dino 7c446df, of the sines of 0, 1, 2 and so on."""
    from transformers import ViTConfig, ViTModel

    model = ViTModel(ViTConfig(**(SIZES | {"hidden_size": 4}), patch_size=16), add_pooling_layer=False)
    model.embeddings.position_embeddings.data = torch.arange(197 * 4.0).sin().view(1, 197, 4)
    patches = (height // 16) * (width // 16)
    table = dino_positions(model.embeddings, torch.zeros(1, 1 + patches, 4), height, width)
    assert table.shape == (1, 1 + patches, 4)
    places = ((0, 1), (1, 0), (patches // 2, 2), (patches, 3))
    assert [table[0, row, column].item() for row, column in places] == pytest.approx(known, abs=1e-5)


def test_a_still_clip_is_wholly_consistent(folder: Path, videos: Tensor) -> None:
    with torch.no_grad():
        still = reward_of(folder, chunk=3)(videos[:, :1].expand_as(videos), ["a", "b"])
    torch.testing.assert_close(still.clip, torch.ones(2), atol=1e-5, rtol=0)


def test_gradient_reaches_every_frame(folder: Path) -> None:
    self_test(reward_of(folder), ClipSpec(4, 32, 32, 8.0), ["a", "b"], where="reward").require_loss()


def test_some_frames(folder: Path) -> None:
    videos = torch.rand(1, 5, 3, 32, 32, generator=seeded(2))
    with torch.no_grad():
        some, alone = reward_of(folder, frames=3)(videos, ["a"]), reward_of(folder)(videos[:, ::2], ["a"])
    torch.testing.assert_close(some.clip, alone.clip, atol=1e-5, rtol=0)
    assert some.frames is not None
    assert alone.frames is not None
    torch.testing.assert_close(some.frames, alone.frames[:, [1, 1, 1, 1, 2]], atol=1e-5, rtol=0)
    with pytest.raises(UserError, match="one is too few"):
        reward_of(folder, frames=1)(videos, ["a"])


def test_short_side_is_224() -> None:
    assert dino_pixels(torch.rand(1, 3, 90, 160)).shape == (1, 3, 224, 398)


def test_plan_knows_it(folder: Path) -> None:
    for path in (folder, Path("nowhere")):
        cfg = SubjectConsistencyConfig(kind="subject_consistency", path=str(path))
        reward = reward_on_meta(cfg, where="reward")
        assert isinstance(reward, SubjectConsistency)
        assert reward(torch.empty(1, 3, 3, 32, 48, device="meta"), ["a"]).clip.shape == (1,)
        if path != folder:
            assert sum(weight.numel() for weight in reward.parameters()) == 85_798_656  # a ViT-B/16


def test_other_folders_are_one_line(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"not a DINO: no readable config\.json in it"):
        reward_of(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": "clip"}))
    with pytest.raises(UserError, match=r"is a 'clip' model, not a DINO \(vit or dinov2\)"):
        reward_of(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config))
    tensors = load_file(folder / "model.safetensors")
    del tensors["layernorm.bias"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"lacks 1 weights of a .*, e\.g\. layernorm\.bias"):
        reward_of(tmp_path)
