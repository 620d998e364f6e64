"""HPSv2.1: a checkpoint in open_clip's layout scores as open_clip's own network does on the published pixels."""

from __future__ import annotations

import json
import shutil
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_clip import VOCABULARY, save_tokenizer
from torch import Tensor, nn

from rats_video.assets import PICKLED, resolve_folder
from rats_video.errors import UserError
from rats_video.planning.judge import reward_on_meta
from rats_video.planning.memory_tracker import no_workspace
from rats_video.planning.trace import trace_reward
from rats_video.rewards.clip_score import ClipReward
from rats_video.rewards.hpsv2 import HPSv2Config, hps_pixels
from rats_video.rewards.reward import build_reward, check_reward_prompts
from rats_video.seeds import seeded

pytestmark = pytest.mark.pipeline

PROMPTS = ["a red dog runs", "two blue birds"]
SIZE, PATCH, LENGTH, WIDTH, EMBED = 32, 8, 20, 16, 8
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
CPU = torch.device("cpu")


class Block(nn.Module):
    """A residual block with open_clip's names."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.mlp = nn.Sequential(OrderedDict([
            ("c_fc", nn.Linear(width, 2 * width)), ("gelu", nn.GELU()), ("c_proj", nn.Linear(2 * width, width)),
        ]))  # fmt: skip

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, need_weights=False, attn_mask=mask)[0]
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.resblocks = nn.ModuleList(Block(width, heads) for _ in range(2))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        for block in self.resblocks:
            x = block(x, mask)
        return x


class Visual(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, PATCH, PATCH, bias=False)
        self.class_embedding = nn.Parameter(torch.randn(width))
        self.positional_embedding = nn.Parameter(torch.randn((SIZE // PATCH) ** 2 + 1, width))
        self.ln_pre, self.ln_post = nn.LayerNorm(width), nn.LayerNorm(width)
        self.transformer = Transformer(width, heads)
        self.proj = nn.Parameter(torch.randn(width, EMBED))

    def forward(self, images: Tensor) -> Tensor:
        patches = self.conv1(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_embedding.expand(len(images), 1, -1), patches], dim=1) + self.positional_embedding
        return self.ln_post(self.transformer(self.ln_pre(x))[:, 0]) @ self.proj


class OpenClip(nn.Module):
    """open_clip's CLIP, src/open_clip/model.py and transformer.py, written down again."""

    def __init__(self, vision: tuple[int, int], text: tuple[int, int]) -> None:
        super().__init__()
        self.visual = Visual(*vision)
        width = text[0]
        self.token_embedding = nn.Embedding(VOCABULARY, width)
        self.positional_embedding = nn.Parameter(torch.randn(LENGTH, width))
        self.transformer = Transformer(*text)
        self.ln_final = nn.LayerNorm(width)
        self.text_projection = nn.Parameter(torch.randn(width, EMBED))
        self.logit_scale = nn.Parameter(torch.tensor(4.6))

    def forward(self, images: Tensor, ids: Tensor) -> Tensor:
        """Cosines `[N]` of images `[N, 3, SIZE, SIZE]` with token ids `[N, LENGTH]`, padded by zeros."""
        mask = torch.full((LENGTH, LENGTH), float("-inf")).triu(1)
        x = self.ln_final(self.transformer(self.token_embedding(ids) + self.positional_embedding, mask))
        text = x[torch.arange(len(ids)), ids.argmax(dim=1)] @ self.text_projection
        return nn.functional.cosine_similarity(self.visual(images), text)


def save(folder: Path, vision: tuple[int, int], text: tuple[int, int], config: dict[str, Any] | None) -> OpenClip:
    torch.manual_seed(0)
    model = OpenClip(vision, text).eval()
    for name, weight in model.named_parameters():
        if name.endswith("bias") or ".ln_" in name or "ln_final" in name:
            nn.init.normal_(weight, mean=float("bias" not in name), std=0.3)  # fresh ones are 0 and 1: no test
    save_file(model.state_dict(), folder / "model.safetensors")
    save_tokenizer(folder)
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return model


