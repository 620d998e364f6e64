"""The Python API, used as its page shows it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch
from flux_family import FLUX
from outcomes import PROMPT
from PIL import Image
from shared import made_once

import rats_video
from rats_video import Run, Student, UserError, distill, evaluate, load_reward
from rats_video.inference.video import read_mp4, to_picture
from rats_video.training.interrupt import StopRequest

pytestmark = pytest.mark.pipeline

Command = Callable[..., Any]
OTHER = "a slow blue square moving right on a black background"


@pytest.fixture(scope="module")
def student() -> Student:
    return Student.load(device="cpu")


@pytest.fixture(scope="module")
def steps() -> list[tuple[int, float]]:
    """What `on_step` was told of `run`."""
    return []


@pytest.fixture(scope="module")
def run(config_file: Path, tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[int, float]]) -> Run:
    folder = tmp_path_factory.mktemp("api") / "run"
    return distill(config_file, folder, on_step=lambda step, row: steps.append((step, row["loss"])), device="cpu")


def made(folder: Path) -> list[bytes]:
    rows = json.loads((folder / "manifest.json").read_text())
    return [(folder / row["file"]).read_bytes() for row in rows]


def test_importing_it_loads_no_library() -> None:
    code = (
        "import sys, rats_video; print(*{'torch', 'diffusers', 'transformers', 'numpy', 'pydantic'} & {*sys.modules})"
    )
    found = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout == "\n"


def test_what_it_offers() -> None:
    assert {*rats_video.__all__} == {"Run", "Student", "UserError", "distill", "evaluate", "load_reward"}
    assert {*rats_video.__all__} <= {*dir(rats_video)}
    with pytest.raises(AttributeError, match="module 'rats_video' has no attribute 'Studnet'"):
        _ = rats_video.Studnet


def test_a_clip_is_that_of_the_command(command: Command, student: Student, tmp_path: Path) -> None:
    options = ("--prompt", PROMPT, "--prompt", OTHER, "--nfe", 2, "--seed", 3, "--device", "cpu")
    assert command("sample", *options, "--output", tmp_path / "o").code == 0
    clips = student.sample([PROMPT, OTHER], nfe=2, seed=3)
    assert (clips.shape, clips.dtype) == ((2, student.clip.num_frames, 3, 64, 64), torch.float32)
    assert 0 <= clips.min() < clips.max() <= 1
    for index, expected in enumerate(made(tmp_path / "o")):
        student.save(clips[index], tmp_path / "mine.mp4")
        assert (tmp_path / "mine.mp4").read_bytes() == expected
    assert torch.allclose(student.sample(PROMPT, 2, seed=3), clips[0], atol=1e-4)  # alone: up to rounding
    assert not torch.allclose(student.sample(PROMPT, 2, seed=4), clips[0], atol=0.05)


def test_a_clip_from_a_picture(command: Command, student: Student, tmp_path: Path) -> None:
    picture = tmp_path / "first.png"
    to_picture(student.sample(OTHER, nfe=2)[0]).save(picture)
    model = Student.load("tiny-wan", device="cpu", num_frames=9)
    clip = model.sample(PROMPT, nfe=4, image=picture)
    model.save(clip, tmp_path / "mine.mp4")
    options = ("--model", "tiny-wan", "--num-frames", 9, "--nfe", 4, "--image", picture, "--device", "cpu")
    assert command("sample", "--prompt", PROMPT, *options, "--output", tmp_path / "o").code == 0
    assert made(tmp_path / "o") == [(tmp_path / "mine.mp4").read_bytes()]
    assert clip.shape == (9, 3, 64, 64)
    assert not torch.allclose(model.sample(PROMPT, nfe=4), clip, atol=0.05)


def test_warnings_name_arguments(student: Student, capsys: pytest.CaptureFixture[str]) -> None:
    student.sample(PROMPT, nfe=1)
    assert capsys.readouterr().err == "warning: nfe=1: this student was trained for 2, 4; quality may drop\n"


def test_one_frame_is_a_picture(command: Command, tmp_path_factory: pytest.TempPathFactory, tmp_path: Path) -> None:
    folder = made_once(tmp_path_factory, FLUX.name, FLUX.build)
    model = Student.load(folder, height=32, width=48, device="cpu")
    image = model.sample("a red circle", nfe=2, seed=7)
    assert image.shape == (1, 3, 32, 48)
    model.save(image, tmp_path / "mine.png")
    size = ("--height", 32, "--width", 48, "--nfe", 2, "--seed", 7, "--device", "cpu", "--output", tmp_path / "o")
    assert command("sample", "--model", folder, "--prompt", "a red circle", *size).code == 0
    [theirs] = (tmp_path / "o").glob("*.png")
    with Image.open(tmp_path / "mine.png") as one, Image.open(theirs) as other:
        assert one.tobytes() == other.tobytes()
    model.save(image, tmp_path / "mine.mp4")
    assert read_mp4(tmp_path / "mine.mp4")[0].shape == (1, 3, 32, 48)


def test_rewards(student: Student) -> None:
    clips = student.sample([PROMPT, OTHER])
    judge = load_reward("shapes-reward", device="cpu")
    right, wrong = judge(clips, [PROMPT, OTHER]), judge(clips, [OTHER, PROMPT])
    assert bool((right.clip > wrong.clip).all())
    assert (right.clip.shape, right.frames.shape) == ((2,), (2, 17))
    still, most = clips[:, :1].expand_as(clips), 0.001
    motion = load_reward("dynamic_degree", device="cpu", clip=student.clip, at_most=most)
    assert motion(torch.stack([still[0], clips[1]]), [PROMPT, OTHER]).clip.tolist() == pytest.approx(
        [0, most], abs=1e-6
    )


def test_distilling_tells_of_each_step(run: Run, steps: list[tuple[int, float]], config_file: Path) -> None:
    assert steps == [(row["step"], row["loss"]) for row in run.metrics]
    assert [step for step, _ in steps] == [1, 2]
    clip = run.student(device="cpu").sample(PROMPT)
    assert clip.shape == (5, 3, 32, 32)
    with pytest.raises(UserError, match=r"holds a run \(resume=True goes on with it, overwrite=True replaces it\)"):
        distill(config_file, run.folder, device="cpu")


def test_a_stopped_distillation_goes_on(config_file: Path, run: Run, tmp_path: Path) -> None:
    class EnoughError(Exception):
        pass

    def stop(step: int, _row: object) -> None:
        if step == 2:
            raise EnoughError

    longer, seen = {"training.steps": 3, "training.checkpoint_every": 1}, list[int]()
    with pytest.raises(EnoughError):
        distill(config_file, tmp_path / "run", settings=longer, on_step=stop, device="cpu")
    resumed = distill(
        config_file, tmp_path / "run", settings=longer, on_step=lambda step, _: seen.append(step), device="cpu",
        resume=True,
    )  # fmt: skip
    assert seen == [2, 3]
    assert [row["step"] for row in resumed.metrics] == [1, 2, 3]
    assert [row["loss"] for row in resumed.metrics[:2]] == [row["loss"] for row in run.metrics]


def test_a_thread_may_train() -> None:
    stopped = []

    def train() -> None:
        with StopRequest() as stop:
            stopped.append(stop.requested)

    thread = Thread(target=train)
    thread.start()
    thread.join()
    assert stopped == [False]


def test_evaluating(run: Run, tmp_path: Path) -> None:
    rows = evaluate(run, nfe=4, num_clips=2, output=tmp_path / "e", device="cpu")
    assert [(row.arm, row.nfe, row.num_clips) for row in rows] == [("teacher", 8, 2), ("base", 4, 2), ("student", 4, 2)]
    assert all(-2 < row.metrics["reward"].mean < 0 < row.metrics["reward"].ci95 for row in rows)
    shown = (tmp_path / "e" / "evaluation.md").read_text()
    assert all(f" {row.metrics['reward'].mean:.3f}" in shown.replace("**", " ") for row in rows)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: Student.load("nope"),
            "model: no such folder: nope (give a run, a student or a pipeline: a folder, or ",
        ),
        (lambda: Student.load(num_frames=0), "num_frames: must be a whole number from 1, got 0"),
        (lambda: Student.load(num_frames=6), "num_frames: must be 1 + a multiple of 4, got 6 (take 5 or 9)"),
        (lambda: Student.load(device="gpu"), "device: no such device: 'gpu' (auto, cpu, cuda or cuda:N)"),
        (lambda: Student.load(base="nope"), "base: no such folder: nope (embedded ones: tiny-wan)"),
        (
            lambda: load_reward("smoothness"),
            "load_reward: no such reward: smoothness (did you mean motion_smoothness?)",
        ),
        (lambda: load_reward("qqqq"), "load_reward: no such reward: qqqq (choose from word, pickscore, "),
        (lambda: load_reward("pickscore", pth="x"), "load_reward: pth: unknown key (did you mean 'path'?)"),
        (lambda: load_reward("word"), "load_reward: path: required, but missing"),
        (lambda: distill("nope", "o"), "no config 'configs/distill/nope.yaml' (available: "),
        (
            lambda: distill("tiny", "o", settings={"training.stps": 3}),
            "settings training.stps: unknown key (did you mean 'steps'?)",
        ),
        (
            lambda: distill("tiny", "o", settings={"training.steps": "many"}),
            "settings training.steps: must be a whole number, got 'many'",
        ),
        (
            lambda: distill("tiny", "o", settings="training.steps=3"),
            """settings: must be keys and values, got 'training.steps=3' (as {"training.steps": 100})""",
        ),
        (
            lambda: distill("tiny", "o", settings={"": 5}),
            """settings: '' is not a key (as {"training.steps": 100})""",
        ),
        (lambda: distill("tiny", "o", seed=-1), "seed: must be a whole number from 0, got -1"),
        (lambda: distill("tiny", "o", resume=True, overwrite=True), "resume: cannot be used with overwrite"),
        (lambda: evaluate("nope"), "nope: not a run: it has no config.resolved.yaml (give the folder of a "),
        (lambda: evaluate("nope", nfe=[4, 0]), "nfe: must be a whole number from 1, got 0"),
        (lambda: evaluate("nope", nfe=2.5), "nfe: must be a whole number from 1, got 2.5"),  # type: ignore[arg-type]
        (lambda: evaluate("nope", num_clips=0), "num_clips: must be a whole number from 1, got 0"),
        (lambda: Run(Path("nope")).metrics, "nope: not a run: it has no metrics.jsonl"),
    ],
)
def test_a_mistake_is_one_line(
    call: Callable[[], object], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as caught:
        call()
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompt": []}, "prompt: no prompt (say what the clip shows)"),
        ({"prompt": 5}, "prompt: must be text, got 5"),
        ({"prompt": "a whale"}, "prompt: this model does not know 'whale' in 'a whale' (nearest known: "),
        ({"nfe": 0}, "nfe: must be a whole number from 1, got 0"),
        ({"nfe": "4"}, "nfe: must be a whole number from 1, got '4'"),
        ({"seed": -1}, "seed: must be a whole number from 0, got -1"),
        ({"seed": None}, "seed: must be a whole number from 0, got None"),
        ({"batch_size": 0}, "batch_size: must be a whole number from 1, got 0"),
        ({"image": "nope.png"}, "image: no such picture: nope.png"),
        ({"image": Image.new("RGB", (8, 8))}, "image: must be a path, got Image (save it as a picture)"),
        ({"last_image": "nope.png"}, "last_image: a last picture needs a first one"),
    ],
)
def test_what_cannot_be_sampled(student: Student, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        student.sample(**{"prompt": PROMPT, **arguments})
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    ("frames", "name", "message"),
    [
        (torch.zeros(5, 3, 8, 8), "a.gif", "a.gif: 5 frames are written as .mp4 (name it a.mp4)"),
        (torch.zeros(5, 3, 8, 8), "a.png", "a.png: 5 frames are written as .mp4 (name it a.mp4)"),
        (torch.zeros(1, 3, 8, 8), "a.jpg", "a.jpg: 1 frame is written as .mp4 or .png (name it a.png)"),
        (torch.zeros(2, 5, 3, 8, 8), "a.mp4", "frames: must be [T, 3, H, W], got [2, 5, 3, 8, 8] (save one clip at a "),
        (torch.full((5, 3, 8, 8), 255.0), "a.mp4", "frames: must lie in [0, 1], got [255, 255]"),
    ],
)
def test_what_cannot_be_saved(
    student: Student, frames: torch.Tensor, name: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as caught:
        student.save(frames, name)
    assert str(caught.value).startswith(message)
    assert not list(tmp_path.iterdir())
