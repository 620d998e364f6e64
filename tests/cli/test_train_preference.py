"""`train reward --data`, driven as a user would, on a small cache of the tiny pipeline's latents."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from killing import dying_in_every_second_step
from outcomes import names
from safetensors.torch import load_file

from rats_video.backbones.identity import vae_digest
from rats_video.condition import Condition
from rats_video.datasets.prepared.cache import (
    CLIPS,
    FORMAT,
    CacheManifest,
    ClipCache,
    ClipRecord,
    save_shard,
    write_lines,
)
from rats_video.datasets.shapes.corruptions import CORRUPTIONS
from rats_video.pretraining.resumable import resumable_steps
from rats_video.rewards.word import WordReward
from rats_video.seeds import seeded

Command = Callable[..., Any]
NUM = 24
CONFIG = """
model: {model}
width: 16
num_words: 4
word_count: 2
batch_size: 4
steps: 3
look_every: 1
validation_pairs: 4
optimizer: {{lr: 5.0e-3}}
"""


@pytest.fixture(scope="module")
def cache(tiny_wan: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 clips of 5 x 32 x 32, the last four held out."""
    folder = tmp_path_factory.mktemp("caches") / "cache"
    latents = torch.randn(NUM, 4, 2, 4, 4, generator=seeded(1))
    save_shard(folder / "shards" / "a.safetensors", latents, Condition(torch.zeros(NUM, 1, 16)))
    write_lines(folder / CLIPS, [
        ClipRecord(f"{i:03d}_0", f"{i}.mp4", f"{i:03d}", 0.0, 0.6, f"a {('cat', 'dog')[i % 2]} in motion", 5, 32, 32,
                   "train" if i < 20 else "heldout", "a.safetensors", i)
        for i in range(NUM)
    ], "clips")  # fmt: skip
    CacheManifest(FORMAT, "tiny-wan", "Wan", vae_digest(tiny_wan), "", {}, 8.0, complete=True).save(folder)
    return folder


@pytest.fixture
def train(command: Command, tiny_wan: Path, tmp_path: Path, cache: Path) -> Command:
    """`train reward --data CACHE` into a folder of a name."""
    config = tmp_path / "mine.yaml"
    config.write_text(CONFIG.format(model=tiny_wan))

    def call(name: str, *options: object, data: Path = cache) -> Any:
        return command("train", "reward", "--data", data, "--config", config, "--output", tmp_path / name, *options)

    return call


@pytest.fixture
def preferences(tmp_path: Path) -> Path:
    path = tmp_path / "my prefs.jsonl"
    path.write_text("".join(f'{{"preferred": "{i}.mp4", "rejected": "{i + 1}.mp4"}}\n' for i in range(0, NUM, 2)))
    return path


def test_from_corruptions(train: Command, command: Command, tmp_path: Path) -> None:
    code, out, err = train("out")
    assert code == 0, err
    output = tmp_path / "out"
    assert "train 16, choosing 4, validation 4, left out 0\nwords: dog cat\n" in out
    record = json.loads((output / "training.json").read_text())
    kinds = ["all", *(way.__name__ for way in CORRUPTIONS)]
    assert {name: list(found) for name, found in record["accuracy"].items()} == {
        "reward": kinds, "before": kinds, "baseline": kinds
    }  # fmt: skip
    whole = record["accuracy"]["reward"]["all"]
    assert (whole["num_pairs"], whole["num_sources"]) == (28, 4)
    assert 0 <= whole["low"] <= whole["share"] <= whole["high"] <= 1
    # It says which of two: not a success where the interval reaches a half.
    assert ("no better than chance" in err) == (whole["low"] <= 0.5)
    assert ("rats-video distill --set reward.kind=word" in out) == (whole["low"] > 0.5)
    assert sorted(path.name for path in output.iterdir()) == [
        "config.json", "config.resolved.yaml", "data.json", "model.safetensors", "training.json",
    ]  # fmt: skip
    checked = command(
        "rewards", "check", "reward", "--set", "reward.kind=word", "--set", f"reward.path={output}",
        "--set", "clip={num_frames: 5, height: 32, width: 32}",
    )  # fmt: skip
    assert checked.code == 0, checked.err
    assert "gradient reaches 5 of 5 frames" in checked.out


def test_from_preferences_on_held_out_sources(train: Command, preferences: Path, tmp_path: Path) -> None:
    code, out, err = train("out", "--preferences", preferences)
    assert code == 0, err
    assert "train 7, choosing 2, validation 3, left out 0\n" in out
    record = json.loads((tmp_path / "out" / "training.json").read_text())
    assert record["config"]["preferences"] == str(preferences)
    assert list(record["accuracy"]["reward"]) == ["all"]
    assert record["accuracy"]["reward"]["all"]["num_pairs"] == 3  # three pairs are never more than chance
    assert f"warning: {tmp_path / 'out'}: no better than chance on held-out pairs" in err
    assert "rats-video distill" not in out
    assert WordReward.load(tmp_path / "out").any_prompt


