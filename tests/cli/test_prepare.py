"""`prepare` as a user drives it: what it keeps, what it says, and that nothing is done twice or lost."""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from films import Inline, film
from killing import killed
from safetensors.torch import load_file
from torch import Tensor

from rats_video.backbones.wan import WanBackbone
from rats_video.config.load import load_config
from rats_video.datasets.prepared.cache import ClipCache
from rats_video.datasets.video.clips import ReadChunk, read_source
from rats_video.datasets.video.isolated_worker import Failure
from rats_video.datasets.video.records import SourceVideo
from rats_video.datasets.video.settings import PrepareConfig
from rats_video.errors import UserError

CONFIG = """
model: {model}
fps: 8
buckets: [{{num_frames: 5, height: 32, width: 32}}]
cut: {{max_clips: 2, scene_threshold: null}}
heldout: 0.4
dtype: float32
"""
Command = Callable[..., Any]


@pytest.fixture(scope="module")
def films(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five films, a damaged one, one without caption, and one that is there twice."""
    folder = tmp_path_factory.mktemp("prepare") / "films"
    for number in range(5):
        film(folder / f"{number}.mp4", number)
        (folder / f"{number}.txt").write_text(f"film {number % 3}")
    (folder / "broken.mp4").write_bytes(b"no film at all" * 100)
    (folder / "broken.txt").write_text("broken")
    shutil.copy(folder / "0.mp4", folder / "silent.mp4")
    (folder / "z").mkdir()
    shutil.copy(folder / "1.mp4", folder / "z" / "again.mp4")
    (folder / "z" / "again.txt").write_text("once more")
    return folder


def copied(films: Path) -> Path:
    """The films, always at the place that a cache of them names."""
    shutil.rmtree(films.parent / "source", ignore_errors=True)
    return Path(shutil.copytree(films, films.parent / "source"))


@pytest.fixture
def source(films: Path) -> Path:
    return copied(films)


@pytest.fixture(scope="module")
def config(tiny_wan: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("config") / "small.yaml"
    path.write_text(CONFIG.format(model=tiny_wan))
    return path


def simplify(patch: pytest.MonkeyPatch) -> None:
    """Units of two, in this process."""
    patch.setattr("rats_video.preparation.units.UNIT_SOURCES", 2)
    patch.setattr("rats_video.commands.prepare_sources.IsolatedPool", Inline)


@pytest.fixture
def prepare(command: Command, config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Command:
    """Runs `prepare` into `cache`."""
    simplify(monkeypatch)

    def call(source: object, *options: object, output: Path = tmp_path / "cache") -> Any:
        return command("prepare", source, "--output", output, "--config", config, "--device", "cpu", *options)

    return call


@pytest.fixture(scope="module")
def made(command: Command, config: Path, films: Path) -> Path:
    cache = films.parent / "cache"
    with pytest.MonkeyPatch.context() as patch:
        simplify(patch)
        options = ("--output", cache, "--config", config, "--device", "cpu")
        assert command("prepare", copied(films), *options).code == 0
    return cache


@pytest.fixture
def prepared(made: Path, tmp_path: Path) -> Path:
    """`cache`, as `prepare(source)` leaves it."""
    return Path(shutil.copytree(made, tmp_path / "cache"))


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The models that are loaded."""
    from rats_video.commands import prepare as build

    seen: list[Path] = []
    load = build.load_backbone

    def watched(folder: Path, *arguments: Any, **options: Any) -> Any:
        seen.append(folder)
        return load(folder, *arguments, **options)

    monkeypatch.setattr(build, "load_backbone", watched)
    return seen


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def times(folder: Path) -> dict[str, int]:
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in folder.rglob("*")}


def skipped(cache: Path) -> dict[str, str]:
    lines = (cache / "skipped.jsonl").read_text().splitlines()
    return {row["name"]: row["reason"] for row in map(json.loads, lines)}


