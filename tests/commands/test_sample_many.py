"""`sample` with long lists: resumed, batched, from a pipe; what a folder holds is never mistaken for something else."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rats_video.backbones.wan import WanBackbone
from rats_video.commands.sample import sample_files, sample_pipe
from rats_video.commands.students import LoadedStudent, load_student
from rats_video.datasets.prompts.files import read_rows
from rats_video.errors import Interrupted, UserError
from rats_video.inference.manifest import MANIFEST, is_whole, locked, read_clips
from rats_video.inference.requests import Request, in_batches, list_requests
from rats_video.inference.sampler import SamplerSpec, clip_noise, sample_batch
from rats_video.inference.student import StudentCard, save_student
from rats_video.inference.video import read_mp4, write_mp4
from rats_video.runtime import ALONE

Command = Callable[..., Any]
CARD = {"num_frames": 5.0, "height": 32.0, "width": 32.0, "fps": 8.0}


def save(backbone: WanBackbone, model: Path, folder: Path) -> Path:
    save_student(backbone, StudentCard(str(model), (2,), 3.0, CARD, steps=1, seed=0), folder)
    return folder


@pytest.fixture(scope="module")
def student(loaded: WanBackbone, tiny_wan: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(loaded.with_own_denoiser(), tiny_wan, tmp_path_factory.mktemp("student"))


@pytest.fixture(scope="module")
def model(student: Path) -> LoadedStudent:
    return load_student(student, torch.device("cpu"))


@pytest.fixture(scope="module")
def prompts(captions: tuple[str, ...]) -> list[str]:
    return list(captions[:5])


@pytest.fixture(scope="module")
def whole(model: LoadedStudent, prompts: list[str], tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The manifest of an uninterrupted run over the five prompts."""
    folder = tmp_path_factory.mktemp("whole")
    sample_files(model, list_requests(prompts, nfe=2, seed=3), ALONE, output=folder)
    return rows(folder)


