"""ViCLIP: a checkpoint with the published names, against its formula written out; its frames; and what is refused."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from published import Layers, attend, smooth_clips
from safetensors.torch import load_file, save_file
from tiny_clip import save_tokenizer
from torch import Tensor
from torch.nn import functional as F

from rats_video.errors import UserError
from rats_video.planning.memory_tracker import no_workspace
from rats_video.planning.trace import trace_reward
from rats_video.rewards import viclip
from rats_video.rewards.pixels import Pixels
from rats_video.rewards.reward import build_reward, check_reward_prompts, reward_on_meta
from rats_video.rewards.viclip import ViClipConfig, ViClipReward, internvid_pixels, vbench_pixels
from rats_video.seeds import seeded

pytestmark = pytest.mark.pipeline

PROMPTS = ["a red dog runs", "two blue birds"]
CPU = torch.device("cpu")
SIZE, PATCH, VISION, TEXT, WORDS, LIMIT, FEATURES = 28, 14, 128, 192, 54, 20, 24
HEADS = {VISION: 2, TEXT: 3}


def published_shapes() -> dict[str, tuple[int, ...]]:
    """Names and shapes of ViClip-InternVid-10M-FLT.pth["model"], of a smaller network."""
    eye, mind = "vision_encoder", "text_encoder"
    shapes: dict[str, tuple[int, ...]] = {
        "temp": (),
        f"{eye}.class_embedding": (VISION,),
        f"{eye}.positional_embedding": (1 + (SIZE // PATCH) ** 2, VISION),
        f"{eye}.temporal_positional_embedding": (1, 8, VISION),
        f"{eye}.conv1.weight": (VISION, 3, 1, PATCH, PATCH),
        f"{eye}.proj": (VISION, FEATURES),
        f"{mind}.token_embedding.weight": (WORDS, TEXT),
        f"{mind}.positional_embedding": (LIMIT, TEXT),
        f"{mind}.text_projection": (TEXT, FEATURES),
    }
    norms = {f"{eye}.ln_pre": VISION, f"{eye}.ln_post": VISION, f"{mind}.ln_final": TEXT}
    for encoder, width in ((eye, VISION), (mind, TEXT)):
        for block in (f"{encoder}.transformer.resblocks.{number}" for number in range(2)):
            norms |= {f"{block}.ln_1": width, f"{block}.ln_2": width}
            shapes |= {f"{block}.attn.in_proj_weight": (3 * width, width), f"{block}.attn.in_proj_bias": (3 * width,)}
            for name, inputs, outputs in (("attn.out_proj", 1, 1), ("mlp.c_fc", 1, 4), ("mlp.c_proj", 4, 1)):
                shapes[f"{block}.{name}.weight"] = (outputs * width, inputs * width)
                shapes[f"{block}.{name}.bias"] = (outputs * width,)
    return shapes | {f"{norm}.{part}": (width,) for norm, width in norms.items() for part in ("weight", "bias")}


def random_tensors() -> dict[str, Tensor]:
    generator = seeded(0)

    def draw(name: str, shape: tuple[int, ...]) -> Tensor:
        values = torch.randn(shape, generator=generator)
        if "embedding" in name or "conv1" in name:
            return values * 3e-3  # so small that it shows what a norm adds to the variance
        if len(shape) < 2:
            return values * 0.1 + (".ln_" in name and name.endswith("weight"))
        return values / shape[-1] ** 0.5

    return {name: draw(name, shape) for name, shape in published_shapes().items()}


def published_transformer(layers: Layers, encoder: str, hidden: Tensor, bias: Tensor | float = 0.0) -> Tensor:
    for block in (f"{encoder}.transformer.resblocks.{number}" for number in range(2)):
        normed = layers.norm(f"{block}.ln_1", hidden, 1e-5)
        projected = normed @ layers[f"{block}.attn.in_proj_weight"].T + layers[f"{block}.attn.in_proj_bias"]
        attended = attend(*projected.chunk(3, dim=-1), HEADS[hidden.shape[-1]], bias)
        hidden = hidden + layers.linear(f"{block}.attn.out_proj", attended)
        inner = layers.linear(f"{block}.mlp.c_fc", layers.norm(f"{block}.ln_2", hidden, 1e-5))
        hidden = hidden + layers.linear(f"{block}.mlp.c_proj", inner * torch.sigmoid(1.702 * inner))
    return hidden


def published_score(tensors: dict[str, Tensor], pixels: Tensor, ids: Tensor) -> Tensor:
    """Cosine of get_vid_features and get_text_features: viclip_vision.py, viclip_text.py of OpenGVLab/InternVideo.

    `pixels` are `[N, 8, 3, side, side]`, `ids` `[N, 20]`, with zeros after the end token.
    """
    layers, clips = Layers(tensors), len(pixels)
    eye, mind = "vision_encoder", "text_encoder"
    kernel = (1, PATCH, PATCH)
    patches = F.conv3d(pixels.transpose(1, 2), layers[f"{eye}.conv1.weight"], stride=kernel)  # [N, width, 8, y, x]
    tokens = patches.permute(0, 2, 3, 4, 1).reshape(clips * 8, -1, VISION)
    whole = layers[f"{eye}.class_embedding"].expand(clips * 8, 1, -1)
    tokens = torch.cat([whole, tokens], dim=1) + layers[f"{eye}.positional_embedding"]
    first, others = tokens[:clips, :1], tokens[:, 1:].reshape(clips, 8, -1, VISION)
    others = others + layers[f"{eye}.temporal_positional_embedding"][:, :, None]
    seen = layers.norm(f"{eye}.ln_pre", torch.cat([first, others.flatten(1, 2)], dim=1), 1e-5)
    seen = published_transformer(layers, eye, seen)
    video = layers.norm(f"{eye}.ln_post", seen[:, 0], 1e-5) @ layers[f"{eye}.proj"]

    words = layers[f"{mind}.token_embedding.weight"][ids] + layers[f"{mind}.positional_embedding"]
    later = torch.full((LIMIT, LIMIT), float("-inf")).triu(1)
    read = layers.norm(f"{mind}.ln_final", published_transformer(layers, mind, words, later), 1e-5)
    text = read[torch.arange(clips), ids.argmax(dim=-1)] @ layers[f"{mind}.text_projection"]
    return F.cosine_similarity(video, text, dim=-1)


def padded_ids(prompts: Sequence[str]) -> Tensor:
    """The tiny CLIP tokenizer's ids, padded as ViCLIP's own tokenizer pads: start, letters, end, zeros."""
    rows = []
    for prompt in prompts:
        letters = [ord(c) - ord("a") + 26 * (i == len(w) - 1) for w in prompt.split() for i, c in enumerate(w)]
        rows.append([52, *letters, 53] + [0] * (LIMIT - 2 - len(letters)))
    return torch.tensor(rows)


def middles(num_frames: int) -> list[int]:
    """Frames of get_frame_indices(8, num_frames, sample="middle"): vbench/utils.py of Vchitect/VBench."""
    bounds = np.linspace(0, num_frames, 9).astype(int).tolist()
    return [(first + after - 1) // 2 for first, after in itertools.pairwise(bounds)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("viclip")
    save_file(random_tensors(), path / "model.safetensors")
    save_tokenizer(path)
    return path


Load = Callable[..., ViClipReward]


@pytest.fixture(scope="module")
def load(folder: Path) -> Load:
    def build(**options: Any) -> ViClipReward:
        given = {"path": str(folder), "tokenizer": str(folder), **options}
        reward = build_reward(ViClipConfig(kind="viclip", **given), CPU, where="reward")
        assert isinstance(reward, ViClipReward)
        return reward

    return build


@pytest.mark.parametrize(("preprocess", "pixels"), [("internvid", internvid_pixels), ("vbench", vbench_pixels)])
@pytest.mark.parametrize(("num_frames", "height", "width"), [(8, 48, 64), (17, 20, 27), (9, 45, 32)])
def test_score_is_the_published_formula(
    load: Load, preprocess: str, pixels: Pixels, num_frames: int, height: int, width: int
) -> None:
    """Of pixels that test_pixels.py holds against the originals'."""
    videos, tensors, ids = smooth_clips(num_frames, height, width), random_tensors(), padded_ids(PROMPTS)
    shown = pixels(videos[:, middles(num_frames)].flatten(0, 1), SIZE).unflatten(0, (2, 8))
    reward = load(preprocess=preprocess)
    with torch.no_grad():
        scores, swapped = reward(videos, PROMPTS), reward(videos, PROMPTS[::-1])
    assert scores.frames is None
    torch.testing.assert_close(scores.clip, published_score(tensors, shown, ids), atol=1e-5, rtol=0)
    assert (scores.clip - swapped.clip).abs().min() > 0.05  # else anything would pass


