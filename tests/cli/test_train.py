"""`train teacher` and `train reward`, driven as a user would, and what the reward learns from."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from killing import dying_in_every_second_step
from safetensors.torch import load_file
from torch import Tensor

from rats_video.backbones.wan import WanBackbone
from rats_video.datasets.shapes.render import SHAPES_CLIP, WORDS, ShapeAttributes, render
from rats_video.pretraining.resumable import resumable_steps
from rats_video.pretraining.reward import ClipPool, ClipTargets, evaluate_reward, measured_targets
from rats_video.rewards.word import WordReward
from rats_video.seeds import seeded

Command = Callable[..., Any]
VOCABULARY = [word for words in WORDS.values() for word in words]

TEACHER = """
clip: {{num_frames: 5, height: 32, width: 32}}
vae: {model}
transformer: {{num_heads: 2, head_dim: 8, ffn_dim: 32, num_layers: 1, patch_size: [1, 2, 2]}}
text_encoder: {{d_model: 16, num_layers: 1, num_heads: 2}}
num_clips: 64
batch_size: 4
steps: 3
optimizer: {{lr: 1.0e-3}}
eval_clips: 2
eval_steps: 5
"""
PATHS = """
clip: {{num_frames: 5, height: 32, width: 32}}
model: {model}
num_clips: 8
batch_size: 4
steps: 3
optimizer: {{lr: 1.0e-3}}
eval_clips: 2
eval_steps: 5
"""
REWARD = """
clip: {{num_frames: 5, height: 32, width: 32}}
model: {model}
width: 16
sample_steps: [2]
num_samples: 40
num_round_trips: 40
batch_size: 4
word_steps: {word_steps}
steps: {steps}
optimizer: {{lr: 5.0e-3}}
eval_clips: 40
"""


def train(command: Command, kind: str, text: str, output: Path, *options: str) -> dict[str, Tensor]:
    """Weights after a training run."""
    config = output.with_suffix(".yaml")
    config.write_text(text)
    code, out, err = command("train", kind, "--config", config, "--output", output, *options)
    assert code == 0, err
    record = json.loads((output / "training.json").read_text())
    assert out.endswith(f" s: {output}\n")
    for name, value in record["metrics"].items():
        assert 0 <= value <= 1 or name == "rank_correlation", name
    return load_file(next(output.glob("transformer/*.safetensors"), output / "model.safetensors"))


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def test_teacher_is_reproducible_and_starts_where_init_says(command: Command, tiny_wan: Path, tmp_path: Path) -> None:
    text = TEACHER.format(model=tiny_wan)
    first = train(command, "teacher", text, tmp_path / "first")
    assert same(first, train(command, "teacher", text, tmp_path / "again"))
    assert not same(first, train(command, "teacher", text, tmp_path / "other", "--seed", "1"))
    # A learning rate of 0 leaves the weights where they started.
    going_on = text.replace("1.0e-3", "1.0e-30").replace("steps: 3", "steps: 1")
    resumed = train(command, "teacher", going_on, tmp_path / "on", "--set", f"init={tmp_path / 'first'}")
    for key, value in resumed.items():
        torch.testing.assert_close(value, first[key], atol=1e-6, rtol=0)
    assert (tmp_path / "on" / "model_index.json").is_file()
    assert WanBackbone.from_pretrained(tmp_path / "on").unknown_words("a red zebra") == ["zebra"]


def test_teacher_stored_in_half_precision_is_the_same_rounded(command: Command, tiny_wan: Path, tmp_path: Path) -> None:
    text = TEACHER.format(model=tiny_wan)
    whole = train(command, "teacher", text, tmp_path / "whole")
    half = train(command, "teacher", text + "half: true\n", tmp_path / "half")
    assert half.keys() == whole.keys()
    for name, weight in half.items():
        assert torch.equal(weight, whole[name].half()), name
    loaded = WanBackbone.from_pretrained(tmp_path / "half").weights
    assert {weight.dtype for weight in loaded.values()} == {torch.float32}


def test_teacher_carries_its_vae_and_that_vae_s_own_record(command: Command, tiny_wan: Path, tmp_path: Path) -> None:
    train(command, "teacher", TEACHER.format(model=tiny_wan), tmp_path / "first")
    (tmp_path / "first" / "vae" / "training.json").write_text('{"of": "the VAE"}')
    train(command, "teacher", TEACHER.format(model=tmp_path / "first"), tmp_path / "second")
    assert json.loads((tmp_path / "second" / "vae" / "training.json").read_text()) == {"of": "the VAE"}
    weights = [load_file(next((folder / "vae").glob("*.safetensors"))) for folder in (tiny_wan, tmp_path / "second")]
    assert same(*weights)


def test_reward_is_reproducible_and_loads(command: Command, tiny_wan: Path, tmp_path: Path) -> None:
    text = REWARD.format(model=tiny_wan, word_steps=1, steps=3)
    first = train(command, "reward", text, tmp_path / "first")
    assert same(first, train(command, "reward", text, tmp_path / "again"))
    assert not same(first, train(command, "reward", text, tmp_path / "other", "--seed", "1"))
    assert same(first, WordReward.load(tmp_path / "first").state_dict())


VAE = """
clip: {num_frames: 5, height: 32, width: 32}
model: {base_dim: 8, dim_mult: [1, 1, 1], latent_channels: 4, patch_size: 2}
stages:
  - {num_frames: 1, batch_size: 2, steps: 3, lr: 1.0e-2}
  - {num_frames: 5, batch_size: 1, steps: 3, lr: 1.0e-2, trains: decoder}
