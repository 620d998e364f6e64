"""The vision networks of a discriminator: a tiny DINOv2 and CLIP in the published layout, and the embedded stand-in."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import tiny_clip
import torch

from rats_video.distillation.vision import build_vision, vision_on_meta
from rats_video.errors import UserError
from rats_video.methods.vision import DinoClipConfig, WordVisionConfig
from rats_video.rewards.pixels import IMAGENET_MEAN, IMAGENET_STD, normalize

CPU = torch.device("cpu")
PROMPTS = ("a red circle", "a cat")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> DinoClipConfig:
    from transformers import Dinov2Config, Dinov2Model

    folder = tmp_path_factory.mktemp("vision")
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 8, "image_size": 32}
    torch.manual_seed(0)
    Dinov2Model(Dinov2Config(**sizes, mlp_ratio=1)).save_pretrained(folder / "dino")
    tiny_clip.save_clip(folder / "clip", 32, 16)
    return DinoClipConfig(kind="dino_clip", path=str(folder / "dino"), clip=str(folder / "clip"), layers=(0, 2))


def test_maps_are_dinos_hidden_states_and_texts_are_clips(folders: DinoClipConfig) -> None:
    from transformers import CLIPModel, Dinov2Model

    vision = build_vision(folders, CPU)
    frames = torch.rand(2, 3, 16, 24, requires_grad=True)  # its own size, not the model's
    maps = vision.maps(frames)
    dino = Dinov2Model.from_pretrained(folders.path).eval()
    states = dino(normalize(frames, IMAGENET_MEAN, IMAGENET_STD), output_hidden_states=True).hidden_states
    assert [tuple(each.shape) for each in maps] == [(2, 16, 2, 3)] * 2
    for found, layer in zip(maps, (0, 2), strict=True):
        torch.testing.assert_close(found[:, :, 1, 2], states[layer][:, 1 + 3 + 2])  # after the class token, row by row
    (gradient,) = torch.autograd.grad(maps[1].sum(), frames)
    assert float(gradient.abs().max()) > 0
    text = vision.text(PROMPTS)
    clip = CLIPModel.from_pretrained(folders.clip).eval()
    tokens = vision.reader.tokens(PROMPTS)  # type: ignore[union-attr]  # a DinoClip
    wanted = clip.get_text_features(**tokens).pooler_output
    torch.testing.assert_close(text, wanted / wanted.norm(dim=1, keepdim=True))
    assert not any(weight.requires_grad for weight in vision.parameters())


def test_without_weights_it_has_the_same_sizes(folders: DinoClipConfig) -> None:
    empty = vision_on_meta(folders)
    assert (list(empty.widths), empty.text_width) == ([16, 16], 8)
    published = vision_on_meta(DinoClipConfig(kind="dino_clip"))
    assert (list(published.widths), published.text_width) == ([1024] * 8, 768)
    assert sum(weight.numel() for weight in published.dino.parameters()) == pytest.approx(304e6, rel=0.01)  # type: ignore[union-attr]


def test_the_stand_in_sees_shapes_and_reads_their_words() -> None:
    vision = build_vision(WordVisionConfig(kind="word"), CPU)
    maps = vision.maps(torch.rand(2, 3, 32, 32))
    assert [tuple(each.shape[1:]) for each in maps] == [(24, 8, 8), (48, 4, 4), (64, 4, 4)]
    text = vision.text(PROMPTS)
    words = vision.reward.words  # type: ignore[union-attr]  # a WordVision
    assert [word for word, there in zip(words, text[0], strict=True) if there] == ["red", "circle"]
    assert text[1].sum() == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layers": (0, 3)}, r"method.gan.vision.layers: has no layer 3: its last is 2"),
        ({"path": "nowhere"}, r"method.gan.vision.path: .*nowhere"),
        ({"clip": "nowhere"}, r"method.gan.vision.clip: .*nowhere"),
    ],
)
def test_what_is_not_there_is_one_line(folders: DinoClipConfig, change: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        build_vision(folders.model_copy(update=change), CPU)
    assert "\n" not in str(caught.value)


def test_frames_smaller_than_a_patch_and_other_models_are_one_line(folders: DinoClipConfig, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"sees patches of 8 x 8 pixels, more than a frame has .*method.gan=null"):
        build_vision(folders, CPU).maps(torch.rand(1, 3, 4, 4))
    shutil.copytree(folders.clip, tmp_path / "clip")
    with pytest.raises(UserError, match="is a 'clip' model, not a Dinov2Model"):
        build_vision(folders.model_copy(update={"path": str(tmp_path / "clip")}), CPU)