HEADS = {"vision_cfg": {"head_width": 4}, "text_cfg": {"heads": 2}}


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, OpenClip]:
    folder = tmp_path_factory.mktemp("hps")
    return folder, save(folder, (WIDTH, 4), (WIDTH, 2), HEADS)


@pytest.fixture(scope="module")
def folder(published: tuple[Path, OpenClip]) -> Path:
    return published[0]


@pytest.fixture
def copied(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "hps"))


def config(folder: Path, **options: Any) -> HPSv2Config:
    return HPSv2Config(**{"kind": "hpsv2", "path": str(folder), "tokenizer": str(folder)} | options)


def load(folder: Path, **options: Any) -> ClipReward:
    reward = build_reward(config(folder, **options), CPU, where="reward")
    assert isinstance(reward, ClipReward)
    return reward


def videos_of(height: int, width: int, coarse: tuple[int, int] = (5, 6)) -> Tensor:
    """Two smooth clips of three frames, in whole steps of 1/255, as PIL has them."""
    images = torch.rand(6, 3, *coarse, generator=seeded(1)) * 0.8 + 0.1
    frames = nn.functional.interpolate(images, (height, width), mode="bilinear")
    return ((frames * 255).round() / 255).unflatten(0, (2, 3))


def pil_pixels(frames: Tensor, size: int, *, as_bytes: bool) -> Tensor:
    """The published steps by PIL: long side to `size`, onto a black square, CLIP's mean and deviation.

    PIL resizes floats (mode F) without rounding and without clamping, as torchvision does the published tensors; and
    bytes (mode L) with rounding after each of its two passes, as a PNG would be.
    """
    from PIL import Image

    mode, step = ("L", 255) if as_bytes else ("F", 1)
    height, width = frames.shape[-2:]
    long = max(height, width)
    small = (round(width * size / long), round(height * size / long))
    images = []
    for frame in frames:
        channels = []
        for channel, mean, std in zip(frame, MEAN, STD, strict=True):
            values = (channel * step).round().byte() if as_bytes else channel
            square = Image.new(mode, (size, size), 0)
            corner = ((size - small[0]) // 2, (size - small[1]) // 2)
            square.paste(Image.fromarray(values.numpy()).resize(small, Image.Resampling.BICUBIC), corner)
            channels.append((torch.from_numpy(np.array(square, dtype=np.float32)) / step - mean) / std)
        images.append(torch.stack(channels))
    return torch.stack(images)


@pytest.mark.parametrize(("height", "width"), [(64, 96), (90, 50), (32, 32), (20, 27), (48, 200)])
def test_pixels_are_pils(height: int, width: int) -> None:
    frames = videos_of(height, width)[0]
    ours = hps_pixels(frames, SIZE)
    torch.testing.assert_close(ours, pil_pixels(frames, SIZE, as_bytes=False), atol=1e-4, rtol=0)
    # 1/255 is 0.015 of CLIP's standard deviations, and two passes round.
    torch.testing.assert_close(ours, pil_pixels(frames, SIZE, as_bytes=True), atol=0.03, rtol=0)


def test_overshoot_and_black_borders_are_kept() -> None:
    stripes = (torch.arange(64) % 16 < 8).float().expand(1, 3, 48, 64)
    pixels = hps_pixels(stripes, SIZE)
    torch.testing.assert_close(pixels, pil_pixels(stripes, SIZE, as_bytes=False), atol=1e-4, rtol=0)
    black = torch.tensor([-mean / std for mean, std in zip(MEAN, STD, strict=True)])
    torch.testing.assert_close(pixels[0, :, :4].amax(dim=(1, 2)), black)
    torch.testing.assert_close(pixels[0, :, -4:].amin(dim=(1, 2)), black)
    white = (1 - MEAN[0]) / STD[0]
    assert pixels[0, 0].max() > white + 0.03


def ids_of(prompts: list[str]) -> Tensor:
    """Letters of words, the last of each with its own token, between start and end, padded by zeros."""
    rows = torch.zeros(len(prompts), LENGTH, dtype=torch.long)
    for row, prompt in zip(rows, prompts, strict=True):
        words = [[ord(letter) - 97 for letter in word] for word in prompt.split()]
        tokens = [52, *(token + 26 * (i == len(word) - 1) for word in words for i, token in enumerate(word)), 53]
        row[: len(tokens)] = torch.tensor(tokens)
    return rows


@pytest.mark.parametrize(("height", "width"), [(64, 96), (90, 50), (32, 32)])
def test_score_is_the_cosine_of_open_clips_network(published: tuple[Path, OpenClip], height: int, width: int) -> None:
    folder, model = published
    videos = videos_of(height, width)
    images = pil_pixels(videos.flatten(0, 1), SIZE, as_bytes=False)
    with torch.no_grad():
        expected = model(images, ids_of(PROMPTS).repeat_interleave(3, 0)).unflatten(0, (2, 3))
        ours = load(folder)(videos, PROMPTS)
    assert ours.frames is not None
    assert expected.std() > 0.05  # else anything would pass
    torch.testing.assert_close(ours.frames, expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(ours.clip, expected.mean(dim=1), atol=1e-4, rtol=0)


def test_heads_are_as_wide_as_those_of_vit_h_where_nobody_says(tmp_path: Path) -> None:
    model = save(tmp_path, (160, 2), (128, 2), None)
    videos = videos_of(40, 32)[:, :1]
    with torch.no_grad():
        expected = model(pil_pixels(videos.flatten(0, 1), SIZE, as_bytes=False), ids_of(PROMPTS))
        ours = load(tmp_path)(videos, PROMPTS)
    torch.testing.assert_close(ours.clip, expected, atol=1e-4, rtol=0)


def test_gradient_reaches_every_frame_in_chunks_as_in_one(folder: Path) -> None:
    videos = torch.rand(2, 5, 3, 40, 48, generator=seeded(2)).requires_grad_()
    gradients = [
        torch.autograd.grad(load(folder, chunk=chunk)(videos, PROMPTS).clip.sum(), videos)[0] for chunk in (3, 100)
    ]
    scale = gradients[1].abs().max().item()
    torch.testing.assert_close(gradients[0], gradients[1], atol=1e-5 * scale, rtol=1e-3)
    assert (gradients[0].abs().amax(dim=(2, 3, 4)) > 1e-6).all()


def test_gradient_is_that_of_finite_differences(folder: Path) -> None:
    reward = load(folder)
    videos = torch.rand(1, 2, 3, 40, 48, generator=seeded(3))
    direction = torch.randn(videos.shape, generator=seeded(4))
    (gradient,) = torch.autograd.grad(reward(videos.requires_grad_(), PROMPTS[:1]).clip.sum(), videos)
    with torch.no_grad():
        above, below = (reward(videos + step * direction, PROMPTS[:1]).clip for step in (1e-3, -1e-3))
    assert (gradient * direction).sum().item() == pytest.approx(((above - below) / 2e-3).item(), rel=0.02, abs=1e-4)


def test_loaded_is_frozen_and_in_the_type_asked_for(folder: Path) -> None:
    videos = videos_of(32, 48)
    half, full = load(folder, dtype="bfloat16"), load(folder)
    assert {weight.dtype for weight in half.parameters()} == {torch.bfloat16}
    assert not any(weight.requires_grad for weight in half.parameters())
    with torch.no_grad():
        torch.testing.assert_close(half(videos, PROMPTS).clip, full(videos, PROMPTS).clip, atol=0.05, rtol=0)


def test_long_prompts_are_cut_with_one_warning(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    check_reward_prompts(load(folder), ["a dog", "abcdefghijklmnopqrstuvwxyz"])
    assert capsys.readouterr().err == "warning: 1 of 2 prompts are longer than the 20 tokens this reward reads\n"


def changed(change: Callable[[dict[str, Tensor]], object]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors")

    return apply


def renamed(old: str, new: str) -> Callable[[dict[str, Tensor]], object]:
    return lambda tensors: tensors.update({new: tensors.pop(old)})


LAST = "visual.transformer.resblocks.1.attn"


@pytest.mark.parametrize(
    ("damage", "line"),
    [
        (changed(lambda tensors: tensors.pop(f"{LAST}.in_proj_bias")), f"lacks 1 of 62 tensors, the first is {LAST}"),
        (changed(lambda tensors: tensors.pop("visual.conv1.weight")), "no CLIP in open_clip's layout: lacks visual.c"),
        (changed(renamed("ln_final.bias", "final.bias")), "lacks 1 of 62 tensors, the first is ln_final.bias"),
        (changed(lambda tensors: tensors.update(extra=torch.ones(1))), "holds 1 tensors too many, the first is extra"),
        (
            changed(lambda tensors: tensors.update({f"{LAST}.in_proj_weight": torch.ones(16, 16)})),
            f"{LAST}.in_proj_weight is [16, 16], must be [48, 16]",
        ),
        (
            changed(lambda tensors: tensors.update(text_projection=torch.ones(8, 8))),
            "text_projection is [8, 8], must be [16, 8]",
        ),
        (
            lambda folder: (folder / "model.safetensors").rename(folder / "HPS.pt"),
            "only has pickled weights, which can run code when they are loaded (rats-video rewards convert ",
        ),
        (lambda folder: (folder / "model.safetensors").unlink(), "no safetensors file in it"),
        (lambda folder: (folder / "config.json").unlink(), "visual.transformer.resblocks.0 is 16 wide, which 0"),
        (lambda folder: (folder / "tokenizer.json").unlink(), "no tokenizer in it (give a folder with CLIP's"),
    ],
)  # fmt: skip
def test_damaged_folder_is_one_line(copied: Path, damage: Callable[[Path], object], line: str) -> None:
    damage(copied)
    with pytest.raises(UserError) as caught:
        load(copied)
    assert str(caught.value).startswith(f"{copied}: {line}")
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("text", ["[]", "{}", "no", '{"vision_cfg": {"head_width": 4}, "text_cfg": {"heads": null}}'])
def test_another_config_is_refused(copied: Path, text: str) -> None:
    (copied / "config.json").write_text(text)
    with pytest.raises(UserError, match=r"config\.json: is no model configuration of open_clip with text_cfg\.heads"):
        load(copied)


@pytest.mark.parametrize(("head_width", "heads", "tower"), [(0, 2, "visual."), (4, 0, ""), (4, 3, ""), (4, -2, "")])
def test_heads_that_do_not_fit_are_refused(copied: Path, head_width: int, heads: int, tower: str) -> None:
    cfg = {"vision_cfg": {"head_width": head_width}, "text_cfg": {"heads": heads}}
    (copied / "config.json").write_text(json.dumps(cfg))
    line = rf": {tower}transformer\.resblocks\.0 is 16 wide, which {head_width and heads} heads cannot share"
    with pytest.raises(UserError, match=line):
        load(copied)


def test_missing_folder_comes_with_its_download() -> None:
    with pytest.raises(UserError) as caught:
        resolve_folder("models/HPSv2.1", where="reward.path")
    convert = "rats-video rewards convert HPS_v2.1_compressed.pt models/HPSv2.1"
    line = f"reward.path: no such folder: models/HPSv2.1 (curl -LO {PICKLED['HPSv2.1']} && {convert})"
    assert str(caught.value) == line


def test_plan_counts_the_folders_own_network(folder: Path) -> None:
    planned, real = reward_on_meta(config(folder), where="reward"), load(folder)
    assert isinstance(planned, ClipReward)
    assert {name: weight.shape for name, weight in planned.named_parameters()} == {
        name: weight.shape for name, weight in real.named_parameters()
    }
    few, many = (
        trace_reward(
            reward_on_meta(config(folder, frames=frames), where="reward"),
            torch.empty(2, 5, 3, 40, 48, device="meta"), PROMPTS, with_gradient=True, workspace=no_workspace,
        )["teacher reward", "flops"]
        for frames in (1, 4)
    )  # fmt: skip
    tokens = (SIZE // PATCH) ** 2 + 1
    block = 2 * tokens * WIDTH**2 * (4 + 2 * 2) + 4 * tokens**2 * WIDTH  # q, k, v, out, a hidden layer twice as wide
    frame = 2 * (tokens - 1) * 3 * PATCH**2 * WIDTH + 2 * block + 2 * WIDTH * EMBED
    assert many - few == 2 * 3 * frame
