"""examples/own_base.py: what the embedded model knew stays, what videos' captions say comes on top."""

from __future__ import annotations

import runpy
import shutil
from pathlib import Path

import torch

from rats_video.assets import resolve_folder
from rats_video.backbones.identity import vae_digest
from rats_video.backbones.wan import WanBackbone

OLD, NEW = "a red circle moving left on a black background", "a Dog barking, at a red car"


def test_new_words_beside_the_old(tmp_path: Path, tiny_wan: Path) -> None:
    (tmp_path / "clips").mkdir()
    for name in ("one", "two"):
        (tmp_path / "clips" / f"{name}.mp4").write_bytes(b"not read")
        (tmp_path / "clips" / f"{name}.txt").write_text(NEW)
    example = runpy.run_path(str(Path(__file__).parents[2] / "examples" / "own_base.py"))
    shutil.copytree(tiny_wan / "vae", tmp_path / "vae")
    example["main"](tmp_path / "clips", tmp_path / "vae", tmp_path / "base")

    before, after = WanBackbone.from_pretrained(resolve_folder("tiny-wan", where="model")), tmp_path / "base"
    assert vae_digest(after) == vae_digest(tiny_wan)
    words = WanBackbone.component_classes()["tokenizer"].from_pretrained(after / "tokenizer", local_files_only=True)
    ids = words(NEW.lower()).input_ids
    assert [words.decode([i]) for i in ids] == ["a", "dog", "barking", "<unk>", "at", "a", "red", "car", "</s>"]
    assert words(OLD).input_ids == before.parts["tokenizer"](OLD).input_ids
    encoder = WanBackbone.component_classes()["text_encoder"]
    encoder = encoder.from_pretrained(after / "text_encoder", local_files_only=True)
    with torch.no_grad():
        for prompt in (OLD, NEW):
            tokens = words(prompt, return_tensors="pt").input_ids
            assert encoder(tokens).last_hidden_state.isfinite().all()
        old = before.parts["text_encoder"](tokens := words(OLD, return_tensors="pt").input_ids).last_hidden_state
        assert torch.equal(encoder(tokens).last_hidden_state, old)