def test_what_is_kept_and_what_is_said(prepare: Command, source: Path, tmp_path: Path, loaded: WanBackbone) -> None:
    code, out, err = prepare(source)
    assert code == 0, err
    assert "captions hold words this model does not know, as 'film' in 'film 0'" in err
    assert out.startswith("kept 10 clips from 5 of 8 sources (0:06 in all)\n  10 of 5x32x32\n")
    assert "(silent.mp4)" in out
    assert "duplicate of another source (z/again.mp4)" in out
    assert f"Next: rats-video train teacher --data {tmp_path / 'cache'}" in out
    cache = ClipCache(tmp_path / "cache")
    assert [record.source for record in cache.records] == [f"{n}.mp4" for n in range(5) for _ in range(2)]
    assert [record.caption for record in cache.records][::2] == ["film 0", "film 1", "film 2", "film 0", "film 1"]
    assert skipped(cache.folder).keys() == {"broken.mp4", "silent.mp4", "z/again.mp4"}
    statistics = cache.manifest.statistics
    assert statistics is not None
    assert sum(statistics["skipped"].values()) == 3
    latents, text = cache.read(cache.records)
    assert statistics["latents"]["mean"] == pytest.approx(latents.mean().item(), abs=1e-5)
    assert statistics["latents"]["deviation"] == pytest.approx(latents.std(correction=0).item(), abs=1e-5)
    expected = loaded.encode_text([record.caption for record in cache.records])
    assert torch.allclose(text.embeds, expected.embeds, atol=1e-6)
    assert torch.equal(cache.empty_prompt.embeds, loaded.encode_text([""]).embeds)
    assert len({(record.source, record.split) for record in cache.records}) == 5


def test_latents_are_of_the_frames(prepared: Path, source: Path, loaded: WanBackbone) -> None:
    cache = ClipCache(prepared)
    record = cache.records[3]
    changes = ["model=x", "buckets=[{num_frames: 5, height: 32, width: 32}]", "cut.scene_threshold=null", "fps=8"]
    cfg = load_config(PrepareConfig, "tiny", group="prepare", overrides=changes)
    clip = read_source(SourceVideo(record.source, source / record.source, "x"), cfg).clips[1]
    latents, _ = cache.read([record])
    assert torch.allclose(latents, loaded.encode(clip.frames[None].float() / 255), atol=1e-4)
    assert (record.start, record.end) == (clip.start, clip.end)


def test_second_run_touches_nothing(prepare: Command, source: Path, tmp_path: Path, loads: list[Path]) -> None:
    first = prepare(source)
    before, then = files(tmp_path / "cache"), times(tmp_path / "cache")
    assert len(loads) == 1
    code, out, _ = prepare(source)
    assert code == 0
    assert f"nothing to do: {tmp_path / 'cache'} holds all of it" in out
    assert out.splitlines()[0] == first.out.splitlines()[0]
    assert files(tmp_path / "cache") == before
    then.pop(".", None)
    assert times(tmp_path / "cache") == then
    assert len(loads) == 1


MOMENTS = {
    "with nothing but the manifest": ("rats_video.commands.prepare.load_backbone", 1),
    "amid the first shard": ("rats_video.datasets.prepared.cache.save_file", 2),
    "before thumbnails": ("rats_video.preparation.encode.save_file", 1),
    "before the second record": ("rats_video.preparation.encode.write_record", 2),
    "amid the last unit": ("rats_video.backbones.wan.WanBackbone.encode", 2),
    "before the index": ("rats_video.preparation.index.write_lines", 1),
    "before the list of what was skipped": ("rats_video.preparation.index.write_lines", 2),
    "before the contact sheet": ("rats_video.preparation.index.write_contact", 1),
    "before the manifest": ("rats_video.datasets.prepared.cache.write_json", 1),
}


def test_killed_at_every_turn_it_is_the_same(prepare: Command, prepared: Path, source: Path, tmp_path: Path) -> None:
    for moment in MOMENTS.values():
        killed(functools.partial(prepare, source, output=tmp_path / "killed"), *moment)
    assert prepare(source, output=tmp_path / "killed").code == 0
    whole, again = files(prepared), files(tmp_path / "killed")
    assert again.keys() == whole.keys()
    assert [name for name in whole if again[name] != whole[name]] == []


