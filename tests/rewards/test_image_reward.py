"""ImageReward: a checkpoint with the published names, against BLIP's formula written out; and what is refused."""

from __future__ import annotations

import shutil
import string
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from published import Layers, attend, pil_squares, smooth_clips
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from rats_video.errors import UserError
from rats_video.rewards.image_reward import ImageReward, ImageRewardConfig
from rats_video.rewards.pixels import CLIP_MEAN, CLIP_STD, clip_pixels
from rats_video.rewards.reward import build_reward, check_reward_prompts, reward_on_meta
from rats_video.seeds import seeded

pytestmark = pytest.mark.pipeline

PROMPTS = ["a red dog runs", "two blue birds"]
CPU = torch.device("cpu")
SIZE, PATCH, VISION, TEXT, WORDS = 32, 8, 128, 192, 59
HEADS = {VISION: 2, TEXT: 3}


def published_shapes() -> dict[str, tuple[int, ...]]:
    """Names and shapes of ImageReward.pt, of a smaller network."""

    def linear(name: str, inputs: int, outputs: int) -> dict[str, tuple[int, ...]]:
        return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}

    def norm(name: str, width: int) -> dict[str, tuple[int, ...]]:
        return {f"{name}.weight": (width,), f"{name}.bias": (width,)}

    eye, mind = "blip.visual_encoder", "blip.text_encoder"
    shapes: dict[str, tuple[int, ...]] = {
        f"{eye}.cls_token": (1, 1, VISION),
        f"{eye}.pos_embed": (1, 1 + (SIZE // PATCH) ** 2, VISION),
        f"{eye}.patch_embed.proj.weight": (VISION, 3, PATCH, PATCH),
        f"{eye}.patch_embed.proj.bias": (VISION,),
        f"{mind}.embeddings.position_ids": (1, 40),
        f"{mind}.embeddings.word_embeddings.weight": (WORDS, TEXT),
        f"{mind}.embeddings.position_embeddings.weight": (40, TEXT),
        **norm(f"{eye}.norm", VISION),
        **norm(f"{mind}.embeddings.LayerNorm", TEXT),
        **linear("blip.vision_proj", VISION, 16),
        **linear("blip.text_proj", TEXT, 16),
    }
    for block in (f"{eye}.blocks.0", f"{eye}.blocks.1"):
        shapes |= norm(f"{block}.norm1", VISION) | norm(f"{block}.norm2", VISION)
        shapes |= linear(f"{block}.attn.qkv", VISION, 3 * VISION) | linear(f"{block}.attn.proj", VISION, VISION)
        shapes |= linear(f"{block}.mlp.fc1", VISION, 4 * VISION) | linear(f"{block}.mlp.fc2", 4 * VISION, VISION)
    for layer in (f"{mind}.encoder.layer.0", f"{mind}.encoder.layer.1"):
        for attention, seen in (("attention", TEXT), ("crossattention", VISION)):
            shapes |= linear(f"{layer}.{attention}.self.query", TEXT, TEXT)
            shapes |= linear(f"{layer}.{attention}.self.key", seen, TEXT)
            shapes |= linear(f"{layer}.{attention}.self.value", seen, TEXT)
            shapes |= linear(f"{layer}.{attention}.output.dense", TEXT, TEXT)
            shapes |= norm(f"{layer}.{attention}.output.LayerNorm", TEXT)
        shapes |= linear(f"{layer}.intermediate.dense", TEXT, 4 * TEXT) | norm(f"{layer}.output.LayerNorm", TEXT)
        shapes |= linear(f"{layer}.output.dense", 4 * TEXT, TEXT)
    for place, inputs, outputs in ((0, TEXT, 1024), (2, 1024, 128), (4, 128, 64), (6, 64, 16), (7, 16, 1)):
        shapes |= linear(f"mlp.layers.{place}", inputs, outputs)
    return shapes


def random_tensors() -> dict[str, Tensor]:
    generator = seeded(0)

    def draw(name: str, shape: tuple[int, ...]) -> Tensor:
        if name.endswith("position_ids"):
            return torch.arange(shape[1])[None]
        values = torch.randn(shape, generator=generator)
        if "embed" in name or "cls" in name:
            # So small that it shows what a norm adds to the variance.
            return values if "LayerNorm" in name else values * 3e-4
        if len(shape) == 1:
            return values * 0.1 + ("norm" in name.lower() and name.endswith("weight"))
        return values / shape[1] ** 0.5

    return {name: draw(name, shape) for name, shape in published_shapes().items()}


def published_score(tensors: dict[str, Tensor], pixels: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
    """ImageReward.score: vit.py and med.py (BertModel, mode "multimodal") of THUDM/ImageReward, in evaluation mode."""
    layers = Layers(tensors)
    eye = "blip.visual_encoder"
    patches = F.conv2d(
        pixels, layers[f"{eye}.patch_embed.proj.weight"], layers[f"{eye}.patch_embed.proj.bias"], stride=PATCH
    ).flatten(2)
    seen = torch.cat([layers[f"{eye}.cls_token"].expand(len(pixels), 1, -1), patches.transpose(1, 2)], dim=1)
    seen = seen + layers[f"{eye}.pos_embed"]
    for block in (f"{eye}.blocks.0", f"{eye}.blocks.1"):
        normed = layers.norm(f"{block}.norm1", seen, 1e-6)
        attended = attend(*layers.linear(f"{block}.attn.qkv", normed).chunk(3, dim=-1), HEADS[VISION])
        seen = seen + layers.linear(f"{block}.attn.proj", attended)
        inner = F.gelu(layers.linear(f"{block}.mlp.fc1", layers.norm(f"{block}.norm2", seen, 1e-6)))
        seen = seen + layers.linear(f"{block}.mlp.fc2", inner)
    seen = layers.norm(f"{eye}.norm", seen, 1e-6)

    mind = "blip.text_encoder"
    words = layers[f"{mind}.embeddings.word_embeddings.weight"][ids]
    positions = layers[f"{mind}.embeddings.position_embeddings.weight"][: ids.shape[1]]
    read = layers.norm(f"{mind}.embeddings.LayerNorm", words + positions, 1e-12)
    padding = (1.0 - mask[:, None, :].float()) * -10000.0
    for layer in (f"{mind}.encoder.layer.0", f"{mind}.encoder.layer.1"):
        for name, source, bias in ((f"{layer}.attention", None, padding), (f"{layer}.crossattention", seen, 0.0)):
            query, key, value = (
                layers.linear(f"{name}.self.{part}", read if part == "query" or source is None else source)
                for part in ("query", "key", "value")
            )
            attended = layers.linear(f"{name}.output.dense", attend(query, key, value, HEADS[TEXT], bias))
            read = layers.norm(f"{name}.output.LayerNorm", attended + read, 1e-12)
        inner = F.gelu(layers.linear(f"{layer}.intermediate.dense", read))
        read = layers.norm(f"{layer}.output.LayerNorm", layers.linear(f"{layer}.output.dense", inner) + read, 1e-12)
    score = read[:, 0]
    for place in (0, 2, 4, 6, 7):
        score = layers.linear(f"mlp.layers.{place}", score)
    return (score[:, 0] - 0.16717362830052426) / 1.0333394966054072


def padded_ids(prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
    """BERT's ids and mask of short prompts in a vocabulary of letters: [CLS], letters, [SEP], padded to 35."""
    rows = []
    for prompt in prompts:
        letters = [5 + ord(c) - ord("a") + 26 * bool(i) for word in prompt.split() for i, c in enumerate(word)]
        rows.append([2, *letters, 3] + [0] * (33 - len(letters)))
    ids = torch.tensor(rows)
    return ids, (ids > 0).long()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("image-reward")
    save_file(random_tensors(), path / "model.safetensors")
    return path


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """BERT's files, with a vocabulary of letters."""
    path = tmp_path_factory.mktemp("bert")
    letters = [*string.ascii_lowercase, *(f"##{letter}" for letter in string.ascii_lowercase)]
    (path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters]) + "\n")
    return path


Load = Callable[..., ImageReward]


@pytest.fixture(scope="module")
def load(folder: Path, tokenizer: Path) -> Load:
    def build(**options: Any) -> ImageReward:
        given = {"path": str(folder), "tokenizer": str(tokenizer), **options}
        reward = build_reward(ImageRewardConfig(kind="image_reward", **given), CPU, where="reward")
        assert isinstance(reward, ImageReward)
        return reward

    return build


@pytest.mark.parametrize(("height", "width"), [(48, 64), (20, 27), (45, 32)])
def test_score_is_the_published_formula_on_pil_images(load: Load, height: int, width: int) -> None:
    videos, tensors = smooth_clips(3, height, width), random_tensors()
    frames = videos.flatten(0, 1)
    ids, mask = (rows.repeat_interleave(3, dim=0) for rows in padded_ids(PROMPTS))
    pixels = pil_squares(frames, SIZE, CLIP_MEAN, CLIP_STD)
    ours = clip_pixels(frames, SIZE)
    # PIL rounds to whole steps after each of its two passes: 1/255 is 0.015 of CLIP's standard deviations.
    torch.testing.assert_close(ours, pixels, atol=0.03, rtol=0)

    from_ours, from_pil = (published_score(tensors, seen, ids, mask) for seen in (ours, pixels))
    with torch.no_grad():
        scores = load()(videos, PROMPTS)
    assert scores.frames is not None
    assert from_pil.std() > 0.1  # else anything would pass
    torch.testing.assert_close(scores.frames.flatten(), from_ours, atol=2e-4, rtol=0)
    torch.testing.assert_close(scores.frames.flatten(), from_pil, atol=0.05, rtol=0)
    torch.testing.assert_close(scores.clip, scores.frames.mean(dim=1))


def test_prompt_is_read_in_both_directions_and_decides(load: Load) -> None:
    """BLIP's text encoder is no decoder here: a later word changes what is read at the first token."""
    video = smooth_clips(1, 32, 32)[:1]
    with torch.no_grad():
        scores = [load()(video, [prompt]).clip.item() for prompt in ("a red dog", "a red dot", "a red dog")]
    assert abs(scores[0] - scores[1]) > 1e-3
    assert scores[0] == scores[2]


def test_long_prompts_are_cut_with_one_warning(load: Load, capsys: pytest.CaptureFixture[str]) -> None:
    reward, long = load(), "abcdefghi " * 4
    check_reward_prompts(reward, ["a dog", long, f"{long} y"])
    line = "warning: 2 of 3 prompts are longer than the 35 tokens this reward reads\n"
    assert capsys.readouterr().err == line
    video = smooth_clips(1, 32, 32)[:1]
    with torch.no_grad():
        assert torch.equal(reward(video, [long]).clip, reward(video, [f"{long} y"]).clip)
    assert capsys.readouterr().err == ""


def test_gradient_reaches_the_scored_frames_alone_in_chunks_as_in_one(load: Load) -> None:
    videos = torch.rand(2, 5, 3, 40, 48, generator=seeded(2)).requires_grad_()
    scores, gradients = [], []
    for chunk in (2, 100):
        scores.append(load(chunk=chunk, frames=3)(videos, PROMPTS).clip)
        gradients.append(torch.autograd.grad(scores[-1].sum(), videos)[0])
    torch.testing.assert_close(scores[0], scores[1], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(gradients[0], gradients[1], atol=1e-5 * gradients[1].abs().max().item(), rtol=1e-3)
    reached = (gradients[0].abs().amax(dim=(2, 3, 4)) > 1e-6).tolist()
    assert reached == [[frame in load(frames=3).looks_at(5).tolist() for frame in range(5)]] * 2


def test_gradient_is_that_of_finite_differences(load: Load) -> None:
    reward = load()
    videos = torch.rand(1, 2, 3, 40, 40, generator=seeded(3)) * 0.5 + 0.25
    direction = torch.randn(videos.shape, generator=seeded(4))
    (gradient,) = torch.autograd.grad(reward(videos.requires_grad_(), PROMPTS[:1]).clip.sum(), videos)
    with torch.no_grad():
        above, below = (reward(videos + step * direction, PROMPTS[:1]).clip for step in (1e-3, -1e-3))
    assert (gradient * direction).sum().item() == pytest.approx(((above - below) / 2e-3).item(), rel=0.02)


def test_clips_do_not_touch_each_other(load: Load) -> None:
    videos = torch.rand(2, 2, 3, 40, 40, generator=seeded(5))
    with torch.no_grad():
        together, alone = load()(videos, PROMPTS), load()(videos[1:], PROMPTS[1:])
    torch.testing.assert_close(together.clip[1:], alone.clip, atol=1e-5, rtol=1e-5)


def test_bfloat16_weights_leave_the_head_in_float32(load: Load) -> None:
    videos = smooth_clips(2, 32, 32)
    half, full = load(dtype="bfloat16"), load()
    assert {half.vision.dtype, half.text.dtype} == {torch.bfloat16}
    assert next(half.head.parameters()).dtype == torch.float32
    with torch.no_grad():
        ours, exact = half(videos, PROMPTS).clip, full(videos, PROMPTS).clip
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, exact, atol=0.1, rtol=0)
    assert not any(
        weight.requires_grad or module.training for module in full.modules() for weight in module.parameters()
    )


def test_plan_counts_the_published_network(folder: Path) -> None:
    published = reward_on_meta(ImageRewardConfig(kind="image_reward", path="nowhere"), where="reward")
    assert isinstance(published, ImageReward)
    projections = 256 * (1024 + 1) + 256 * (768 + 1)  # in the file, not needed
    size = 4 * (sum(weight.numel() for weight in published.parameters()) + projections)
    assert size == pytest.approx(1_786_880_927, rel=2e-4)  # bytes of ImageReward.pt on the hub
    small = reward_on_meta(ImageRewardConfig(kind="image_reward", path=str(folder)), where="reward")
    assert isinstance(small, ImageReward)
    needed = {name: shape for name, shape in published_shapes().items() if "_proj" not in name and "_ids" not in name}
    assert sum(weight.numel() for weight in small.parameters()) == sum(torch.Size(s).numel() for s in needed.values())
    assert small.vision.device.type == "meta"


def rename(weights: Path, old: str, new: str) -> None:
    tensors = load_file(weights)
    save_file({name.replace(old, new): tensor for name, tensor in tensors.items()}, weights)


def change(weights: Path, name: str, tensor: Tensor | None) -> None:
    tensors = load_file(weights)
    tensors.pop(name, None)
    save_file(tensors | ({} if tensor is None else {name: tensor}), weights)


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "a tensor is missing": (
        lambda weights: change(weights, "blip.visual_encoder.blocks.1.attn.qkv.bias", None),
        "lacks 1 of 96 tensors, the first is blip.visual_encoder.blocks.1.attn.qkv.bias",
    ),
    "the head is missing": (lambda weights: rename(weights, "mlp.layers", "head"), "lacks 10 of 96 tensors, the first"),
    "a tensor that tells a size is missing": (
        lambda weights: change(weights, "blip.visual_encoder.patch_embed.proj.weight", None),
        "lacks blip.visual_encoder.patch_embed.proj.weight",
    ),
    "a tensor that tells a size is flat": (
        lambda weights: change(weights, "blip.visual_encoder.patch_embed.proj.weight", torch.zeros(128, 192)),
        "blip.visual_encoder.patch_embed.proj.weight is [128, 192], must have 4 dimensions",
    ),
    "too narrow for a head": (
        lambda weights: change(weights, "blip.visual_encoder.patch_embed.proj.weight", torch.zeros(32, 3, 8, 8)),
        "blip.visual_encoder.blocks is 32 wide, no multiple of 64",
    ),
    "renamed": (
        lambda weights: rename(weights, "crossattention", "cross_attention"),
        "lacks 20 of 96 tensors, the first is blip.text_encoder.encoder.layer.0.crossattention.output.LayerNorm.bias",
    ),
    "a tensor too many": (
        lambda weights: change(weights, "blip.text_decoder.bias", torch.zeros(3)),
        "holds 1 tensors too many, the first is blip.text_decoder.bias",
    ),
    "misshapen": (
        lambda weights: change(weights, "mlp.layers.2.weight", torch.zeros(1024, 128)),
        "mlp.layers.2.weight is [1024, 128], must be [128, 1024]",
    ),
    "pickled": (lambda weights: weights.rename(weights.with_name("ImageReward.pt")), "only has pickled weights, which"),
}


@pytest.mark.parametrize("how", DAMAGE)
def test_damaged_checkpoint_is_one_line(load: Load, folder: Path, tmp_path: Path, how: str) -> None:
    copied = shutil.copytree(folder, tmp_path / "copied")
    damage, line = DAMAGE[how]
    damage(copied / "model.safetensors")
    with pytest.raises(UserError) as caught:
        load(path=str(copied))
    assert str(caught.value).startswith(f"{copied}: {line}")
    assert len(str(caught.value).splitlines()) == 1


def test_a_published_width_without_its_last_blocks_is_noticed(tmp_path: Path, tokenizer: Path) -> None:
    """All 24 blocks of a ViT-L are wanted, although its tensors do not tell their number."""
    wide = {"blip.visual_encoder.patch_embed.proj.weight": torch.zeros(1024, 3, 8, 8)}
    save_file(random_tensors() | wide, tmp_path / "model.safetensors")
    cfg = ImageRewardConfig(kind="image_reward", path=str(tmp_path), tokenizer=str(tokenizer))
    with pytest.raises(UserError, match=r"the first is blip\.visual_encoder\.blocks\.10\.attn\.proj\.bias"):
        build_reward(cfg, CPU, where="reward")


def test_tokenizers_that_do_not_fit(load: Load, tokenizer: Path, tmp_path: Path) -> None:
    fix = r"\(give a folder of google-bert/bert-base-uncased\)"
    with pytest.raises(UserError, match=rf"no tokenizer in it {fix}"):
        load(tokenizer=str(tmp_path))
    words = (tokenizer / "vocab.txt").read_text().splitlines()
    (tmp_path / "vocab.txt").write_text("\n".join(words[:-1]) + "\n")
    with pytest.raises(UserError, match=rf"its tokenizer has 58 tokens with \[DEC\] and \[ENC\], the model 59 {fix}"):
        load(tokenizer=str(tmp_path))


def test_missing_folders_say_how_to_get_them(load: Load) -> None:
    with pytest.raises(UserError, match=r"^reward\.path: .*ImageReward\.pt && rats-video rewards convert ImageReward"):
        load(path="models/ImageReward")
    with pytest.raises(UserError, match=r"^reward\.tokenizer: .*hf download google-bert/bert-base-uncased"):
        load(tokenizer="models/bert-base-uncased")
