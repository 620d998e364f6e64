"""A run's prompts against the model's tokenizer: whole words are refused if unknown, pieces are warned of, once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from rats_video.backbones.wan import WanBackbone
from rats_video.distillation.roles import checked_prompts
from rats_video.distillation.settings import DistillConfig
from rats_video.errors import UserError


@pytest.fixture
def spelling(loaded: WanBackbone) -> WanBackbone:
    """The tiny model with T5's kind of tokenizer, which spells what it does not know."""
    from transformers import T5Tokenizer

    pieces = ["▁", "a", "b", "c", "d", "e", "f", "g", "▁red"]
    special = [(name, 0.0) for name in ("<pad>", "</s>", "<unk>")]
    tokenizer = T5Tokenizer(vocab=[*special, *((piece, -2.0) for piece in pieces)])
    return WanBackbone(**{**loaded.parts, "tokenizer": tokenizer})


@pytest.fixture
def config(make_config: Callable[..., DistillConfig], tmp_path: Path) -> Callable[..., DistillConfig]:
    def write(*train: str) -> DistillConfig:
        (tmp_path / "train.txt").write_text("\n".join(train), encoding="utf-8")
        (tmp_path / "heldout.txt").write_text("a red face")
        return make_config(f"prompts={{kind: file, train: {tmp_path}/train.txt, heldout: {tmp_path}/heldout.txt}}")

    return write


def test_subword_prompts_pass_silently(
    spelling: WanBackbone, config: Callable[..., DistillConfig], capsys: pytest.CaptureFixture[str]
) -> None:
    assert checked_prompts(config("a cab", "bagged"), spelling).train == ("a cab", "bagged")
    assert spelling.unknown_words("a zebra 中") == []
    assert capsys.readouterr().err == ""


def test_what_a_subword_tokenizer_cannot_read_is_counted_once(
    spelling: WanBackbone, config: Callable[..., DistillConfig], capsys: pytest.CaptureFixture[str]
) -> None:
    long = " ".join(["bed"] * 200)  # 800 pieces
    checked_prompts(config("a cab", long, f"{long} a", "a 中 cab"), spelling)
    assert capsys.readouterr().err.splitlines() == [
        "warning: prompts: 2 of 5 are longer than the 512 tokens this model reads",
        "warning: prompts: 1 of 5 are written with characters this model does not know",
    ]


def test_limit_is_what_the_pipeline_reads(spelling: WanBackbone) -> None:
    full = "abcde" * 102  # with the space before and the end after it: 512 tokens
    assert spelling.truncation_note(full) == ""
    assert spelling.truncation_note(f"{full}a") == "longer than the 512 tokens this model reads"


def test_unknown_whole_words_are_refused(loaded: WanBackbone, config: Callable[..., DistillConfig]) -> None:
    with pytest.raises(UserError, match=r"does not know 'cab' in 'a red cab'"):
        checked_prompts(config("a red circle", "a red cab"), loaded)