def rows(folder: Path) -> list[dict[str, Any]]:
    """The manifest without what a clock says."""
    read: list[dict[str, Any]] = json.loads((folder / MANIFEST).read_text())
    assert all(row.pop("seconds") > 0 for row in read)
    return read


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def batches(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The prompts of every batch that is sampled."""
    seen: list[list[str]] = []

    def watched(backbone: Any, prompts: list[str], *rest: Any, **options: Any) -> Any:
        seen.append(list(prompts))
        return sample_batch(backbone, prompts, *rest, **options)

    monkeypatch.setattr("rats_video.commands.sample_pictures.sample_batch", watched)
    return seen


# ---------------------------------------------------------------------------------------------------------- resume


@pytest.mark.parametrize("stop_at", [1, 3])
def test_stopped_list_goes_on_and_ends_as_if_it_had_not(
    model: LoadedStudent, prompts: list[str], whole: list[dict[str, Any]], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, batches: list[list[str]], stop_at: int,
) -> None:  # fmt: skip
    requests = list_requests(prompts, nfe=2, seed=3)
    written: list[Path] = []

    def stopping(frames: Tensor, path: Path, *, fps: float, sound: None) -> None:
        if len(written) == stop_at:
            raise KeyboardInterrupt
        written.append(path)
        write_mp4(frames, path, fps=fps, sound=sound)

    with monkeypatch.context() as patch:
        patch.setattr("rats_video.inference.video.write_mp4", stopping)
        with pytest.raises(Interrupted, match="the same command makes the rest"):
            sample_files(model, requests, ALONE, output=tmp_path, batch_size=2)
    assert MANIFEST not in names(tmp_path)
    assert sorted(read_clips(tmp_path)) == list(range(stop_at))  # noted one by one
    with (tmp_path / "manifest.part-0.jsonl").open("a") as journal:
        journal.write('{"file": "cut o')  # as a kill leaves it
    kept = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("*.mp4")}
    batches.clear()
    sample_files(model, requests, ALONE, output=tmp_path, batch_size=3)
    assert [prompt for batch in batches for prompt in batch] == prompts[stop_at:]
    assert rows(tmp_path) == whole
    assert names(tmp_path) == sorted([*(row["file"] for row in whole), MANIFEST])
    assert all((tmp_path / name).stat().st_mtime_ns == time for name, time in kept.items())


def test_missing_and_cut_off_files_are_made_again(
    model: LoadedStudent, prompts: list[str], whole: list[dict[str, Any]], tmp_path: Path, batches: list[list[str]]
) -> None:
    requests = list_requests(prompts, nfe=2, seed=3)
    sample_files(model, requests, ALONE, output=tmp_path)
    files = [tmp_path / row["file"] for row in whole]
    files[1].unlink()
    files[3].write_bytes(files[3].read_bytes()[:-200])
    assert [is_whole(file, 5) for file in files] == [True, False, True, False, True]
    assert not is_whole(files[0], 9)
    batches.clear()
    sample_files(model, requests, ALONE, output=tmp_path)
    assert batches == [[prompts[1], prompts[3]]]
    assert rows(tmp_path) == whole
    batches.clear()
    sample_files(model, [*requests, Request(5, "a red circle", 2, 3, 5)], ALONE, output=tmp_path)
    assert batches == [["a red circle"]]  # a list that grew
    assert rows(tmp_path)[:5] == whole


def test_batch_size_and_resume_change_no_noise(
    model: LoadedStudent, prompts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clips: dict[int, dict[str, torch.Tensor]] = {}
    for size in (1, 2, 5):
        made = clips.setdefault(size, {})
        monkeypatch.setattr(
            "rats_video.inference.video.write_mp4",
            lambda frames, path, made=made, **_: made.update({path.name: frames}),
        )
        requests = list_requests(prompts, nfe=2, seed=3)
        sample_files(model, requests, ALONE, output=tmp_path / str(size), batch_size=size)
    for name, frames in clips[5].items():
        for size in (1, 2):
            torch.testing.assert_close(clips[size][name], frames, atol=2e-6, rtol=0)
    alone, _ = sample_batch(
        model.student, prompts[2:3], clip_noise(model.student, model.clip, 3, 2), SamplerSpec(2, 3.0)
    )
    third = next(frames for name, frames in clips[5].items() if name.startswith("002"))
    torch.testing.assert_close(third, alone[0], atol=2e-6, rtol=0)


# ---------------------------------------------------------------------------------------- what the folder holds


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"seed": 4}, "holds clip 0 of another seed"),
        ({"nfe": 3}, "holds clip 0 of another nfe and num_steps"),
        ({"rows": ["a red circle"]}, "holds clip 0 of another prompt"),
    ],
)
def test_other_settings_are_refused_and_overwritten(
    model: LoadedStudent, prompts: list[str], tmp_path: Path, change: dict[str, Any], expected: str
) -> None:
    sample_files(model, list_requests(prompts[:2], nfe=2, seed=3), ALONE, output=tmp_path)
    (tmp_path / "thesis.txt").write_text("do not lose")
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    other = list_requests(**({"rows": prompts[:1], "nfe": 2, "seed": 3} | change))
    with pytest.raises(UserError, match=expected):
        sample_files(model, other, ALONE, output=tmp_path)
    with pytest.raises(UserError, match="--overwrite replaces"):
        sample_files(model, other, ALONE, output=tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
    sample_files(model, other, ALONE, output=tmp_path, overwrite=True)
    (row,) = rows(tmp_path)
    assert names(tmp_path) == sorted([row["file"], MANIFEST, "thesis.txt"])


def test_clips_of_another_student_are_refused(
    command: Command, student: Path, backbone: WanBackbone, tiny_wan: Path, tmp_path: Path
) -> None:
    options = ["--prompt", "a red circle", "--nfe", 2, "--output", tmp_path / "s", "--model"]
    assert command("sample", *options, student).code == 0
    with torch.no_grad():
        backbone.denoiser.proj_out.weight.mul_(1.5)
    other = save(backbone, tiny_wan, tmp_path / "other")
    code, _, err = command("sample", *options, other)
    assert code == 2
    assert err.splitlines()[-1].startswith(f"error: {tmp_path / 's'}: holds clip 0 of another student (--overwrite")
    assert command("sample", *options, other, "--overwrite").code == 0
    assert command("sample", *options, other).code == 0
    assert command("sample", *options, student).code == 2


def test_two_commands_in_one_folder(model: LoadedStudent, prompts: list[str], tmp_path: Path) -> None:
    with locked(tmp_path), pytest.raises(UserError, match="another command samples into this folder"):
        sample_files(model, list_requests(prompts, nfe=2, seed=3), ALONE, output=tmp_path)
    assert names(tmp_path) == []


HOSTILE = [
    "", "[", "{}", "[1]", "null", '[{"file": "a.mp4"}]', "[" * 100_000,
    json.dumps([{"file": "../../victim.mp4", "prompt": "p", "nfe": 2, "num_steps": 2, "seed": 0, "noise": 0, "index": 0,
                 "student": "x", "seconds": 1}]),
]  # fmt: skip


@pytest.mark.parametrize("content", HOSTILE, ids=range(len(HOSTILE)))
def test_damaged_manifest_is_one_line_and_touches_nothing_else(
    model: LoadedStudent, tmp_path: Path, content: str
) -> None:
    folder, victim = tmp_path / "a" / "b", tmp_path / "victim.mp4"
    folder.mkdir(parents=True)
    victim.write_text("mine")
    (folder / MANIFEST).write_text(content)
    requests = list_requests(["a red circle"], nfe=2, seed=3)
    with pytest.raises(UserError, match="is damaged, or not of this version"):
        sample_files(model, requests, ALONE, output=folder)
    assert (folder / MANIFEST).read_text() == content
    sample_files(model, requests, ALONE, output=folder, overwrite=True)
    assert len(rows(folder)) == 1
    assert victim.read_text() == "mine"


# ----------------------------------------------------------------------------------------------------------- lists


def test_rows_with_their_own_seed_and_calls(command: Command, student: Path, tmp_path: Path) -> None:
    (tmp_path / "list.jsonl").write_text(
        '{"prompt": "a red circle"}\n\n{"prompt": "a blue square", "seed": 7, "nfe": 3, "id": "../x/7"}\n'
    )
    (tmp_path / "list.csv").write_text('prompt,id,nfe,seed\n"a red circle",,,\na blue square,../x/7,3,7\n')
    options = ["--model", student, "--nfe", 2, "--seed", 1]
    for kind in ("jsonl", "csv"):
        code, out, err = command(
            "sample", *options, "--prompts", tmp_path / f"list.{kind}", "--output", tmp_path / kind
        )
        assert code == 0, err
        assert out.startswith("2 clips at 2, 3 NFE")
    first, second = rows(tmp_path / "jsonl")
    assert rows(tmp_path / "csv") == [first, second]
    assert (first["seed"], first["noise"], first["nfe"]) == (1, 0, 2)
    assert (second["seed"], second["noise"], second["nfe"], second["id"]) == (7, 0, 3, "../x/7")
    assert second["file"].startswith("001-x-7-")
    alone = ["--prompt", "a blue square", "--seed", 7, "--nfe", 3, "--output", tmp_path / "alone"]
    assert command("sample", "--model", student, *alone).code == 0
    (again,) = rows(tmp_path / "alone")
    clips = [read_mp4(tmp_path / file)[0] for file in (f"alone/{again['file']}", f"jsonl/{second['file']}")]
    assert (clips[0] - clips[1]).abs().mean() < 0.03  # the same clip; x264 may decide one rounded pixel otherwise


def test_own_seeds_that_come_round_again_take_the_next_noise(tmp_path: Path) -> None:
    (tmp_path / "l.jsonl").write_text('{"prompt": "a", "seed": 5}\n{"prompt": "b"}')
    asked = list_requests(read_rows(tmp_path / "l.jsonl"), nfe=4, seed=2, count=5)
    assert [(request.seed, request.noise) for request in asked] == [(5, 0), (2, 1), (5, 1), (2, 3), (5, 2)]


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.jsonl", '{"prompt": "a"}\n{"prompt"', "a.jsonl, line 2: is no JSON"),
        ("a.jsonl", '["a"]', "a.jsonl, line 1: is no JSON object"),
        ("a.jsonl", '{"promt": "a"}', "a.jsonl, line 1: promt: unknown key (did you mean 'prompt'?"),
        ("a.jsonl", '{"prompt": "a", "seed": -1}', "line 1: seed: "),
        ("a.jsonl", '{"prompt": "a", "seed": 1e99}', "line 1: seed: "),
        ("a.jsonl", '{"prompt": "a", "nfe": 0}', "line 1: nfe: "),
        ("a.jsonl", '{"prompt": " "}', "line 1: prompt: "),
        ("a.jsonl", '{"prompt": "\\ud800"}', "line 1: prompt: "),
        ("a.jsonl", "[" * 100_000, "line 1: is no JSON"),
        ("a.jsonl", "\n", "a.jsonl: no prompt in it"),
        ("a.csv", "prompt,seed\na,1\nb,2,3", "a.csv, line 3: more fields than columns"),
        ("a.csv", "prompt,seed\na,x", "a.csv, line 2: seed: "),
        ("a.csv", 'prompt\n"a', "a.csv, line 2: is damaged: unexpected end of data"),
        ("a.csv", "prompt\n", "a.csv: no prompt in it"),
        ("a.csv", "nowhere", "a.csv: cannot read it: No such file or directory"),
        ("a.jsonl", "\udcff", "a.jsonl: cannot read it: it is not UTF-8 text"),
    ],
)
def test_bad_list_is_one_line(
    command: Command, student: Path, tmp_path: Path, name: str, content: str, expected: str
) -> None:
    if content != "nowhere":
        (tmp_path / name).write_text(content, errors="surrogateescape")
    code, _, err = command("sample", "--model", student, "--prompts", tmp_path / name, "--output", tmp_path / "s")
    assert code == 2
    assert err.splitlines()[-1].startswith("error: ")
    assert expected in err
    assert not (tmp_path / "s").exists()


@given(st.lists(st.one_of(st.none(), st.integers(0, 99)), max_size=30), st.integers(1, 5))
@settings(max_examples=50, deadline=None)
def test_batches_hold_everything_in_order_and_wait_for_nothing(items: list[int | None], size: int) -> None:
    requests = [None if item is None else Request(item, "p", 4, 0, 0) for item in items]
    made = list(in_batches(requests, size))
    assert [request for batch in made for request in batch] == [request for request in requests if request]
    assert all(1 <= len(batch) <= size for batch in made)
    if None in items:  # what came before a pause is made before anything after it is asked for
        asked = iter(requests)
        before = [request for request in requests[: items.index(None)] if request]
        batches = in_batches(asked, 100)
        assert not before or next(batches) == before
        assert not before or len(list(asked)) == len(items) - len(before) - 1


# ------------------------------------------------------------------------------------------------------------ pipe


def test_each_clip_is_made_as_its_line_arrives(model: LoadedStudent, tmp_path: Path) -> None:
    read, write = os.pipe()
    said: list[str] = []

    def echo(path: str) -> None:
        assert is_whole(Path(path), 5)
        said.append(path)
        if len(said) == 1:  # the next lines are only written once the first one's clip is there
            os.write(write, b'a zebra\n\n{"prompt": "a blue square", "nfe": 3, "id": "b"}\n')
        else:
            os.close(write)

    os.write(write, b"a red circle\n")
    with pytest.raises(UserError, match=r"1 lines were left out, the first: line 2: .* 'zebra'"):
        sample_pipe(model, read, nfe=2, seed=1, output=tmp_path, batch_size=4, overwrite=False, echo=echo)
    os.close(read)
    assert [Path(path).name[:3] for path in said] == ["000", "002"]
    assert [(row["index"], row["nfe"], row["noise"]) for row in rows(tmp_path)] == [(0, 2, 0), (2, 3, 2)]


@pytest.fixture
def piped(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[bytes], None]]:
    """Puts bytes and their end into standard input."""
    with contextlib.ExitStack() as files:

        def put(content: bytes) -> None:
            read, write = os.pipe()
            os.write(write, content)
            os.close(write)
            monkeypatch.setattr("sys.stdin", files.enter_context(os.fdopen(read)))

        yield put


def test_pipe_on_the_command_line(
    command: Command, student: Path, tmp_path: Path, piped: Callable[[bytes], None], batches: list[list[str]]
) -> None:
    options = ["sample", "--model", student, "--nfe", 2, "--prompts", "-", "--output", tmp_path]
    piped(b"a red circle\na blue square")
    first = command(*options)
    assert (first.code, batches) == (0, [["a red circle", "a blue square"]])  # what has arrived together
    before = rows(tmp_path)
    piped(b"a red circle\na blue square\na blue circle\n")
    again = command(*options)
    assert batches[1:] == [["a blue circle"]]
    assert again.out.splitlines()[:2] == first.out.splitlines() == [str(tmp_path / row["file"]) for row in before]
    assert rows(tmp_path)[:2] == before


@pytest.mark.parametrize(
    ("content", "options", "expected"),
    [
        (b"a" * 2**18, [], "--prompts -: a line of more than 65536 bytes (end each prompt with a newline)"),
        (b"\xff\n", [], "--prompts -: 1 lines were left out, the first: line 1: is not UTF-8 text"),
        (b"{\n", [], "line 1: is no JSON"),
        (b"a red circle\n", ["--num-videos", 2], "--num-videos: a pipe has one clip a line"),
    ],
)
def test_bad_pipe_is_one_line(
    command: Command, student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes,
    options: list[object], expected: str,
) -> None:  # fmt: skip
    (tmp_path / "in").write_bytes(content)  # a file: a pipe would not hold so much
    with (tmp_path / "in").open("rb") as file:
        monkeypatch.setattr("sys.stdin", file)
        outcome = command("sample", "--model", student, "--prompts", "-", "--output", tmp_path / "s", *options)
    assert outcome.code == 2
    assert expected in outcome.err.splitlines()[-1]
