"""Tokenizers as they are published: what they read of a prompt, and what they lose."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import pytest
from cogvideox_family import COGVIDEOX_FAMILIES
from contract import Case
from family import Family
from hunyuan_family import HUNYUAN
from ltx_family import LTX_FAMILIES
from sentencepiece import SentencePieceProcessor
from transformers import AutoTokenizer, LlamaTokenizerFast
from wan22_family import WAN22_FAMILIES

from rats_video.backbones import text_cache
from rats_video.backbones.identity import text_digest
from rats_video.backbones.kinds import load_backbone
from rats_video.backbones.text_cache import text_identity
from rats_video.backbones.words import loses_spaces, truncation_note, unknown_id
from rats_video.errors import UserError

Opened = Callable[[Family], Case]
PROMPT = "a fast red circle moving left on a gray background"
STRANGE = "written with characters this model does not know"


@pytest.mark.parametrize("family", [LTX_FAMILIES[0], COGVIDEOX_FAMILIES[0]], ids=["ltx", "cogvideox"])
def test_spiece_model_alone_is_read_as_sentencepiece_reads_it(opened: Opened, family: Family) -> None:
    case = opened(family)
    assert {path.name for path in (case.folder / "tokenizer").iterdir()} == {
        "added_tokens.json", "special_tokens_map.json", "spiece.model", "tokenizer_config.json",
    }  # fmt: skip
    theirs = SentencePieceProcessor(model_file=str(case.folder / "tokenizer" / "spiece.model"))
    assert case.backbone.parts["tokenizer"](PROMPT).input_ids == [*theirs.encode(PROMPT), theirs.eos_id()]
    assert case.backbone.truncation_note("a blue circle") == STRANGE


def test_byte_level_tokenizer_under_llamas_name_keeps_its_spaces(opened: Opened) -> None:
    case = opened(HUNYUAN)
    tokenizer = case.backbone.parts["tokenizer"]
    assert tokenizer.decode(tokenizer(PROMPT).input_ids) == PROMPT
    assert len(tokenizer(PROMPT).input_ids) == len(PROMPT.split())
    assert not loses_spaces(tokenizer)
    assert loses_spaces(LlamaTokenizerFast.from_pretrained(case.folder / "tokenizer"))  # what the index names


def test_tokenizer_that_drops_spaces_is_refused(opened: Opened, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = opened(HUNYUAN).folder
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", LlamaTokenizerFast.from_pretrained)  # as before 5.22
    with pytest.raises(UserError) as caught:
        load_backbone(folder)
    assert str(caught.value) == (
        f"{folder / 'tokenizer'}: its tokenizer drops the spaces between words (pip install 'transformers>=5.22', "
        "or set tokenizer_class to TokenizersBackend in its tokenizer_config.json)"
    )


def test_unknown_character_is_told_where_the_class_numbers_it_otherwise(opened: Opened) -> None:
    """Wan's tokenizer.json says 3; the class it names makes 2 of it."""
    backbone = opened(WAN22_FAMILIES[0]).backbone
    tokenizer = backbone.parts["tokenizer"]
    assert unknown_id(tokenizer) in tokenizer("a red 🦓").input_ids
    assert backbone.truncation_note("a red 🦓") == STRANGE
    assert backbone.truncation_note("a red circle") == ""


def test_tokenizer_that_spells_every_character_knows_no_unknown_one(opened: Opened) -> None:
    tokenizer = opened(HUNYUAN).backbone.parts["tokenizer"]
    assert unknown_id(tokenizer) is None
    assert truncation_note(tokenizer, "a red 🦓", 512) == ""


def test_text_cache_is_made_anew_by_other_libraries(opened: Opened, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = opened(HUNYUAN).folder
    identity = text_identity(folder, "float32")
    assert text_identity(folder, "float32") == identity
    for other in ("ftfy", "transformers"):
        with monkeypatch.context() as patch:
            patch.setattr(text_cache, "version", lambda name, other=other: "99" if name == other else version(name))
            assert text_identity(folder, "float32") != identity


def test_prepared_text_knows_a_vocabulary_without_a_tokenizer_json(opened: Opened, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(opened(HUNYUAN).folder, tmp_path / "model"))
    digest, words = text_digest(folder), folder / "tokenizer_2" / "vocab.json"
    vocabulary = json.loads(words.read_text())
    words.write_text(json.dumps(vocabulary | {"a": vocabulary["b"], "b": vocabulary["a"]}))
    assert text_digest(folder) != digest