stats_clips: 32
eval_clips: 16
"""
LATENT = """
clip: {{num_frames: 5, height: 32, width: 32}}
model: {model}
reward: {{kind: word, path: {reward}}}
width: 8
num_samples: 8
num_damaged: 4
num_rendered: 4
num_climbed: 4
rounds: 2
sample_steps: [2]
sample_batch: 4
batch_size: 4
steps: 4
optimizer: {{lr: 1.0e-3}}
eval_clips: 4
"""


@pytest.mark.parametrize("kind", ["vae", "teacher", "paths", "reward", "reward --latent"])
def test_killed_again_and_again_it_is_the_same(
    command: Command, tiny_wan: Path, reward_folders: tuple[Path, Path], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, kind: str,
) -> None:  # fmt: skip
    text = {
        "vae": VAE, "teacher": TEACHER.format(model=tiny_wan) + "checkpoint_every: 1\n",
        "paths": PATHS.format(model=tiny_wan) + "checkpoint_every: 1\n",
        "reward": REWARD.format(model=tiny_wan, word_steps=1, steps=3),
        "reward --latent": LATENT.format(model=tiny_wan, reward=reward_folders[0]),
    }[kind]  # fmt: skip
    monkeypatch.setattr(resumable_steps, "__kwdefaults__", resumable_steps.__kwdefaults__ | {"every": 1})
    config = tmp_path / "mine.yaml"
    config.write_text(text)

    def go(output: str, *options: str) -> Any:
        return command("train", *kind.split(), "--config", config, "--output", tmp_path / output, *options)

    assert go("whole").code == 0
    with dying_in_every_second_step():
        codes = [go("killed").code, *(go("killed", "--resume").code for _ in range(5))]
    assert codes[0] == codes[1] == 130
    assert go("killed", "--resume").code == 0
    files = [sorted(path.relative_to(tmp_path / run) for path in (tmp_path / run).rglob("*.*") if path.is_file())
             for run in ("whole", "killed")]  # fmt: skip
    assert files[0] == files[1]
    for file in (file for file in files[0] if file.suffix == ".safetensors"):
        assert same(load_file(tmp_path / "whole" / file), load_file(tmp_path / "killed" / file)), file
    again = go("killed", "--resume")
    assert (again.code, again.out) == (0, f"done before: {tmp_path / 'killed'}\n")
    changed = go("killed", "--resume", "--seed", "7")
    assert (changed.code, "holds a run of another configuration: seed differ" in changed.err) == (2, True)
    assert "holds a run (--resume goes on with it" in go("killed").err


def test_reward_reads_the_background_after_forty_steps(command: Command, tiny_wan: Path, tmp_path: Path) -> None:
    train(command, "reward", REWARD.format(model=tiny_wan, word_steps=40, steps=40), tmp_path / "reward")
    reward = WordReward.load(tmp_path / "reward")
    clips = [ShapeAttributes("fast", "red", "circle", "left", background) for background in WORDS["background"]]
    logits, _ = reward.logits(render(clips, SHAPES_CLIP, seeded(3)))
    first = VOCABULARY.index(WORDS["background"][0])
    assert logits[:, first : first + len(clips)].argmax(dim=1).tolist() == list(range(len(clips)))


# ------------------------------------------------------------------------------------------------------------ targets


def shown(row: Tensor) -> list[str]:
    return [word for word, there in zip(VOCABULARY, row.tolist(), strict=True) if there]


def test_targets_are_the_words_a_rendered_clip_shows() -> None:
    attributes = ShapeAttributes("slow", "cyan", "square", "up", "white")
    targets = measured_targets(render([attributes], SHAPES_CLIP, seeded(1)))
    assert set(shown(targets.words[0])) == {"slow", "cyan", "square", "up", "white"}
    assert torch.equal(targets.frame_words, targets.words[:, None].expand(-1, 17, -1))
    assert targets.craft.item() > 1.9


def test_a_frame_has_its_own_colour_and_shape() -> None:
    path = {"speed": "slow", "direction": "up", "background": "white"}
    red, blue = (
        render([ShapeAttributes(color=color, shape=shape, **path)], SHAPES_CLIP, seeded(1))
        for color, shape in (("red", "square"), ("blue", "circle"))
    )
    targets = measured_targets(torch.cat([red[:, :8], blue[:, 8:]], dim=1))
    assert set(shown(targets.words[0])) == {"slow", "up", "white"}  # no colour and no shape holds throughout
    assert set(shown(targets.frame_words[0, 0])) == {"slow", "red", "square", "up", "white"}
    assert set(shown(targets.frame_words[0, 16])) == {"slow", "blue", "circle", "up", "white"}


class Oracle(WordReward):
    """Says of clip i, which it knows by its brightness, what it was told."""

    def __init__(self, words: Tensor) -> None:
        super().__init__(VOCABULARY, width=16)
        self.told = words

    def logits(self, videos: Tensor) -> tuple[Tensor, Tensor]:
        row = (videos[:, 0, 0, 0, 0] * 255).round().long()
        clip = torch.cat([8 * self.told[row] - 4, torch.zeros(len(row), 1)], dim=1)
        return clip, clip[:, None].expand(-1, videos.shape[1], -1)


def pool(words: Tensor, prompts: Sequence[str]) -> ClipPool:
    videos = torch.arange(len(prompts)).byte()[:, None, None, None, None].expand(-1, 3, 3, 4, 4)
    return ClipPool(
        videos, ClipTargets(words, words[:, None].expand(-1, 3, -1), torch.ones(len(prompts))), list(prompts)
    )


def test_accuracy_of_one_who_knows_and_one_who_is_always_wrong() -> None:
    prompts = ["a fast red circle moving left on a gray background"] * 40
    words = (torch.rand(40, len(VOCABULARY), generator=seeded(0)) < 0.5).float()
    right = evaluate_reward(Oracle(words), pool(words, prompts))
    wrong = evaluate_reward(Oracle(1 - words), pool(words, prompts))
    assert right["rank_correlation"] == pytest.approx(1, abs=1e-5)
    assert wrong["rank_correlation"] == pytest.approx(-1, abs=0.01)  # ties break by rounding
    for name in ("auc_speed", "auc_color", "auc_shape_by_frame", "auc_background"):
        assert right[name] == 1
        assert wrong[name] == 0
    assert right["shown_color"] == pytest.approx(words[:, VOCABULARY.index("red")].mean().item())
