"""VideoReward and HPSv3 against transformers' own Qwen2-VL on checkpoints in the published layout; gradient; damage."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import tiny_qwen
import torch
from qwen_judges import PROMPTS, SPEC, Judge, Made, load
from safetensors.torch import load_file, save_file
from tiny_qwen import CLIP, IMAGE, processed, steps
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from rats_video.assets import ASSETS
from rats_video.rewards.convert import convert_checkpoint
from rats_video.rewards.hpsv3 import HPSv3Reward
from rats_video.rewards.qwen_vision import PixelRule, patch_rows
from rats_video.rewards.reward import reward_on_meta
from rats_video.rewards.video_align import (
    VideoAlignReward,
    VideoAlignSettings,
    merge_lora,
    sampled_frames,
)
from rats_video.seeds import seeded

pytestmark = pytest.mark.pipeline

RULES = {"video_align": PixelRule(CLIP.least, 150_000, rounded=True), "hpsv3": replace(IMAGE, rounded=True)}
EITHER = pytest.mark.parametrize("kind", ["video_align", "hpsv3"])


def states(made: Made, kind: str, rows: Tensor, grid: Sequence[int], prompt: str, *, three_d: bool = False) -> Tensor:
    """The last hidden states at the special tokens, by transformers' whole model from ids, rows and positions."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(made.tokenizer)
    video = kind == "video_align"
    if not video:
        tokenizer.add_tokens(["<|Reward|>"], special_tokens=True)
    pad = "<|video_pad|>" if video else "<|image_pad|>"
    question = (ASSETS / f"{kind}.txt").read_text().replace("{text_prompt}", prompt)
    chat = (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<|vision_start|>"
        f"{pad * (len(rows) // 4)}<|vision_end|>{question}<|im_end|>\n<|im_start|>assistant\n"
    )
    ids = tokenizer(chat, return_tensors="pt").input_ids
    made.model.config.image_token_id, made.model.config.video_token_id = tokenizer.convert_tokens_to_ids(
        ["<|image_pad|>", "<|video_pad|>"]
    )
    names = ("pixel_values_videos", "video_grid_thw") if video else ("pixel_values", "image_grid_thw")
    kinds = (ids == tokenizer.convert_tokens_to_ids(pad)).int() * (2 if video else 1)
    positions = None if three_d else torch.arange(ids.shape[1]).expand(3, 1, -1)
    with torch.no_grad():
        hidden = made.model(
            input_ids=ids, position_ids=positions, mm_token_type_ids=kinds, output_hidden_states=True,
            **dict(zip(names, (rows, torch.tensor([grid])), strict=True)),
        ).hidden_states[-1][0]  # fmt: skip
    answers = ["<|VQ_reward|>", "<|MQ_reward|>", "<|TA_reward|>"] if video else ["<|Reward|>"]
    return hidden[[ids[0].tolist().index(answer) for answer in tokenizer.convert_tokens_to_ids(answers)]]


def rows_by_pil(frames: Tensor, rule: PixelRule) -> tuple[Tensor, list[int]]:
    """Rows of one clip of an even number of frames, or of one frame, from transformers' processor on PIL images."""
    patches, grids = processed(frames, rule)
    single = patches[:, :, :, 0]
    pairs = torch.stack([single[::2], single[1::2] if len(frames) > 1 else single], dim=3)
    return pairs.flatten(0, 1).flatten(1), [len(pairs), *grids[0, 1:].tolist()]


def normalised(made: Made, at: Tensor) -> Tensor:
    """VQ, MQ and TA from hidden states `[3, D]`, by hand."""
    table = at @ made.head.T
    raw = table.diagonal() if table.shape[1] == 3 else table[:, 0]
    known = tiny_qwen.INFERENCE
    return torch.stack(
        [
            (value - known[f"{part}_mean"]) / known[f"{part}_std"]
            for part, value in zip(("VQ", "MQ", "TA"), raw, strict=True)
        ]
    )


