"""PickScore and CLIP score: against transformers' own processor and model, gradient, chunks, and folders refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_clip import save_clip
from torch import Tensor

from rats_video.errors import UserError
from rats_video.rewards.clip_score import ClipReward, ClipScoreConfig, PickScoreConfig
from rats_video.rewards.pixels import clip_pixels, processor_pixels
from rats_video.rewards.reward import build_reward, check_reward_prompts
from rats_video.seeds import seeded

pytestmark = pytest.mark.pipeline

PROMPTS = ["a red dog runs", "two blue birds"]
SIZE, LENGTH = 32, 20
CPU = torch.device("cpu")


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random CLIPModel with a tokenizer of letters."""
    path = tmp_path_factory.mktemp("clip")
    save_clip(path, SIZE, LENGTH)
    return path


@pytest.fixture
def copied(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "clip"))


def pickscore(folder: Path, **options: Any) -> ClipReward:
    reward = build_reward(PickScoreConfig(kind="pickscore", path=str(folder), **options), CPU, where="reward")
    assert isinstance(reward, ClipReward)
    return reward


def clip_score(folder: Path, **options: Any) -> ClipReward:
    reward = build_reward(ClipScoreConfig(kind="clip_score", path=str(folder), **options), CPU, where="reward")
    assert isinstance(reward, ClipReward)
    return reward


def smooth_videos(height: int, width: int, num_frames: int = 5) -> Tensor:
    """In whole steps of 1/255, as PIL has them."""
    coarse = torch.rand(2 * num_frames, 3, 5, 6, generator=seeded(1))
    frames = torch.nn.functional.interpolate(coarse, (height, width), mode="bilinear")
    return ((frames * 255).round() / 255).unflatten(0, (2, num_frames))


@pytest.mark.parametrize(("height", "width"), [(64, 96), (90, 50), (32, 32), (20, 27)])
def test_pickscore_is_transformers_own_on_pil_images(folder: Path, height: int, width: int) -> None:
    from PIL import Image
    from transformers import CLIPImageProcessorPil

    videos = smooth_videos(height, width)
    images = [Image.fromarray((f * 255).round().byte().permute(1, 2, 0).numpy()) for f in videos.flatten(0, 1)]
    processor = CLIPImageProcessorPil(size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE})
    pixels = processor(images, return_tensors="pt").pixel_values
    ours = processor_pixels(videos.flatten(0, 1), SIZE)
    # PIL rounds to whole steps after each of its two passes: 1/255 is 0.015 of CLIP's standard deviations.
    torch.testing.assert_close(ours, pixels, atol=0.03, rtol=0)

    with torch.no_grad():
        scores = pickscore(folder)(videos, PROMPTS)
    assert scores.frames is not None
    from_pil = logits(folder, pixels, PROMPTS)
    assert from_pil.std() > 0.5  # else anything would pass
    torch.testing.assert_close(scores.frames, logits(folder, ours, PROMPTS), atol=1e-4, rtol=0)
    torch.testing.assert_close(scores.frames, from_pil, atol=0.1, rtol=0)  # a random network amplifies the rounding
    torch.testing.assert_close(scores.clip, scores.frames.mean(dim=1))


def logits(folder: Path, pixels: Tensor, prompts: list[str]) -> Tensor:
    """`logits_per_image` of transformers' CLIP `[2, 5]`, of each clip's frames with its prompt."""
    from transformers import AutoTokenizer, CLIPModel

    tokens = AutoTokenizer.from_pretrained(folder)(prompts, padding=True, return_tensors="pt")
    with torch.no_grad():
        every = CLIPModel.from_pretrained(folder)(**tokens, pixel_values=pixels).logits_per_image
    return every.unflatten(0, (2, 5))[[0, 1], :, [0, 1]]


def test_clip_score_is_openais_of_text_and_pixels(folder: Path) -> None:
    """Its text is cleaned and its crop rounded, unlike PickScore's, of the same model."""
    from transformers import CLIPModel

    raw, clean = ["&#97; red dog", "ｂｉｒｄｓ"], ["a red dog", "birds"]  # noqa: RUF001
    videos = smooth_videos(20, 27)  # an odd margin
    pixels = clip_pixels(videos.flatten(0, 1), SIZE)
    scale = CLIPModel.from_pretrained(folder).logit_scale.exp().item()
    with torch.no_grad():
        scores, pick = clip_score(folder)(videos, raw).frames, pickscore(folder)(videos, raw).frames
    assert scores is not None
    assert pick is not None
    torch.testing.assert_close(scale * scores, logits(folder, pixels, clean), atol=1e-4, rtol=0)
    plain = logits(folder, processor_pixels(videos.flatten(0, 1), SIZE), raw)
    torch.testing.assert_close(pick, plain, atol=1e-4, rtol=0)
    assert (scale * scores - pick).abs().mean() > 0.05