def test_one_clip_is_trained_on_where_nothing_shall_be_held_out(train: Command, tmp_path: Path, cache: Path) -> None:
    shutil.copytree(cache, one := tmp_path / "one")
    lines = (one / CLIPS).read_text().splitlines(keepends=True)
    (one / CLIPS).write_text(lines[0])
    what = f"{one}: 1 clip of 1 source cannot be split by source into some to train on and some to validate on (give "
    refused(train("none", data=one), f"{what}more, of other sources, or --set validation_share=0 trains on all, unval")
    outcome = train("all", "--set", "validation_share=0", data=one)
    assert outcome.code == 0, outcome.err
    assert "train 1, choosing 0, validation 0, left out 0\n" in outcome.out
    assert f"warning: {tmp_path / 'all'}: nothing was held out: nobody knows what it tells apart" in outcome.err
    record = json.loads((tmp_path / "all" / "training.json").read_text())
    assert (record["accuracy"], record["metrics"]) == ({}, {})
    assert "none" not in names(tmp_path)
    (one / CLIPS).write_text(lines[-1])  # held out by `prepare`
    for share in ("0", "0.2"):
        outcome = train("none", "--set", f"validation_share={share}", data=one)
        refused(outcome, f"{what}more, of other sources, or prepare with a smaller heldout share: --set heldout=0")


@pytest.mark.parametrize("with_preferences", [False, True])
def test_killed_again_and_again_it_is_the_same(
    train: Command, preferences: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, with_preferences: bool
) -> None:
    options = ["--preferences", preferences] if with_preferences else []
    monkeypatch.setattr(resumable_steps, "__kwdefaults__", resumable_steps.__kwdefaults__ | {"every": 1})
    assert train("whole", *options).code == 0
    with dying_in_every_second_step():
        assert [train("killed", *resume, *options).code for resume in ([], ["--resume"])] == [130, 130]
    assert train("killed", "--resume", *options).code == 0
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "killed"))
    assert all(torch.equal(one[name], other[name]) for name in one)
    records = [json.loads((tmp_path / name / "training.json").read_text()) for name in ("whole", "killed")]
    assert records[0]["accuracy"] == records[1]["accuracy"]
    again = train("killed", "--resume", *options)
    assert (again.code, again.out) == (0, f"done before: {tmp_path / 'killed'}\n")
    assert "seed differ" in train("killed", "--resume", "--seed", "7", *options).err


def test_another_cache_in_the_same_place_is_no_resume(
    train: Command, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = tmp_path / "copy"
    copy.symlink_to(cache)

    def killed(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.Optimizer, "zero_grad", killed)
        assert train("out", data=copy).code == 130
    copy.unlink()
    copy.mkdir()
    (copy / "shards").symlink_to(cache / "shards")
    (copy / "manifest.json").symlink_to(cache / "manifest.json")
    write_lines(copy / CLIPS, ClipCache(cache).records[1:], "clips")
    outcome = train("out", "--resume", data=copy)
    assert outcome.code == 2
    assert "holds a run of another configuration: data differ" in outcome.err


def refused(outcome: Any, expected: str) -> None:
    assert outcome.code == 2, outcome
    assert "Traceback" not in outcome.err
    assert expected in outcome.err.splitlines()[-1]


def test_mistakes_are_one_line_and_leave_nothing(
    train: Command, cache: Path, preferences: Path, tmp_path: Path
) -> None:
    refused(train("x", data=tmp_path / "nowhere"), "no prepared clips here (make them: rats-video prepare)")
    refused(train("x", "--set", "model=tiny-wan"), "was prepared with another VAE (tiny-wan) than ")
    refused(train("x", "--latent"), "--latent: cannot be used with --data")
    refused(train("x", "--preferences", tmp_path / "none.jsonl"), "none.jsonl: cannot read it")
    preferences.write_text(preferences.read_text() + '{"preferred": "0.mp4", "rejected": "77.mp4"}\n')
    refused(train("x", "--preferences", preferences), "line 13: '77.mp4' is neither a source nor a clip")
    assert not (tmp_path / "x").exists()

    one = tmp_path / "one"
    one.mkdir()
    CacheManifest.load(cache).save(one)
    write_lines(one / CLIPS, ClipCache(cache).records[:1], "clips")
    refused(
        train("y", data=one), "1 clip of 1 source cannot be split by source into some to train on and some to validate"
    )
    assert not (tmp_path / "y").exists()
    write_lines(one / CLIPS, [replace(record, num_frames=1) for record in ClipCache(cache).records], "clips")
    refused(train("y", "--overwrite", data=one), "no clip has the 5 frames that are damaged in time")


def test_preferences_without_data(command: Command, tmp_path: Path) -> None:
    refused(
        command("train", "reward", "--preferences", tmp_path / "p.jsonl"),
        "--preferences: are of prepared clips (give these with --data CACHE)",
    )


def test_a_baseline_that_cannot_judge_these_captions_is_left_out(train: Command, tmp_path: Path) -> None:
    code, _, err = train("out", "--set", "baseline={kind: word, path: shapes-reward}", "--set", "steps=1")
    assert code == 0
    assert "warning: baseline: left out: the reward knows no word of 'a " in err
    assert "baseline" not in json.loads((tmp_path / "out" / "training.json").read_text())["accuracy"]
