"""Prompts from a cache of prepared clips: their captions, their split, and their text in the text encoder's place."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

from rats_video.backbones.identity import text_digest, vae_digest
from rats_video.backbones.text_cache import TextCache
from rats_video.backbones.wan import WanBackbone
from rats_video.commands.train_student import train_student
from rats_video.datasets.prepared.cache import CLIPS, EMPTY, SHARDS, CacheManifest, ClipRecord, save_shard, write_lines
from rats_video.datasets.prompts.settings import PreparedPromptsConfig
from rats_video.datasets.prompts.split import PromptSplit, load_prompts
from rats_video.distillation.compute import cached_text
from rats_video.distillation.roles import build_backbone
from rats_video.distillation.settings import DistillConfig
from rats_video.errors import UserError
from rats_video.runtime import ALONE
from rats_video.training.run_folder import RunFolder


def write_cache(
    folder: Path, backbone: WanBackbone, model: Path, train: Sequence[str], heldout: Sequence[str], text: str = ""
) -> Path:
    """A cache of these captions, its latents of nothing, its text in float32 and encoded as a run encodes its own.

    In other company a prompt's text may differ in its last bits.
    """
    captions = [*train, *heldout]
    text_cache = TextCache.encode(backbone.encode_text, ["", *captions])
    rows = text_cache.look_up(captions, torch.device("cpu"))
    save_shard(folder / SHARDS / "a.safetensors", torch.zeros(len(captions), 16, 2, 4, 4), rows)
    save_shard(folder / EMPTY, None, text_cache.look_up([""], torch.device("cpu")))
    records = [
        ClipRecord(
            f"k{i}",
            f"{i}.mp4",
            "",
            0,
            1,
            caption,
            5,
            32,
            32,
            "train" if i < len(train) else "heldout",
            "a.safetensors",
            i,
        )
        for i, caption in enumerate(captions)
    ]
    write_lines(folder / CLIPS, records, "clips")
    CacheManifest(1, "tiny", "Wan", vae_digest(model), text or text_digest(model), {}, 8.0, complete=True).save(folder)
    return folder


@pytest.fixture
def cache(loaded: WanBackbone, tiny_wan: Path, captions: tuple[str, ...], tmp_path: Path) -> Path:
    return write_cache(tmp_path / "cache", loaded, tiny_wan, captions[:8], captions[8:])


def of(cache: Path) -> str:
    return f"prompts={{kind: prepared, path: {cache}}}"


def trained(cfg: DistillConfig, folder: Path) -> dict[str, torch.Tensor]:
    student = train_student(cfg, RunFolder(folder), ALONE, resume=False, overwrite=False)
    assert student is not None
    return {name: weight.detach() for name, weight in student.weights.items()}


def test_trains_as_from_a_file_of_the_same_prompts(
    make_config: Callable[..., DistillConfig], loaded: WanBackbone, cache: Path, captions: tuple[str, ...],
    tmp_path: Path,
) -> None:  # fmt: skip
    assert load_prompts(PreparedPromptsConfig(kind="prepared", path=str(cache))) == PromptSplit(
        captions[:8], captions[8:]
    )
    from_file = trained(make_config("compute.cache_text=true"), tmp_path / "file")
    from_cache = trained(make_config("compute.cache_text=true", of(cache)), tmp_path / "cached")
    assert all(torch.equal(from_cache[name], weight) for name, weight in from_file.items())
    assert max((weight - loaded.weights[name]).abs().max() for name, weight in from_file.items()) > 1e-4
    assert not RunFolder(tmp_path / "cached").text.exists()  # the cache keeps it


def test_stored_text_is_what_is_looked_up(
    make_config: Callable[..., DistillConfig], cache: Path, loaded: WanBackbone, captions: tuple[str, ...],
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    def refuse(*_: object) -> None:
        raise AssertionError("the text encoder was asked")

    cfg = make_config("compute.cache_text=true", of(cache))
    text = cached_text(cfg, tmp_path / "none")
    expected = [loaded.encode_text([prompt]).embeds for prompt in ("", captions[9])]
    monkeypatch.setattr(WanBackbone, "_encode", refuse)
    backbone = build_backbone(cfg, torch.device("cpu"), text=text)
    assert "text_encoder" not in backbone.parts
    for prompt, embeds in zip(("", captions[9]), expected, strict=True):
        found = backbone.encode_text([prompt]).embeds
        torch.testing.assert_close(found[:, : embeds.shape[1]], embeds, atol=1e-6, rtol=0)
        assert not found[:, embeds.shape[1] :].any()
    with pytest.raises(UserError, match="was not encoded"):
        backbone.encode_text(["a zebra"])
    half = cached_text(make_config("compute.cache_text=true", "compute.dtype=bfloat16", of(cache)), tmp_path / "none")
    assert half is not None
    assert half.look_up([captions[0]], torch.device("cpu")).embeds.dtype == torch.bfloat16


def test_a_negative_prompt_that_no_caption_is_gets_encoded(
    make_config: Callable[..., DistillConfig], cache: Path, loaded: WanBackbone, tmp_path: Path
) -> None:
    cfg = make_config("compute.cache_text=true", "teacher.negative_prompt=a red circle", of(cache))
    text = cached_text(cfg, tmp_path / "none")
    assert text is not None
    found = text.look_up(["a red circle"], torch.device("cpu")).embeds
    torch.testing.assert_close(found, loaded.encode_text(["a red circle"]).embeds)


def test_text_of_another_encoder_is_refused(
    make_config: Callable[..., DistillConfig], loaded: WanBackbone, tiny_wan: Path, tmp_path: Path
) -> None:
    cache = write_cache(tmp_path / "c", loaded, tiny_wan, ["a red circle"], ["a blue square"], text="0" * 64)
    with pytest.raises(UserError) as caught:
        cached_text(make_config("compute.cache_text=true", of(cache)), tmp_path / "none")
    assert str(caught.value) == (
        f"{cache}: was prepared with another text encoder (tiny) than {tiny_wan} has "
        "(prepare with this model, or set model to that one)"
    )
    assert cached_text(make_config(of(cache)), tmp_path / "none") is None


def test_a_caption_on_both_sides_is_held_out(loaded: WanBackbone, tiny_wan: Path, tmp_path: Path) -> None:
    train, heldout = ["a red circle", "a blue circle", "a red circle", ""], ["a blue circle", ""]
    cache = write_cache(tmp_path / "c", loaded, tiny_wan, train, heldout)
    split = load_prompts(PreparedPromptsConfig(kind="prepared", path=str(cache)))
    assert split == PromptSplit(("a red circle",), ("a blue circle",), 2)


@pytest.mark.parametrize(("train", "missing"), [(["a"], "held out"), ([], "to train on")])
def test_a_cache_without_two_sides_is_refused(
    loaded: WanBackbone, tiny_wan: Path, tmp_path: Path, train: list[str], missing: str
) -> None:
    cache = write_cache(tmp_path / "c", loaded, tiny_wan, train, ["" if train else "a"])
    with pytest.raises(UserError, match=f"no caption {missing} in it"):
        load_prompts(PreparedPromptsConfig(kind="prepared", path=str(cache)))


def test_no_cache_is_one_line(command: Callable[..., tuple[int, str, str]], config_file: Path, tmp_path: Path) -> None:
    code, _, err = command("distill", "--config", config_file, "--output", tmp_path / "r", "--set", of(tmp_path))
    assert code == 2
    assert err.splitlines()[-1] == f"error: {tmp_path}: no prepared clips here (make them: rats-video prepare)"