def test_gradient_reaches_every_frame_in_chunks_as_in_one(folder: Path) -> None:
    videos = torch.rand(2, 5, 3, 40, 48, generator=seeded(2)).requires_grad_()
    scores, gradients = [], []
    for chunk in (3, 100):
        score = pickscore(folder, chunk=chunk)(videos, PROMPTS)
        scores.append(score.clip)
        gradients.append(torch.autograd.grad(score.clip.sum(), videos)[0])
    torch.testing.assert_close(scores[0], scores[1], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(gradients[0], gradients[1], atol=1e-5 * gradients[1].abs().max().item(), rtol=1e-3)
    assert (gradients[0].abs().amax(dim=(2, 3, 4)) > 1e-6).all()


def test_gradient_is_that_of_finite_differences(folder: Path) -> None:
    reward = clip_score(folder)
    videos = torch.rand(1, 2, 3, 40, 40, generator=seeded(3)) * 0.5 + 0.25
    direction = torch.randn(videos.shape, generator=seeded(4))
    (gradient,) = torch.autograd.grad(reward(videos.requires_grad_(), PROMPTS[:1]).clip.sum(), videos)
    with torch.no_grad():
        above, below = (reward(videos + step * direction, PROMPTS[:1]).clip for step in (1e-3, -1e-3))
    assert (gradient * direction).sum().item() == pytest.approx(((above - below) / 2e-3).item(), rel=0.02, abs=1e-4)


def test_overshoot_of_the_resize_is_clamped_and_keeps_its_gradient() -> None:
    frames = (torch.arange(64) % 16 < 8).float().expand(1, 3, 48, 64).clone().requires_grad_()
    pixels = clip_pixels(frames, 32)
    assert pixels.max().item() == pytest.approx((1 - 0.40821) / 0.27578, abs=1e-3)  # white in the blue channel
    (gradient,) = torch.autograd.grad(pixels.sum(), frames)
    assert gradient[:, :, 24, 32].abs().min() > 0.1


@pytest.mark.parametrize("frames", [None, 2])
def test_clips_do_not_touch_each_other(folder: Path, frames: int | None) -> None:
    reward = pickscore(folder, frames=frames)
    videos = torch.rand(2, 5, 3, 40, 40, generator=seeded(5))
    with torch.no_grad():
        together = reward(videos, PROMPTS)
        alone = reward(videos[1:], PROMPTS[1:])
    torch.testing.assert_close(together.clip[1:], alone.clip, atol=1e-5, rtol=1e-5)
    assert together.frames is not None
    assert alone.frames is not None
    torch.testing.assert_close(together.frames[1:], alone.frames, atol=1e-5, rtol=1e-5)


def test_unscored_frames_take_the_nearest_score_and_no_gradient(folder: Path) -> None:
    videos = torch.rand(1, 9, 3, 32, 32, generator=seeded(6)).requires_grad_()
    some, every = pickscore(folder, frames=3)(videos, PROMPTS[:1]), pickscore(folder)(videos, PROMPTS[:1])
    assert some.frames is not None
    assert every.frames is not None
    nearest = every.frames[:, [0, 0, 0, 4, 4, 4, 4, 8, 8]]
    torch.testing.assert_close(some.frames, nearest, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(some.clip, every.frames[:, [0, 4, 8]].mean(dim=1), atol=1e-5, rtol=1e-5)
    (gradient,) = torch.autograd.grad(some.clip.sum(), videos)
    assert (gradient.abs().amax(dim=(0, 2, 3, 4)) > 0).tolist() == [frame in {0, 4, 8} for frame in range(9)]


def test_bfloat16_weights_score_about_the_same_in_float32(folder: Path) -> None:
    videos = torch.rand(1, 3, 3, 32, 32, generator=seeded(7))
    with torch.no_grad():
        half, full = clip_score(folder, dtype="bfloat16")(videos, PROMPTS[:1]), clip_score(folder)(videos, PROMPTS[:1])
    assert half.clip.dtype == torch.float32
    torch.testing.assert_close(half.clip, full.clip, atol=0.05, rtol=0)


def test_long_prompts_are_cut_with_one_warning(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    reward = pickscore(folder)
    long = "abcdefghijklmnopqrstuvwxyz"
    check_reward_prompts(reward, ["a dog", long, f"{long}y"])
    line = "warning: 2 of 3 prompts are longer than the 20 tokens this reward reads\n"
    assert capsys.readouterr().err == line
    videos = torch.rand(1, 2, 3, 32, 32, generator=seeded(8))
    with torch.no_grad():
        assert torch.equal(reward(videos, [long]).clip, reward(videos, [f"{long}y"]).clip)
    assert capsys.readouterr().err == ""


def test_loaded_is_frozen(folder: Path) -> None:
    reward = pickscore(folder)
    assert not reward.model.training
    assert not any(parameter.requires_grad for parameter in reward.parameters())


def test_tokenizer_of_another_folder(copied: Path, folder: Path) -> None:
    (copied / "tokenizer.json").unlink()
    videos = torch.rand(1, 2, 3, 32, 32, generator=seeded(9))
    with torch.no_grad():
        ours = pickscore(copied, tokenizer=str(folder))(videos, PROMPTS[:1])
    assert torch.equal(ours.clip, pickscore(folder)(videos, PROMPTS[:1]).clip)


def damage(folder: Path, how: str) -> None:
    weights = folder / "model.safetensors"
    match how:
        case "no config":
            (folder / "config.json").unlink()
        case "another model":
            config = json.loads((folder / "config.json").read_text())
            (folder / "config.json").write_text(json.dumps(config | {"model_type": "siglip"}))
        case "pickled":
            weights.rename(folder / "pytorch_model.bin")
        case "no weights":
            weights.unlink()
        case "a weight is missing":
            tensors = load_file(weights)
            del tensors["visual_projection.weight"]
            save_file(tensors, weights, metadata={"format": "pt"})
        case "a weight of another shape":
            save_file(load_file(weights) | {"visual_projection.weight": torch.zeros(3, 3)}, weights, {"format": "pt"})
        case "truncated":
            weights.write_bytes(weights.read_bytes()[:-8])
        case "no tokenizer":
            (folder / "tokenizer.json").unlink()
        case "another tokenizer":
            tokenizer = json.loads((folder / "tokenizer.json").read_text())
            del tokenizer["model"]["vocab"]["z"]
            (folder / "tokenizer.json").write_text(json.dumps(tokenizer))


@pytest.mark.parametrize(
    ("how", "line"),
    [
        ("no config", "not a CLIPModel: no readable config.json in it (give the folder of a hub download)"),
        ("another model", "is a 'siglip' model, not a CLIPModel (model_type 'clip')"),
        ("pickled", "only has pickled weights, which can run code when they are loaded (rats-video rewards convert "),
        ("no weights", "cannot load it as a CLIPModel: "),
        ("a weight is missing", "lacks 1 weights of a CLIPModel, e.g. visual_projection.weight"),
        ("a weight of another shape", "cannot load it as a CLIPModel: "),
        ("truncated", "cannot load it as a CLIPModel: "),
        ("no tokenizer", "no tokenizer in it (give a folder with CLIP's tokenizer as `tokenizer`, e.g. of openai/"),
        ("another tokenizer", "its tokenizer has 53 tokens, the model 54 (give a folder with CLIP's tokenizer"),
    ],
)
def test_damaged_folder_is_one_line(copied: Path, capfd: pytest.CaptureFixture[str], how: str, line: str) -> None:
    damage(copied, how)
    capfd.readouterr()
    with pytest.raises(UserError) as caught:
        pickscore(copied)
    assert str(caught.value).startswith(f"{copied}: {line}")
    assert len(str(caught.value).splitlines()) == 1
    assert "LOAD REPORT" not in "".join(capfd.readouterr())


def test_weights_that_are_not_finite_are_one_line(copied: Path) -> None:
    tensors = load_file(copied / "model.safetensors")
    tensors["visual_projection.weight"][0, 0] = torch.nan
    save_file(tensors, copied / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r": visual_projection\.weight holds NaN or infinity \(1 of its 128 numbers\)"):
        pickscore(copied)


def test_missing_folders_name_their_key(folder: Path) -> None:
    with pytest.raises(UserError, match=r"^reward\.path: no such folder: nowhere"):
        clip_score(Path("nowhere"))
    with pytest.raises(UserError, match=r"^reward\.tokenizer: no such folder: nowhere"):
        clip_score(folder, tokenizer="nowhere")


def test_a_run_is_trained_judged_and_compared_by_them(
    folder: Path, config_file: Path, command: Callable[..., Any], tmp_path: Path
) -> None:
    rewards = {
        "reward": f"{{kind: pickscore, path: {folder}, frames: 2}}",
        "heldout_reward": f"{{kind: clip_score, path: {folder}}}",
        "teacher.cache": tmp_path / "cache",
    }
    sets = [part for key, value in rewards.items() for part in ("--set", f"{key}={value}")]
    code, _, err = command("run", "--config", config_file, "--output", tmp_path / "run", *sets)
    assert code == 0, err
    assert err.count("prompts are longer than the 20 tokens this reward reads") >= 1
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 2
    assert {f"gate/frame{frame}" for frame in range(2)} <= rows[0].keys()
    evaluated = json.loads((tmp_path / "run" / "evaluation" / "evaluation.json").read_text())
    for row in evaluated["rows"]:
        assert -1 < row["metrics"]["heldout_reward"]["mean"] < 1
    (identity,) = (tmp_path / "cache").glob("*/identity.json")
    assert json.loads(identity.read_text())["reward"] == {"kind": "pickscore", "frames": 2, "dtype": "float32"}
