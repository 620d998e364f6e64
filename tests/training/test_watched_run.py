"""A run that is watched: training does not notice, clips and trackers agree with the run, also when it goes on."""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from few_calls import FEW_CALLS
from PIL import Image
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer import event_file_writer

from rats_video.commands.run_steps import _evaluate
from rats_video.commands.train_student import train_student
from rats_video.distillation.settings import DistillConfig
from rats_video.errors import UserError
from rats_video.evaluation.tables import ArmRow, MetricValue, write_rows
from rats_video.inference.video import read_mp4
from rats_video.progress import Pace
from rats_video.runtime import ALONE
from rats_video.training.faults import StepFault
from rats_video.training.metrics import read_metrics
from rats_video.training.run_folder import RunFolder
from rats_video.training.trackers import TensorBoard
from rats_video.training.update import Updater
from rats_video.training.validation import to_bytes

CLIPS = "validation={every: 2, num_clips: 2}"
BOARD = "tracking.trackers=[tensorboard]"
Run = Callable[..., RunFolder]


@pytest.fixture(autouse=True)
def event_files_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files of one second are read in the order of their numbers as text, where 10 comes before 9."""
    monkeypatch.setattr(event_file_writer, "_global_uid", event_file_writer.AtomicCounter(0))


@pytest.fixture
def run(make_config: Callable[..., DistillConfig], tmp_path: Path) -> Run:
    def call(name: str, *overrides: str) -> RunFolder:
        folder = RunFolder(tmp_path / name)
        train_student(make_config(*FEW_CALLS, *overrides), folder, ALONE, resume=True, overwrite=False)
        return folder

    return call


def rows(run: RunFolder) -> list[dict[str, float]]:
    return [{name: v for name, v in row.items() if name != "seconds"} for row in read_metrics(run.metrics)]


def last_weights(run: RunFolder) -> dict[str, torch.Tensor]:
    return load_file(max(run.checkpoints.glob("step-*")) / "student.safetensors")


def index(run: RunFolder) -> list[dict[str, Any]]:
    return list(json.loads((run.validation / "index.json").read_text()))


def board(run: RunFolder) -> EventAccumulator:
    return EventAccumulator(str(run.tensorboard), size_guidance={"images": 0, "scalars": 0}).Reload()


def scalars(events: EventAccumulator, name: str) -> list[tuple[int, float]]:
    return [(event.step, event.value) for event in events.Scalars(name)]


# ----------------------------------------------------------------------------------------------------------- clips


@pytest.mark.parametrize("weights", ["full", "lora"])
def test_training_does_not_notice(run: Run, weights: str) -> None:
    kind = () if weights == "full" else ("student.weights={kind: lora, rank: 2}",)
    torch.manual_seed(3)
    watched = run("watched", "training.steps=3", CLIPS, BOARD, *kind)
    drawn = torch.rand(1)
    torch.manual_seed(3)
    alone = run("alone", "training.steps=3", *kind)
    assert torch.equal(drawn, torch.rand(1))  # nor does the global generator
    assert rows(watched) == rows(alone)
    for name, weight in last_weights(watched).items():
        assert torch.equal(weight, last_weights(alone)[name])
    assert not alone.validation.exists()


def test_clips_of_every_look_are_there(run: Run) -> None:
    folder = run("run", "training.steps=3", CLIPS)
    looks = index(folder)
    assert [look["step"] for look in looks] == [0, 2, 3]
    for look in looks:
        assert len({clip["prompt"] for clip in look["clips"]}) == 2
        with Image.open(folder.validation / look["sheet"]) as sheet:
            assert sheet.size == (5 * (96 + 2) - 2, 2 * (96 + 2) - 2)
        for clip in look["clips"]:
            assert read_mp4(folder.validation / clip["file"])[0].shape == (5, 3, 32, 32)
            assert {"reward", "heldout_reward", "saturation"} <= clip["scores"].keys()
    first, last = looks[0]["clips"][0], looks[-1]["clips"][0]
    assert first["prompt"] == last["prompt"]
    assert first["scores"]["reward"] != last["scores"]["reward"]
    page = (folder.validation / "index.html").read_text()
    assert page.count("<video") == 3 * 2
    assert f'src="{last["file"]}"' in page


def test_clips_are_the_guards(run: Run) -> None:
    folder = run("run", "training.steps=2", CLIPS, "guard={every: 2, num_clips: 2}")
    looks = {look["step"]: look["scores"] for look in json.loads(folder.guard.read_text())["looks"]}
    for look in index(folder):
        assert [clip["scores"]["reward"] for clip in look["clips"]] == pytest.approx(looks[look["step"]]["reward"])


def test_clips_take_the_evaluations_asked_for(run: Run) -> None:
    options = ("training.steps=1", "teacher.num_steps=4", "student.num_steps=[4]", CLIPS)
    four, two = run("four", *options), run("two", *options, "validation.nfe=2")
    scores = [index(each)[0]["clips"][0]["scores"]["reward"] for each in (four, two)]
    assert scores[0] != scores[1]


def test_run_that_goes_on_repeats_and_loses_nothing(run: Run) -> None:
    options = (CLIPS, "training.checkpoint_every=1")
    whole = run("whole", "training.steps=4", *options)
    run("halves", "training.steps=2", *options)
    kept = (run("halves", "training.steps=2", *options).validation / "step-000002" / "scores.json").stat().st_mtime_ns
    halves = run("halves", "training.steps=4", *options)
    assert index(halves) == index(whole)
    assert (halves.validation / "step-000002" / "scores.json").stat().st_mtime_ns == kept


def test_run_that_went_back_replaces_what_came_later(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    options = ("training.steps=4", "validation={every: 1, num_clips: 1}", "training.checkpoint_every=2", BOARD)
    plain, update, faults = run("plain", *options), Updater._update, [1]

    def faulty(updater: Updater, method: Any, batch: Any, step: int) -> dict[str, float]:
        if step == 3 and faults:
            faults.pop()
            raise StepFault("the weights are lost", in_weights=True)
        return update(updater, method, batch, step)

    monkeypatch.setattr(Updater, "_update", faulty)
    back = run("back", *options, "training.faults.lower=0.5")
    looks, expected = index(back), index(plain)
    assert [look["step"] for look in looks] == [0, 1, 2, 3, 4]
    assert looks[:3] == expected[:3]
    assert looks[3] != expected[3]  # the lower rate
    losses = scalars(board(back), "loss")
    assert [step for step, _ in losses] == [1, 2, 3, 4]
    assert [value for _, value in losses] == pytest.approx([row["loss"] for row in rows(back)])
    assert [event.step for event in board(back).Images("validation")] == [0, 1, 2, 3, 4]


def test_clip_that_is_no_picture_is_named(
    run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = iter([True, False, False, False])
    monkeypatch.setattr("rats_video.training.validation.to_bytes", lambda video: None if next(bad) else to_bytes(video))
    folder = run("run", "training.steps=1", CLIPS)
    assert [clip["file"] is None for clip in index(folder)[0]["clips"]] == [True, False]
    assert "warning: validation: not finite after step 0" in capsys.readouterr().err
    assert to_bytes(torch.full((1, 3, 2, 2), float("nan"))) is None
    assert to_bytes(torch.tensor([[[[-1.0, 0.5, 2.0]]]]))[0, 0, 0].tolist() == [0, 128, 255]  # type: ignore[index]


def test_clips_that_cannot_be_written_stop_nothing(
    run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise UserError("disk full")

    monkeypatch.setattr("rats_video.training.validation.write_mp4", full)
    assert len(rows(run("run", "training.steps=2", CLIPS))) == 2
    assert "warning: validation: disk full; the training goes on" in capsys.readouterr().err


# -------------------------------------------------------------------------------------------------------- trackers


def test_tensorboard_holds_the_log(run: Run) -> None:
    options = (CLIPS, BOARD, "guard={every: 2, num_clips: 2}", "training.checkpoint_every=1")
    run("run", "training.steps=2", *options)
    folder = run("run", "training.steps=4", *options)
    events, log = board(folder), read_metrics(folder.metrics)
    for name in log[0].keys() - {"step"}:
        assert [step for step, _ in scalars(events, name)] == [1, 2, 3, 4]
        assert [value for _, value in scalars(events, name)] == pytest.approx([row[name] for row in log])
    looks = json.loads(folder.guard.read_text())["looks"]
    seen = scalars(events, "guard/reward")
    assert [step for step, _ in seen] == [look["step"] for look in looks] == [0, 2, 4]
    assert seen[1][1] == pytest.approx(sum(looks[1]["scores"]["reward"]) / 2)
    means = [sum(clip["scores"]["reward"] for clip in look["clips"]) / 2 for look in index(folder)]
    assert [value for _, value in scalars(events, "validation/reward")] == pytest.approx(means)
    assert [event.step for event in events.Images("validation")] == [0, 2, 4]
    config = events.Tensors("config/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "    num_clips: 2" in config


def test_rows_are_sent_every_so_often(run: Run) -> None:
    folder = run("run", "training.steps=5", BOARD, "tracking.every=2")
    assert [step for step, _ in scalars(board(folder), "loss")] == [2, 4, 5]


def test_tracker_that_fails_is_warned_of_once(
    run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: Any) -> None:
        raise ConnectionError("no route to host\nand more")

    monkeypatch.setattr(TensorBoard, "log", broken)
    assert len(rows(run("run", "training.steps=3", BOARD))) == 3
    said = capsys.readouterr().err
    assert said.count("warning: tracking: tensorboard is told no more: no route to host; the training goes on") == 1


def test_tracker_that_is_not_installed_is_refused(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("accelerate.utils.is_wandb_available", lambda: False)
    with pytest.raises(UserError, match=r"tracking\.trackers: wandb is not installed .*rats-video\[trackers\]"):
        run("run", "tracking.trackers=[wandb]")
    assert not (tmp_path / "run").exists()


def wandb_records(folder: Path) -> list[Any]:
    """What an offline run has written: blocks of 32 KiB of records, each behind a header of 7 bytes."""
    from wandb.proto import wandb_internal_pb2

    (file,) = folder.glob("offline-run-*/*.wandb")
    data, position, part, found = file.read_bytes(), 7, b"", []
    while position + 7 <= len(data):
        if 2**15 - position % 2**15 < 7:  # no room for a header: the next block
            position += 2**15 - position % 2**15
            continue
        length, kind = int.from_bytes(data[position + 4 : position + 6], "little"), data[position + 6]
        part += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in {1, 4}:  # whole, or the last part
            found.append(wandb_internal_pb2.Record.FromString(part))
            part = b""
    return found


def test_wandb_holds_the_log(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name, value in {"MODE": "offline", "SILENT": "true", "CACHE_DIR": tmp_path, "DATA_DIR": tmp_path}.items():
        monkeypatch.setenv(f"WANDB_{name}", str(value))
    folder = run("run", "training.steps=2", CLIPS, "tracking={trackers: [wandb], project: films, name: mine}")
    for _ in range(200):  # its own process writes
        records = wandb_records(folder.root / "wandb")
        if any(each.WhichOneof("record_type") == "exit" for each in records):
            break
        time.sleep(0.1)
    (told,) = (each.run for each in records if each.WhichOneof("record_type") == "run")
    assert (told.project, told.display_name) == ("films", "mine")
    assert told.run_id == json.loads(folder.tracking.read_text())["id"]
    history = [
        {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in each.history.item}
        for each in records
        if each.WhichOneof("record_type") == "history"
    ]
    sent = [(row["step"], row["loss"]) for row in history if "loss" in row]
    assert sent == [(row["step"], row["loss"]) for row in read_metrics(folder.metrics)]
    clips = [row for row in history if "validation/clip-00/caption" in row]
    assert [row["step"] for row in clips] == [0, 2]
    assert clips[0]["validation/clip-00/caption"] == index(folder)[0]["clips"][0]["prompt"]


def test_trackio_holds_the_log_of_a_run_that_goes_on(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from trackio import sqlite_storage, utils

    for module in (sqlite_storage, utils):
        monkeypatch.setattr(module, "TRACKIO_DIR", tmp_path / "trackio")
    options = (CLIPS, "training.checkpoint_every=1", "tracking={trackers: [trackio], project: films}")
    run("run", "training.steps=1", *options)
    folder = run("run", "training.steps=2", *options)
    assert capsys.readouterr().out == ""
    with closing(sqlite3.connect(tmp_path / "trackio" / "films.db")) as base:
        logged = [
            (name, step, json.loads(row))
            for name, step, row in base.execute("select run_name, step, metrics from metrics order by id")
        ]
    assert {name for name, *_ in logged} == {f"run-{json.loads(folder.tracking.read_text())['id']}"}
    sent = [(step, row["loss"]) for _, step, row in logged if "loss" in row]
    assert sent == [(row["step"], row["loss"]) for row in read_metrics(folder.metrics)]
    assert [step for _, step, row in logged if "validation/clip-00" in row] == [0, 1, 2]


def test_evaluation_is_sent_too(
    make_config: Callable[..., DistillConfig], run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ("training.steps=1", BOARD)
    folder = run("run", *options)
    row = ArmRow(arm="student", num_steps=4, nfe=4, num_clips=2, seconds_per_clip=1.0,
                 metrics={"reward": MetricValue(mean=0.75, ci95=0.5)})  # fmt: skip
    monkeypatch.setattr(
        "rats_video.commands.run_steps.evaluate_files",
        lambda *_, output, **__: write_rows([row], output / "evaluation.json"),
    )
    _evaluate(make_config(*options), None, folder, ALONE, Pace())  # type: ignore[arg-type]  # nothing is sampled
    assert scalars(board(folder), "evaluation/student-4/reward") == [(1, 0.75)]
    assert [step for step, _ in scalars(board(folder), "loss")] == [1]  # and nothing is hidden by it