@pytest.mark.parametrize("outputs", [1, 3])
def test_video_reward_is_the_published_formula(made: dict[str, Made], tmp_path: Path, outputs: int) -> None:
    one = made["video_align"]
    if outputs == 3:
        one = Made(tmp_path, tmp_path / "checkpoint-100/tokenizer", *tiny_qwen.build_video_align(tmp_path, 3))
    videos, rule = steps(2, 5, 56, 84), RULES["video_align"]
    weights = {"vq": 0.5, "mq": 2.0, "ta": -1.0}
    with torch.no_grad():
        ours = load(one, "video_align", weights=weights, chunk=2)(videos, PROMPTS)
    parts = torch.stack([ours.parts[part] for part in ("vq", "mq", "ta")], dim=1)
    torch.testing.assert_close(ours.clip, parts @ torch.tensor([0.5, 2.0, -1.0]))
    assert ours.frames is None

    seen = videos[:, [0, 1, 3, 4]]  # 5 frames at 8 a second: two a second, but at least 4, evenly spaced

    def parts_of(rows: Callable[[Tensor], tuple[Tensor, Sequence[int]]], *, three_d: bool = False) -> Tensor:
        at = (states(one, "video_align", *rows(c), p, three_d=three_d) for c, p in zip(seen, PROMPTS, strict=True))
        return torch.stack([normalised(one, each) for each in at])

    from_rows = parts_of(lambda clip: patch_rows(clip[None], rule))
    from_pil = parts_of(lambda clip: rows_by_pil(clip, rule))
    three_d = parts_of(lambda clip: patch_rows(clip[None], rule), three_d=True)
    assert from_rows.std() > 0.1
    torch.testing.assert_close(parts, from_rows, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(parts, from_pil, atol=0.03, rtol=0)  # PIL rounds to whole steps twice
    assert (parts - three_d).abs().amax() > 0.1  # transformers' usual positions are not those it was trained with


def test_hpsv3_is_the_published_formula(made: dict[str, Made]) -> None:
    one, videos = made["hpsv3"], steps(2, 3, 60, 80)

    def wanted(rows: Callable[[Tensor], tuple[Tensor, Sequence[int]]]) -> Tensor:
        with torch.no_grad():
            mus = [
                one.head(states(one, "hpsv3", *rows(frame), prompt))[0, 0]
                for clip, prompt in zip(videos, PROMPTS, strict=True)
                for frame in clip
            ]
        return torch.stack(mus).unflatten(0, (2, 3))

    with torch.no_grad():
        ours = load(one, "hpsv3", frames=None, chunk=4)(videos, PROMPTS)
    from_rows = wanted(lambda frame: patch_rows(frame[None, None], RULES["hpsv3"]))
    from_pil = wanted(lambda frame: rows_by_pil(frame[None], IMAGE))
    assert ours.frames is not None
    assert from_rows.std() > 0.01
    torch.testing.assert_close(ours.frames, from_rows, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(ours.frames, from_pil, atol=0.2 * from_rows.std().item(), rtol=0)
    torch.testing.assert_close(ours.clip, ours.frames.mean(dim=1))


def test_questions_are_the_published_ones_to_the_last_space() -> None:
    found = {path.name: hashlib.sha256(path.read_bytes()).hexdigest()[:16] for path in ASSETS.glob("*.txt")}
    assert found == {"hpsv3.txt": "f6ee57479d4e9eee", "video_align.txt": "fdb6309bac618dd0"}


def test_lora_is_merged_as_peft_does(made: dict[str, Made]) -> None:
    folder = made["video_align"].folder / "checkpoint-100"
    merged = merge_lora(load_file(folder / "model.safetensors"), 6 / 4, folder)
    wanted = made["video_align"].model.state_dict()
    assert len(merged) == len(wanted) + 1
    changed = 0
    for name, weight in wanted.items():
        ours = merged[name.replace("model.visual.", "visual.").replace("model.language_model.", "model.")]
        torch.testing.assert_close(ours, weight, atol=1e-5, rtol=1e-5)
        changed += name.endswith("_proj.weight")
    assert changed == 14


def test_settings_are_the_checkpoints(made: dict[str, Made], tmp_path: Path) -> None:
    file = made["video_align"].folder / "model_config.json"
    settings = VideoAlignSettings.read(file)
    assert settings == VideoAlignSettings(150_000, 2.0, 1.5, {"vq": (0.5, 2.0), "mq": (-0.25, 0.5), "ta": (1.0, 4.0)})
    other = json.loads(file.read_text())
    other["peft_lora_config"]["use_rslora"] = True
    (tmp_path / "model_config.json").write_text(json.dumps(other))
    assert VideoAlignSettings.read(tmp_path / "model_config.json").lora_scale == 3.0


@pytest.mark.parametrize(
    ("num_frames", "fps", "frames"),
    [
        (17, 24.0, [0, 5, 11, 16]),
        (5, 8.0, [0, 1, 3, 4]),
        (81, 16.0, [0, 9, 18, 27, 36, 44, 53, 62, 71, 80]),
        (7, 2.0, [0, 1, 2, 4, 5, 6]),
        (3, 8.0, [0, 2]),
        (2, 8.0, [0, 1]),
    ],
)
def test_which_frames_are_looked_at(num_frames: int, fps: float, frames: list[int]) -> None:
    assert sampled_frames(num_frames, fps, 2.0).tolist() == frames


def test_motion_and_quality_do_not_depend_on_the_prompt(rewards: dict[str, Judge]) -> None:
    videos = steps(1, 5, 56, 84).expand(2, -1, -1, -1, -1)
    with torch.no_grad():
        parts = rewards["video_align"](videos, PROMPTS).parts
    for part in ("vq", "mq"):
        assert parts[part][0].item() == pytest.approx(parts[part][1].item(), abs=1e-5)
    assert abs(parts["ta"][0] - parts["ta"][1]) > 0.01


@EITHER
def test_clips_do_not_touch_each_other(made: dict[str, Made], rewards: dict[str, Judge], kind: str) -> None:
    videos = steps(2, 5, 56, 84)
    with torch.no_grad():
        together = load(made[kind], kind, chunk=100)(videos, PROMPTS).clip  # the first prompt is padded
        alone = torch.cat([rewards[kind](videos[i : i + 1], PROMPTS[i : i + 1]).clip for i in range(2)])
    assert (alone[0] - alone[1]).abs() > 1e-3
    torch.testing.assert_close(together, alone, atol=1e-4, rtol=1e-4)


@EITHER
def test_gradient_reaches_every_frame_that_is_looked_at(made: dict[str, Made], kind: str) -> None:
    videos = (0.25 + 0.5 * steps(2, 5, 56, 84)).requires_grad_()
    scores, gradients = [], []
    for chunk in (1, 100):
        reward = load(made[kind], kind, chunk=chunk)
        scores.append(reward(videos, PROMPTS).clip)
        gradients.append(torch.autograd.grad(scores[-1].sum(), videos)[0])
    torch.testing.assert_close(scores[0], scores[1], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(gradients[0], gradients[1], atol=1e-3 * gradients[1].abs().max().item(), rtol=0.01)
    reached = (gradients[0].abs().amax(dim=(2, 3, 4)) > 1e-7).tolist()
    assert reached == [[frame in set(reward.looks_at(5).tolist()) for frame in range(5)]] * 2


@EITHER
def test_gradient_is_that_of_finite_differences(made: dict[str, Made], kind: str) -> None:
    reward = load(made[kind], kind, round_pixels=False)  # steps have no slope
    videos = (0.25 + 0.5 * steps(1, 2, 56, 84)).requires_grad_()
    direction = torch.nn.functional.interpolate(torch.randn(2, 3, 4, 4, generator=seeded(4)), (56, 84))[None]
    (gradient,) = torch.autograd.grad(reward(videos, PROMPTS[:1]).clip.sum(), videos)
    direction = direction + gradient / gradient.abs().max()  # uphill, so that the difference stands out of rounding
    with torch.no_grad():
        above, below = (reward(videos + step * direction, PROMPTS[:1]).clip for step in (5e-4, -5e-4))
    assert (gradient * direction).sum().item() == pytest.approx(((above - below) / 1e-3).item(), rel=0.01)


@EITHER
def test_bfloat16_and_unrounded_pixels_score_about_the_same(
    made: dict[str, Made], rewards: dict[str, Judge], kind: str
) -> None:
    videos = steps(2, 2, 56, 84)
    with torch.no_grad():
        full = rewards[kind](videos, PROMPTS).clip
        half = load(made[kind], kind, dtype="bfloat16")(videos, PROMPTS).clip
        smooth = load(made[kind], kind, round_pixels=False)(videos, PROMPTS).clip
    assert half.dtype == torch.float32
    assert 0 < (smooth - full).abs().max() < 0.05 * full.std() + 0.05
    torch.testing.assert_close(half, full, atol=0.5, rtol=0)


@EITHER
def test_loaded_is_frozen_and_its_head_in_float32(made: dict[str, Made], kind: str) -> None:
    reward = load(made[kind], kind, dtype="bfloat16")
    assert not any(part.training for part in (reward.judge.model, reward.head))
    assert not any(parameter.requires_grad for parameter in reward.parameters())
    assert {parameter.dtype for parameter in reward.head.parameters()} == {torch.float32}
    assert {parameter.dtype for parameter in reward.judge.model.parameters()} == {torch.bfloat16}
    assert {buffer.dtype for buffer in reward.judge.model.buffers()} == {torch.float32}  # of rotary positions


@EITHER
def test_names_of_todays_transformers_are_known_too(made: dict[str, Made], tmp_path: Path, kind: str) -> None:
    one, folder = made[kind], tmp_path / "copy"
    shutil.copytree(one.folder, folder)
    (file,) = folder.rglob("*.safetensors")
    back = {new: old for old, new in reversed(tiny_qwen.PUBLISHED.items())}
    wrapped = "base_model.model." if kind == "video_align" else ""

    def renamed(name: str) -> str:
        own = name.removeprefix(wrapped)
        return wrapped + next((own.replace(new, old, 1) for new, old in back.items() if own.startswith(new)), own)

    save_file({renamed(name): tensor for name, tensor in load_file(file).items()}, file)
    videos = steps(1, 2, 56, 84)
    with torch.no_grad():
        ours = load(Made(folder, one.tokenizer, None, None), kind)(videos, PROMPTS[:1]).clip
        assert torch.equal(ours, load(one, kind)(videos, PROMPTS[:1]).clip)


def test_published_pickle_is_converted(made: dict[str, Made], rewards: dict[str, Judge], tmp_path: Path) -> None:
    one, folder = made["video_align"], tmp_path / "copy"
    shutil.copytree(one.folder, folder)
    saved = folder / "checkpoint-100"
    torch.save(load_file(saved / "model.safetensors"), saved / "model.pth")
    (saved / "model.safetensors").unlink()
    convert_checkpoint(saved / "model.pth", saved)
    videos = steps(1, 2, 56, 84)
    with torch.no_grad():
        ours = load(Made(folder, one.tokenizer, None, None), "video_align")(videos, PROMPTS[:1]).clip
        assert torch.equal(ours, rewards["video_align"](videos, PROMPTS[:1]).clip)


@EITHER
def test_without_weights_it_runs_for_the_plan(rewards: dict[str, Judge], kind: str) -> None:
    reward = reward_on_meta(rewards[kind].cfg, where="reward", clip=SPEC)
    assert isinstance(reward, VideoAlignReward | HPSv3Reward)
    videos = torch.empty(2, 5, 3, 56, 84, device="meta", requires_grad=True)
    scores = reward(videos, PROMPTS)
    assert scores.clip.shape == (2,)
    scores.clip.sum().backward()
    assert videos.grad is not None
    assert [w.shape for w in reward.parameters()] == [w.shape for w in rewards[kind].parameters()]
