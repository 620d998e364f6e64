"""`rewards list`, `check` and `convert` as a user calls them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from safetensors.torch import load_file

from rats_video.rewards import kinds
from rats_video.rewards.reward import reward_kinds
from rats_video.rewards.word import WordReward

Command = Callable[..., Any]


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def rows(out: str) -> list[list[str]]:
    """Of the table, without titles."""
    return [cells(line) for line in out.splitlines() if line.startswith("|")][2:]


def test_every_kind_is_listed_with_what_its_class_says(command: Command) -> None:
    code, out, err = command("rewards", "list")
    assert (code, err) == (0, "")
    listed = {row[0]: row[1:] for row in rows(out)}
    kinds = reward_kinds()
    assert list(listed) == list(kinds)
    assert {"word", "pickscore", "clip_score", "sum"} <= set(kinds)
    for kind, (per, _, _, scores) in listed.items():
        assert per == kinds[kind].per
        assert (kinds[kind].__doc__ or "").startswith(scores)
        assert scores
    assert listed["word"][2] == "give path"
    assert listed["pickscore"][1:3] == ["yes", "no"]
    source, folder = "yuvalkirstain/PickScore_v1", "models/PickScore_v1"
    line = f"pickscore: weights of {source}; in {folder}; get them, 7.9 GB: hf download {source} --local-dir {folder}"
    assert line in out.splitlines()


def test_weights_are_looked_for_where_the_config_says(
    command: Command, config_file: Path, reward_folders: tuple[Path, Path], tmp_path: Path
) -> None:
    reward, heldout = reward_folders
    path = tmp_path / "sum.yaml"
    path.write_text(
        f"extends: {config_file}\nreward: {{kind: sum, terms: {{a: {{reward: {{path: {reward}}}}}, "
        "b: {reward: {kind: clip_score, path: nowhere}}}}\n"
    )
    code, out, _ = command("rewards", "list", "--config", path)
    assert code == 0
    at_hand = [(kind, here) for kind, _, _, here, _ in rows(out)]
    assert at_hand.count(("word", "yes")) == 2
    assert ("clip_score", "no") in at_hand
    lines = out.splitlines()
    assert any(line.endswith(f"; in {reward} (reward.terms.a.reward)") for line in lines)
    assert any(line.endswith(f"; in {heldout} (heldout_reward)") for line in lines)
    assert any("; in nowhere (reward.terms.b.reward)" in line for line in lines)


@pytest.mark.parametrize("kind", reward_kinds())
def test_a_kind_says_all_that_is_asked_of_it(kind: str) -> None:
    member = reward_kinds()[kind]
    assert member.per in {"frame", "clip"}
    assert member.source
    assert [name for name in ("build", "on_meta", "sources") if not callable(getattr(member, name, None))] == []
    assert set(member.folders) <= set(member.model_fields)


def test_a_kind_is_one_file_and_one_line() -> None:
    package = Path(kinds.__file__).parent
    files = [path for room in (package, package.parent / "planning") for path in room.glob("*.py")]
    for member in get_args(kinds.SingleRewardConfig):
        own = f"{member.__module__.rpartition('.')[2]}.py"
        name = re.compile(rf"\b{member.__name__}\b")
        assert {path.name for path in files if name.search(path.read_text())} <= {own, "kinds.py"}


@pytest.mark.parametrize("name", ["reward", "heldout_reward", "word"])
def test_check_prints_scores_and_gradient(command: Command, config_file: Path, name: str) -> None:
    code, out, err = command("rewards", "check", name, "--config", config_file, "--device", "cpu")
    assert (code, err) == (0, "")
    first, *lines = out.splitlines()
    key = "reward" if name == "word" else name
    assert first == f"{key}: sound on two clips of 5 frames, 32x32, on cpu"
    score = next(line.split()[1:] for line in lines if line.split()[0] == "score")
    assert len(set(map(float, score))) == 2
    (reach,) = (line for line in lines if "gradient reaches" in line)
    assert "gradient reaches 5 of 5 frames" in reach
    least, mean, greatest = (float(value) for value in re.findall(r"(?:least|mean|greatest) (\S+?),?(?= |$)", reach))
    assert 0 < least <= mean <= greatest
    assert re.search(r"forward \d+\.\d{3} s, backward \d+\.\d{3} s", out)


def test_check_of_a_sum_reports_each_term(
    command: Command, config_file: Path, reward_folders: tuple[Path, Path]
) -> None:
    terms = [f"reward.terms.{name}.reward.path={folder}" for name, folder in zip("ab", reward_folders, strict=True)]
    sets = [part for change in ("reward.kind=sum", *terms) for part in ("--set", change)]
    code, out, err = command("rewards", "check", "reward", "--config", config_file, *sets)
    assert code == 0, err
    assert [line.split(":")[0] for line in out.splitlines() if "sound" in line] == [
        "reward.terms.a.reward", "reward.terms.b.reward"
    ]  # fmt: skip


@pytest.fixture
def nan_reward(reward_folders: tuple[Path, Path], tmp_path: Path) -> Path:
    reward = WordReward.load(reward_folders[0])
    with torch.no_grad():
        reward.frame_head.bias.fill_(torch.nan)
    reward.save(tmp_path / "nan")
    return tmp_path / "nan"


@pytest.mark.parametrize(
    ("name", "changes", "line"),
    [
        (
            "pickscore",
            (),
            "reward.path: no such folder: models/PickScore_v1 (7.9 GB: hf download yuvalkirstain/PickScore_v1",
        ),
        ("picksore", (), "NAME: no reward 'picksore' (did you mean 'pickscore'?)"),
        (
            "heldout_reward",
            ("heldout_reward=null",),
            "heldout_reward: the configuration has none (--set heldout_reward.",
        ),
        ("reward", ("reward.path=NAN",), "nan/model.safetensors: frame_head.bias holds NaN or infinity (19 of its 19"),
        ("reward", ("reward.path=EMPTY",), "not a word reward: "),
        ("reward", ("reward.pth=x",), "--set reward.pth: unknown key (did you mean 'path'?)"),
    ],
)
def test_what_is_not_sound_or_not_there_is_one_line(
    command: Command,
    config_file: Path,
    nan_reward: Path,
    tmp_path: Path,
    name: str,
    changes: tuple[str, ...],
    line: str,
) -> None:
    (tmp_path / "empty").mkdir()
    known = {"NAN": str(nan_reward), "EMPTY": str(tmp_path / "empty")}
    sets = [part for change in changes for part in ("--set", re.sub(r"[A-Z]+$", lambda m: known[m[0]], change))]
    code, out, err = command("rewards", "check", name, "--config", config_file, *sets)
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert line in err
    assert err.count("\n") == 1


def test_a_run_with_an_unsound_reward_is_refused_before_its_folder_is_made(
    command: Command, config_file: Path, nan_reward: Path, tmp_path: Path
) -> None:
    sets = ("--set", f"reward.path={nan_reward}")
    code, _, err = command("distill", "--config", config_file, "--output", tmp_path / "run", *sets)
    assert code == 2
    assert f"error: {nan_reward}/model.safetensors: frame_head.bias holds NaN or infinity (19 of its 19 numbers)" in err
    assert not (tmp_path / "run").exists()


def test_a_sum_is_trained_on_and_logged_by_term(
    command: Command, config_file: Path, reward_folders: tuple[Path, Path], tmp_path: Path
) -> None:
    first, second = reward_folders
    sets = {
        "reward.kind": "sum", "reward.terms.a.reward.path": first, "reward.terms.b.reward.path": second,
        "reward.terms.b.weight": 0.5, "reward.terms.b.mean": -1, "teacher.cache": tmp_path / "cache",
    }  # fmt: skip
    changes = [part for key, value in sets.items() for part in ("--set", f"{key}={value}")]
    code, _, err = command("distill", "--config", config_file, "--output", tmp_path / "run", *changes)
    assert code == 0, err
    log = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    for line in log:
        row = json.loads(line)
        expected = row["reward/student/a"] + 0.5 * (row["reward/student/b"] + 1)
        assert row["reward/student"] == pytest.approx(expected, abs=1e-4)
        assert "reward/student/b/quality" in row
    (identity,) = (tmp_path / "cache").glob("*/identity.json")
    assert json.loads(identity.read_text())["reward"]["terms"]["b"] == {
        "weight": 0.5, "mean": -1.0, "spread": 1.0, "reward": {"kind": "word", "blind_to": []}
    }  # fmt: skip


def test_convert_writes_safetensors_and_refuses_code(command: Command, tmp_path: Path) -> None:
    torch.save({"state_dict": {"a.weight": torch.arange(3.0)}}, tmp_path / "a.pt")
    code, out, _ = command("rewards", "convert", tmp_path / "a.pt", tmp_path / "out")
    assert (code, out) == (0, f"weights: {tmp_path / 'out' / 'model.safetensors'}\n")
    assert load_file(tmp_path / "out" / "model.safetensors")["a.weight"].tolist() == [0, 1, 2]
    torch.save({"a": torch.nn.Linear(1, 1)}, tmp_path / "code.pt")
    code, _, err = command("rewards", "convert", tmp_path / "code.pt", tmp_path / "no")
    assert code == 2
    assert err.count("\n") == 1
    assert not (tmp_path / "no").exists()


def test_check_tells_a_reward_the_frames_a_second_of_its_clips(
    command: Command, config_file: Path, tmp_path: Path
) -> None:
    reward = f"reward={{kind: video_align, path: {tmp_path}}}"  # found, but nothing in it: its clips come before that
    code, _, err = command("rewards", "check", "reward", "--config", config_file, "--set", reward)
    assert code == 2
    assert err.startswith(f"error: {tmp_path}")
    assert "frames a second" not in err