def test_preprocess_is_a_choice(load: Load) -> None:
    videos = smooth_clips(8, 48, 64)
    with torch.no_grad():
        internvid, vbench = load()(videos, PROMPTS).clip, load(preprocess="vbench")(videos, PROMPTS).clip
    assert (internvid - vbench).abs().min() > 0.01


def test_order_of_frames_counts(load: Load) -> None:
    videos = smooth_clips(8, SIZE, SIZE)
    with torch.no_grad():
        forward, backward = load()(videos, PROMPTS).clip, load()(videos.flip(1), PROMPTS).clip
    assert (forward - backward).abs().min() > 1e-3


@pytest.mark.parametrize("num_frames", [8, 9, 15, 16, 17, 49, 81])
def test_frames_are_the_middles_of_eight_stretches(load: Load, num_frames: int) -> None:
    assert load().looks_at(num_frames).tolist() == middles(num_frames)


@pytest.mark.parametrize(
    ("num_frames", "frames"),
    # get_frame_indices of Vchitect/VBench 45e79ec and of OpenGVLab/InternVideo 3965eef
    [(1, [0] * 8), (2, [0] + [1] * 7), (5, [0, 1, 2, 3, 4, 4, 4, 4]), (7, [0, 1, 2, 3, 4, 5, 6, 6])],
)
def test_short_clips_repeat_their_last_frame(load: Load, num_frames: int, frames: list[int]) -> None:
    reward, videos = load(), smooth_clips(num_frames, 30, 30)
    assert reward.looks_at(num_frames).tolist() == frames
    with torch.no_grad():
        assert torch.equal(reward(videos, PROMPTS).clip, reward(videos[:, frames], PROMPTS).clip)


