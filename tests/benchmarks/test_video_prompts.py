"""The packaged prompts: written by the grammar, found by name, and held out for real."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from video_prompts import SCENES, write_prompts

from rats_video.datasets.prompts.settings import FilePromptsConfig
from rats_video.datasets.prompts.split import load_prompts, prompt_path
from rats_video.errors import UserError

PACKAGED = FilePromptsConfig(kind="file", train="video-train", heldout="video-heldout")


def pair(prompt: str) -> tuple[str, str]:
    """Subject and action, read back from the text."""
    text = prompt[0].lower() + prompt[1:]
    found = {
        (who, what)
        for scene in SCENES
        for who in scene.subjects
        for what in scene.actions
        if text.startswith(f"{who} {what} ")
    }
    (only,) = found
    return only


def test_files_are_what_the_grammar_writes() -> None:
    split = load_prompts(PACKAGED)
    assert (list(split.train), list(split.heldout)) == write_prompts()


def test_another_seed_writes_others() -> None:
    assert not set(write_prompts(1)[1]) & set(write_prompts(0)[1])


def test_every_prompt_and_every_pair_is_there_once() -> None:
    split = load_prompts(PACKAGED)
    assert (len(split.train), len(split.heldout)) == (512, 64)
    assert len({*split.train, *split.heldout}) == 576
    assert max(Counter(pair(prompt) for prompt in (*split.train, *split.heldout)).values()) == 1


def test_all_subjects_and_actions_are_trained_on() -> None:
    pairs = [pair(prompt) for prompt in load_prompts(PACKAGED).train]
    assert {who for who, _ in pairs} == {who for scene in SCENES for who in scene.subjects}
    assert {what for _, what in pairs} == {what for scene in SCENES for what in scene.actions}


def test_every_prompt_is_short_and_plain() -> None:
    for prompt in (*load_prompts(PACKAGED).train, *load_prompts(PACKAGED).heldout):
        assert prompt.isascii()
        assert len(prompt.split()) <= 40  # well within CLIP's 77 tokens


def test_a_path_of_the_same_name_is_a_path(tmp_path: Path) -> None:
    mine = tmp_path / "video-train"
    mine.write_text("a")
    assert prompt_path(str(mine)) == mine
    assert prompt_path("mine.txt") == Path("mine.txt")


def test_misspelt_name_lists_the_packaged_ones() -> None:
    with pytest.raises(UserError) as caught:
        load_prompts(PACKAGED.model_copy(update={"train": "video-trian"}))
    assert str(caught.value) == (
        "video-trian: no such prompts (give a text file or one of: video-heldout, video-train)"
    )
