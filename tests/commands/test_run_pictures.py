"""`run` from a user's own pictures: a list that names them, or the first frames of prepared videos."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from shared import made_once
from wan22_family import build
from wan_i2v_family import build_image_pipeline

from rats_video.config.load import load_config
from rats_video.datasets.prepared.cache import ClipCache
from rats_video.datasets.video.pictures import read_picture
from rats_video.datasets.video.settings import PrepareConfig
from rats_video.datasets.video.shape_clips import list_shapes, render_shape
from rats_video.inference.video import read_mp4
from rats_video.reporting.clips import crop
from rats_video.types import ClipSpec

Command = Callable[..., Any]
CLIP = ClipSpec(num_frames=9, height=32, width=32, fps=8.0)
PROMPTS = (
    "a fast red circle moving left on a gray background",
    "a slow blue square moving up on a white background",
    "a fast green triangle moving right on a black background",
)


@pytest.fixture(scope="module")
def ti2v(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made_once(tmp_path_factory, "i2v-wan22-5b", partial(build, experts=False))


@pytest.fixture(scope="module")
def a14b(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made_once(tmp_path_factory, "i2v-wan22-a14b", partial(build_image_pipeline, clip_sees=0, experts=True))


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for seed in range(4):
        pixels = np.random.default_rng(seed).integers(0, 256, (40, 50, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{seed}.png")
    (folder / "cut.png").write_bytes((folder / "0.png").read_bytes()[:900])
    return folder


def options(config: Path, model: Path, prompts: str) -> list[object]:
    changes = (
        f"model={model}", "clip={num_frames: 9, height: 32, width: 32}", f"prompts={prompts}", "guard={num_clips: 1}",
        "method.gate.level=clip", "training.steps=1", "evaluation.num_clips=1", "evaluation.latency_clips=1",
        "evaluation.diversity=null", "teacher.num_steps=4", "evaluation.teacher_steps=2", "heldout_reward=null",
    )  # fmt: skip
    return ["--config", config, "--device", "cpu", *(word for change in changes for word in ("--set", change))]


def write_list(folder: Path, name: str, rows: list[dict[str, str]]) -> Path:
    (folder / name).write_text("\n".join(map(json.dumps, rows)))
    return folder / name


def test_a_run_from_a_list_of_pictures(
    command: Command, config_file: Path, a14b: Path, pictures: Path, tmp_path: Path
) -> None:
    rows = [
        {"prompt": PROMPTS[0], "image": "0.png", "last_image": "1.png"},
        {"prompt": PROMPTS[0], "image": "2.png", "last_image": "1.png"},  # another clip, not a duplicate
        {"prompt": PROMPTS[2], "image": "cut.png", "last_image": "1.png"},
        {"prompt": PROMPTS[2]},
    ]
    train = write_list(pictures, "train.jsonl", rows)
    heldout = write_list(pictures, "kept.jsonl", [{"prompt": PROMPTS[1], "image": "3.png", "last_image": "0.png"}])
    prompts = f"{{kind: file, train: {train}, heldout: {heldout}, first_frame: true}}"
    done = command("run", *options(config_file, a14b, prompts), "--output", tmp_path / "run")
    assert done.code == 0, done.err
    assert done.err.count(f"warning: {train}, row 3: image: {pictures / 'cut.png'}: damaged") == 1
    assert done.err.count(f"warning: {train}, row 4: image: names no picture") == 1
    assert "were there already" not in done.err
    [clip] = json.loads((tmp_path / "run/samples/manifest.json").read_text())
    written = tmp_path / "run/samples/pictures"
    for kind, name in (("first", "3.png"), ("last", "0.png")):
        expected = read_picture(pictures / name, CLIP, where="")
        assert torch.equal(read_picture(written / f"000-{kind}.png", CLIP, where=""), expected)
    assert {"image", "last_image"} <= clip.keys()
    [pair] = json.loads((tmp_path / "run/comparison/index.json").read_text())
    assert [panel["title"] for panel in pair["panels"]] == ["given", "teacher", "base", "student"]
    assert "nfe" not in pair["panels"][0]
    frames, _ = read_mp4(tmp_path / "run/comparison" / pair["file"])
    scale = pair["panels"][0]["box"][3] // CLIP.height
    expected = read_picture(pictures / "3.png", CLIP, where="").repeat_interleave(scale, 1).repeat_interleave(scale, 2)
    shown = crop(frames, pair["panels"][0]["box"])
    assert shown is not None
    assert (shown - expected).abs().mean() < 0.05  # of a video
    rows = json.loads((tmp_path / "run/evaluation/evaluation.json").read_text())["rows"]
    assert [row["arm"] for row in rows] == ["teacher", "base", "student"]
    for row in rows:
        assert {"first_frame_psnr", "picture_likeness", "dynamic_degree_share", "displacement"} <= row["metrics"].keys()
    assert rows[0]["metrics"]["dynamic_degree_share"]["mean"] == pytest.approx(1)
    guard = json.loads((tmp_path / "run/guard.json").read_text())
    assert len(guard["teacher"]["first_frame_psnr"]) == 1


def test_videos_are_prepared_with_their_first_frames_and_trained_from_them(
    command: Command, config_file: Path, ti2v: Path, tmp_path: Path
) -> None:
    cache, folder = tmp_path / "cache", ("--set", f"model={ti2v}", "--device", "cpu")
    sets = ("fps=8", "buckets=[{num_frames: 9, height: 32, width: 32}]", "heldout=0.4", "num_shapes=6", "shard_clips=4")
    changes = [word for change in sets for word in ("--set", change)]
    done = command("prepare", "shapes", "--output", cache, "--config", "tiny", *folder, *changes)
    assert done.code == 0, done.err
    cfg = load_config(PrepareConfig, "tiny", group="prepare", overrides=[f"model={ti2v}", *sets])
    rendered = {source.name: render_shape(source, cfg).clips[0].frames[0] for source in list_shapes(cfg)}
    records = ClipCache(cache).records
    assert len(records) == 6
    for record, first in zip(records, ClipCache(cache).first_frames(records), strict=True):
        assert torch.equal(first, rendered[record.source])
    term = f"method.real_data={{path: {cache}, weight: 0.5}}"
    prompts = f"{{kind: prepared, path: {cache}, first_frame: true}}"
    done = command(
        "distill", *options(config_file, ti2v, prompts), "--output", tmp_path / "run", "--set", term, "--set",
        "compute.cache_text=true", "--set", "guard=null",
    )  # fmt: skip
    assert done.code == 0, done.err
    [row] = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert row["real_data/loss"] > 0


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"prompt": PROMPTS[0]}], "no row of it has an image (add the column, docs/prompts.md, or set prompts.first_"),
        ([{"prompt": PROMPTS[0], "image": "cut.png"}], "no row has a picture that can be read, the first: "),
        (
            [{"prompt": PROMPTS[0], "image": "0.png"}, {"prompt": PROMPTS[2], "image": "1.png", "last_image": "2.png"}],
            "row 1: has no last_image, which other rows have (give it to all rows or to none",
        ),
        (
            [{"prompt": PROMPTS[0], "image": "0.png", "last_image": "1.png"}],
            "prompts: this Wan takes a first picture alone, and the list has a last_image (leave the column out)",
        ),
    ],
)  # fmt: skip
def test_a_list_without_use_is_one_line(
    command: Command,
    config_file: Path,
    ti2v: Path,
    pictures: Path,
    tmp_path: Path,
    rows: list[dict[str, str]],
    message: str,
) -> None:
    train = write_list(pictures, "train.jsonl", rows)
    kept = [{**rows[-1], "prompt": PROMPTS[1]}]
    prompts = f"{{kind: file, train: {train}, heldout: {write_list(pictures, 'k.jsonl', kept)}, first_frame: true}}"
    done = command("distill", *options(config_file, ti2v, prompts), "--output", tmp_path / "run")
    errors = [line for line in done.err.splitlines() if not line.startswith("warning: ")]
    assert done.code == 2
    assert len(errors) == 1
    assert message in errors[0]
    assert not (tmp_path / "run").exists()