def test_new_changed_and_vanished_files(prepare: Command, prepared: Path, source: Path, tmp_path: Path) -> None:
    cache = prepared
    before = {record.key: record for record in ClipCache(cache).records}
    film(source / "0.mp4", 50)
    (source / "2.txt").write_text("film with another caption")
    for gone in (1, 3, 4):
        (source / f"{gone}.mp4").unlink()
    film(source / "new.mp4", 51)
    (source / "new.txt").write_text("new")
    code, out, err = prepare(source)
    assert code == 0, err
    now = ClipCache(cache)
    captions = {record.source: record.caption for record in now.records}
    assert captions == {
        "0.mp4": "film 0", "2.mp4": "film with another caption", "new.mp4": "new", "z/again.mp4": "once more",
    }  # fmt: skip
    assert "deleted what was made of 5 sources that changed or are gone" in out
    kept = [record for record in now.records if record.key in before]
    assert {record.source for record in kept} == {"2.mp4", "z/again.mp4"}  # whose first copy is gone
    assert not [record for record in now.records if record.source == "0.mp4" and record.key in before]
    latents, _ = now.read(now.records)
    assert len(latents) == 8
    assert {record.shard for record in now.records} <= {path.name for path in (cache / "shards").iterdir()}
    prepare(source, output=tmp_path / "fresh")
    fresh = ClipCache(tmp_path / "fresh")
    assert [(r.key, r.caption, r.split) for r in now.records] == [(r.key, r.caption, r.split) for r in fresh.records]
    assert torch.allclose(latents, fresh.read(fresh.records)[0], atol=1e-5)


def test_shards_of_what_is_gone_are_deleted(prepare: Command, prepared: Path, source: Path) -> None:
    before = {path.name for path in (prepared / "shards").iterdir()}
    for name in ("0", "1", "2"):
        (source / f"{name}.mp4").unlink()
    prepare(source)
    after = {path.name for path in (prepared / "shards").iterdir()}
    assert after < before
    assert len(ClipCache(prepared).records) == 6  # the copy of 1.mp4 has taken its place


def test_lost_shard_is_made_again(prepare: Command, prepared: Path, source: Path) -> None:
    before = files(prepared)
    next((prepared / "shards").iterdir()).unlink()
    assert prepare(source).code == 0
    assert files(prepared) == before


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ("fps=4", "fps is 8.0 there, 4.0 now"),
        ("fit=pad", 'fit is "crop" there, "pad" now'),
        ("heldout=0.5", "heldout is 0.4 there, 0.5 now"),
        ("dtype=bfloat16", 'dtype is "float32" there, "bfloat16" now'),
        ("model=tiny-wan", "another VAE; another text encoder"),
    ],
)
def test_another_configuration_is_refused(
    prepare: Command, prepared: Path, source: Path, change: str, expected: str
) -> None:
    before = files(prepared)
    code, out, err = prepare(source, "--set", change)
    assert (code, out) == (2, "")
    assert f"error: {prepared}: holds clips made otherwise: {expected} (give another --output, or --over" in err
    assert files(prepared) == before


@pytest.mark.usefixtures("prepared")
def test_harmless_settings_may_change(prepare: Command, source: Path) -> None:
    code, out, _ = prepare(source, "--set", "workers=1", "--set", "batch_size=3", "--set", "timeout_seconds=5")
    assert code == 0
    assert "nothing to do" in out


def test_overwrite_makes_all_anew(prepare: Command, prepared: Path, source: Path) -> None:
    code, _, err = prepare(source, "--set", "dtype=bfloat16", "--overwrite")
    assert code == 0, err
    cache = ClipCache(prepared)
    assert cache.manifest.settings["dtype"] == "bfloat16"
    assert len(cache.records) == 10


@pytest.mark.usefixtures("prepared")
def test_another_source_is_refused_but_a_moved_one_is_not(prepare: Command, source: Path, tmp_path: Path) -> None:
    film(tmp_path / "other" / "0.mp4", 9)
    (tmp_path / "other" / "0.txt").write_text("film 0")
    code, _, err = prepare(tmp_path / "other")
    assert code == 2
    assert f'source is "{source}" there, "{tmp_path / "other"}" now' in err
    source.rename(tmp_path / "moved")
    code, out, _ = prepare(tmp_path / "moved")
    assert code == 0
    assert out.startswith("kept 10 clips from 5 of 8 sources")


@pytest.mark.parametrize("kind", [SourceVideo, ReadChunk])
def test_what_took_too_long_is_tried_again_with_more_time(
    prepare: Command, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: type
) -> None:
    """Whether it was looked through, or read."""

    class Slow(Inline):
        def __init__(self, function: Any, *, timeout_seconds: float, **options: object) -> None:
            super().__init__(function, **options)
            self._seconds = timeout_seconds

        def imap(self, tasks: Iterable[Any]) -> Iterator[tuple[Any, Any]]:
            for task, result in super().imap(tasks):
                late = isinstance(task, kind) and getattr(task, "source", task).name == "2.mp4"
                slow = late and self._seconds < 10
                yield task, Failure("takes too long") if slow else result

    monkeypatch.setattr("rats_video.commands.prepare_sources.IsolatedPool", Slow)
    prepare(source, "--set", "timeout_seconds=5")
    assert skipped(tmp_path / "cache")["2.mp4"] == "takes too long"
    assert "nothing to do" in prepare(source, "--set", "timeout_seconds=4").out
    prepare(source, "--set", "timeout_seconds=10")
    assert "2.mp4" not in skipped(tmp_path / "cache")
    assert len(ClipCache(tmp_path / "cache").records) == 10