@pytest.mark.parametrize("num_frames", [3, 8, 17])
def test_gradient_reaches_the_frames_it_looks_at_alone_in_chunks_as_in_one(load: Load, num_frames: int) -> None:
    videos = torch.rand(3, num_frames, 3, 32, 40, generator=seeded(2)).requires_grad_()
    scores, gradients = [], []
    for chunk in (2, 100):
        scores.append(load(chunk=chunk)(videos, [*PROMPTS, "a cat"]).clip)
        gradients.append(torch.autograd.grad(scores[-1].sum(), videos)[0])
    torch.testing.assert_close(scores[0], scores[1], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(gradients[0], gradients[1], atol=1e-5 * gradients[1].abs().max().item(), rtol=1e-3)
    reached = (gradients[0].abs().amax(dim=(2, 3, 4)) > 1e-6).tolist()
    seen = load().looks_at(num_frames).tolist()
    assert reached == [[frame in seen for frame in range(num_frames)]] * 3


def test_gradient_is_that_of_finite_differences(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(viclip, "rounded", lambda frames: frames)  # steps have no slope
    reward = load()
    videos = torch.rand(1, 8, 3, 32, 32, generator=seeded(3)) * 0.5 + 0.25
    direction = torch.randn(videos.shape, generator=seeded(4))
    (gradient,) = torch.autograd.grad(reward(videos.requires_grad_(), PROMPTS[:1]).clip.sum(), videos)
    with torch.no_grad():
        above, below = (reward(videos + step * direction, PROMPTS[:1]).clip for step in (2e-3, -2e-3))
    assert (gradient * direction).sum().item() == pytest.approx(((above - below) / 4e-3).item(), rel=0.02)


def test_clips_do_not_touch_each_other(load: Load) -> None:
    videos = torch.rand(2, 9, 3, 40, 40, generator=seeded(5))
    with torch.no_grad():
        together, alone = load()(videos, PROMPTS), load()(videos[1:], PROMPTS[1:])
    torch.testing.assert_close(together.clip[1:], alone.clip, atol=1e-6, rtol=1e-5)


def test_long_prompts_are_cut_with_one_warning(load: Load, capsys: pytest.CaptureFixture[str]) -> None:
    reward, long = load(), "abcdefghijklmnopqrstuvwxyz"
    check_reward_prompts(reward, ["a dog", long, f"{long}y"])
    assert capsys.readouterr().err == "warning: 2 of 3 prompts are longer than the 20 tokens this reward reads\n"
    videos = smooth_clips(8, SIZE, SIZE)[:1]
    with torch.no_grad():
        assert torch.equal(reward(videos, [long]).clip, reward(videos, [f"{long}y"]).clip)
    assert capsys.readouterr().err == ""


def test_bfloat16_weights_score_about_the_same_in_float32(load: Load) -> None:
    videos = smooth_clips(8, SIZE, SIZE)
    half, full = load(dtype="bfloat16"), load()
    assert {weight.dtype for weight in half.parameters()} == {torch.bfloat16}
    with torch.no_grad():
        ours, exact = half(videos, PROMPTS).clip, full(videos, PROMPTS).clip
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, exact, atol=0.03, rtol=0)
    assert not full.training
    assert not any(weight.requires_grad for weight in full.parameters())


def test_plan_counts_the_published_network(folder: Path) -> None:
    published = reward_on_meta(ViClipConfig(kind="viclip", path="nowhere"), where="reward")
    assert isinstance(published, ViClipReward)
    assert 4 * sum(weight.numel() for weight in published.parameters()) == pytest.approx(1.71e9, rel=1e-3)  # of the hub
    needed = [torch.Size(shape).numel() for name, shape in published_shapes().items() if name != "temp"]
    peaks = []
    for chunk in (1, 2):
        small = reward_on_meta(ViClipConfig(kind="viclip", path=str(folder), chunk=chunk), where="reward")
        assert isinstance(small, ViClipReward)
        assert sum(weight.numel() for weight in small.parameters()) == sum(needed)
        videos = torch.empty(2, 8, 3, SIZE, SIZE, device="meta")
        counted = trace_reward(small, videos, PROMPTS, with_gradient=True, workspace=no_workspace)
        peaks.append(counted["reward backward", "reward backward"])
    assert peaks[0] < 0.8 * peaks[1]


def damage(folder: Path, how: str) -> None:
    weights = folder / "model.safetensors"
    tensors = load_file(weights)
    match how:
        case "a tensor is missing":
            del tensors["vision_encoder.transformer.resblocks.1.attn.in_proj_bias"]
        case "no positions in time":
            del tensors["vision_encoder.temporal_positional_embedding"]
        case "renamed":
            tensors = {name.replace("text_encoder", "text"): tensor for name, tensor in tensors.items()}
        case "a tensor too many":
            tensors["vision_encoder.head"] = torch.zeros(3)
        case "misshapen":
            tensors["text_encoder.text_projection"] = torch.zeros(FEATURES, TEXT)
        case "two frames deep":
            tensors["vision_encoder.conv1.weight"] = torch.zeros(VISION, 3, 2, PATCH, PATCH)
        case "another tokenizer":
            words = (folder / "tokenizer.json").read_text()
            (folder / "tokenizer.json").write_text(words.replace('"z":25,', "").replace('"z": 25,', ""))
        case "no tokenizer":
            (folder / "tokenizer.json").unlink()
    save_file(tensors, weights)
    if how == "pickled":
        weights.rename(folder / "ViClip-InternVid-10M-FLT.pth")


@pytest.mark.parametrize(
    ("how", "line"),
    [
        (
            "a tensor is missing",
            "lacks 1 of 62 tensors, the first is vision_encoder.transformer.resblocks.1.attn.in_proj_bias",
        ),
        ("no positions in time", "lacks vision_encoder.temporal_positional_embedding"),
        ("renamed", "lacks text_encoder.token_embedding.weight"),
        ("a tensor too many", "holds 1 tensors too many, the first is vision_encoder.head"),
        ("misshapen", "text_encoder.text_projection is [24, 192], must be [192, 24]"),
        ("two frames deep", "vision_encoder.conv1.weight is [128, 3, 2, 14, 14], must be [128, 3, 1, 14, 14]"),
        ("another tokenizer", "its tokenizer has 53 tokens, the model 54 (give a folder with CLIP's tokenizer as"),
        ("no tokenizer", "no tokenizer in it (give a folder with CLIP's tokenizer as `tokenizer`, e.g. of openai/"),
        ("pickled", "only has pickled weights, which can run code when they are loaded (rats-video rewards convert"),
    ],
)
def test_damaged_folder_is_one_line(load: Load, folder: Path, tmp_path: Path, how: str, line: str) -> None:
    copied = shutil.copytree(folder, tmp_path / "copied")
    damage(copied, how)
    with pytest.raises(UserError) as caught:
        load(path=str(copied), tokenizer=str(copied))
    assert str(caught.value).startswith(f"{copied}: {line}")
    assert len(str(caught.value).splitlines()) == 1


def test_missing_folders_say_how_to_get_them(load: Load) -> None:
    with pytest.raises(UserError, match=r"^reward\.path: .*hf download OpenGVLab/ViCLIP-L-14-hf --local-dir models/V"):
        load(path="models/ViCLIP-L-14-hf")
    with pytest.raises(UserError, match=r"^reward\.tokenizer: .*hf download openai/clip-vit-large-patch14"):
        load(tokenizer="models/clip-vit-large-patch14")
