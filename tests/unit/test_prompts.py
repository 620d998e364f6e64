"""Prompt files and splits: what is read, what is refused and how it is said."""

from __future__ import annotations

from pathlib import Path

import pytest

from rats_video.config.distill import FilePrompts, ShapesPrompts
from rats_video.datasets.prompt_rows import read_prompts
from rats_video.datasets.prompts import check_prompt, load_prompts
from rats_video.datasets.shapes import split_combinations
from rats_video.errors import UserError


def written(path: Path, text: str) -> str:
    path.write_bytes(text.encode("utf-8"))
    return str(path)


def test_shapes_split() -> None:
    split = load_prompts(ShapesPrompts())
    assert (len(split.train), len(split.heldout)) == (368, 64)
    assert split.heldout[0] == split_combinations()[1][0].prompt
    assert not set(split.train) & set(split.heldout)


def test_file_is_one_prompt_a_line(tmp_path: Path) -> None:
    path = written(tmp_path / "p.txt", "\n  a red circle \r\n\n\t\na blå square\n")
    assert read_prompts(Path(path)) == ("a red circle", "a blå square")


@pytest.mark.parametrize(
    ("content", "line"),
    [
        (b"", "no prompt in it (write one prompt a line, or one row a prompt)"),
        (b" \n\n", "no prompt in it (write one prompt a line, or one row a prompt)"),
        (b"\xff\xfe", "cannot read the prompts: it is not UTF-8 text"),
        (None, "cannot read the prompts: No such file or directory"),
    ],
)
def test_bad_file_is_named(tmp_path: Path, content: bytes | None, line: str) -> None:
    path = tmp_path / "p.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        read_prompts(path)
    assert str(caught.value) == f"{path}: {line}"


def test_folder_is_no_prompt_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot read the prompts: Is a directory"):
        read_prompts(tmp_path)


def test_split_of_files(tmp_path: Path) -> None:
    train = written(tmp_path / "train.txt", "a\nb\nc")
    split = load_prompts(FilePrompts(kind="file", train=train, heldout=written(tmp_path / "heldout.txt", "d")))
    assert (split.train, split.heldout) == (("a", "b", "c"), ("d",))


def test_heldout_prompts_must_not_be_trained_on(tmp_path: Path) -> None:
    train, heldout = written(tmp_path / "train.txt", "a\nb\nc"), written(tmp_path / "heldout.txt", "c\nd\nb")
    with pytest.raises(UserError) as caught:
        load_prompts(FilePrompts(kind="file", train=train, heldout=heldout))
    assert str(caught.value) == f"{heldout}: 2 prompts are in the training file too, e.g. 'b'"


@pytest.mark.parametrize(
    ("prompt", "unknown", "line"),
    [
        ("", [], "--prompt: the prompt is empty (say what to draw)"),
        (" \t", [], "--prompt: the prompt is empty (say what to draw)"),
        ("a zebra on Mars", ["zebra"], "--prompt: this model does not know 'zebra' in 'a zebra on Mars'"),
    ],
)  # fmt: skip
def test_prompt_that_cannot_be_followed(prompt: str, unknown: list[str], line: str) -> None:
    with pytest.raises(UserError) as caught:
        check_prompt(prompt, lambda _: unknown)
    assert str(caught.value) == line


def test_good_prompt_passes() -> None:
    check_prompt("a red circle", lambda _: [])