def test_prompts_alone(prepare: Command, tmp_path: Path, loaded: WanBackbone) -> None:
    prompts = ["a red circle", "a blue square", "a red circle"]
    (tmp_path / "prompts.txt").write_text("\n".join(prompts))
    code, out, err = prepare(tmp_path / "prompts.txt")
    assert code == 0, err
    assert out.startswith("kept 2 prompts from 2 of ")
    cache = ClipCache(tmp_path / "cache")
    assert [record.caption for record in cache.records] == prompts[:2]
    shard = load_file(cache.folder / "shards" / cache.records[1].shard)
    assert torch.allclose(shard["embeds"], loaded.encode_text(prompts[:2]).embeds, atol=1e-6)
    with pytest.raises(UserError, match="holds prompts without videos"):
        cache.read(cache.records)


def test_nothing_kept(prepare: Command, tmp_path: Path) -> None:
    film(tmp_path / "source" / "a.mp4", 1, frames=2)
    (tmp_path / "source" / "a.txt").write_text("short")
    for _ in range(2):
        code, out, err = prepare(tmp_path / "source")
        assert (code, out) == (2, "")
        why = "a.mp4: 0.00 to 0.25 s gives 2 frames at 8 a second; the shortest bucket takes 5"
        assert f"nothing was kept: 1 x too short for any bucket; {why} (look at contact.html there)" in err
    with pytest.raises(UserError, match="did not come to its end"):
        ClipCache(tmp_path / "cache")


def test_mistakes_are_one_line(prepare: Command, source: Path, tmp_path: Path) -> None:
    def refused(outcome: Any, expected: str) -> None:
        assert outcome.code == 2
        assert outcome.err.count("error: ") == 1
        assert "Traceback" not in outcome.err
        assert expected in outcome.err.splitlines()[-1]

    refused(prepare(tmp_path / "nowhere"), "nowhere")
    refused(prepare(source, output=source / "cache"), "lies in")
    refused(prepare(source, "--overwrite", output=source.parent), "lies in it")
    refused(prepare(source, "--set", "buckets=[{num_frames: 6, height: 32, width: 32}]"), "buckets.0.num_frames")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("x")
    refused(prepare(source, output=tmp_path / "full"), "already exists and is not empty")
    assert (tmp_path / "full" / "mine").read_text() == "x"


def test_latents_that_overflow_are_no_clips(prepare: Command, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encode = WanBackbone.encode

    def huge(self: WanBackbone, videos: Tensor) -> Tensor:
        return encode(self, videos) * 1e6

    monkeypatch.setattr(WanBackbone, "encode", huge)
    code, _, err = prepare(source, "--set", "dtype=float16")
    assert code == 2
    assert "error: dtype: the latents are too large for it (use float32, or bfloat16)" in err


def test_real_pool_and_shapes(
    command: Command, config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: Path
) -> None:
    """In processes of their own, one of which takes too long, and a second kind of source."""
    options = ("--config", config, "--device", "cpu")
    code, out, err = command("prepare", source, "--output", tmp_path / "a", *options, "--set", "workers=1")
    assert code == 0, err
    assert out.startswith("kept 10 clips from 5 of 8 sources")
    late = ("--set", "timeout_seconds=0.001", "--set", "workers=1")
    code, _, err = command("prepare", source / "0.mp4", "--output", tmp_path / "b", *options, *late)
    assert code == 2
    assert "nothing was kept: 1 x takes too long" in err
    monkeypatch.setattr("rats_video.commands.prepare_sources.IsolatedPool", Inline)
    code, out, err = command("prepare", "shapes", "--output", tmp_path / "c", *options, "--set", "num_shapes=5")
    assert code == 0, err
    assert out.startswith("kept 5 clips from 5 of 5 sources")
    assert "warning" not in err
    code, out, err = command("prepare", "shapes", "--output", tmp_path / "c", *options, "--set", "num_shapes=6")
    assert out.startswith("kept 6 clips from 6 of 6 sources")
