"""Units of work, the index made of their entries, and the contact sheet."""

from __future__ import annotations

import itertools
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from rats_video.datasets.prepared.cache import ClipRecord, Skipped, read_lines, write_lines
from rats_video.datasets.video.records import SourceVideo
from rats_video.errors import UserError
from rats_video.preparation import units as module
from rats_video.preparation.contact import MOST_CLIPS, write_contact
from rats_video.preparation.encode import moments_of, thumbnail, to_dtype
from rats_video.preparation.index import DUPLICATE, build_index, describe_index, summary
from rats_video.preparation.units import (
    Fingerprint,
    KeptClip,
    RunningStats,
    SourceBatch,
    SourceRecord,
    claim_units,
    fingerprint,
    latest,
    plan_units,
)


def mark(name: str, *, caption: str = "", mtime: int = 0) -> Fingerprint:
    return Fingerprint(name, caption, 0.0, None, None, 1, mtime)


def sources(*names: str) -> dict[Fingerprint, SourceVideo]:
    return {mark(name): SourceVideo(name, Path(name)) for name in names}


def clip(key: str, source: str = "a", *, caption: str = "one two", frames: int = 17, start: float = 0.0) -> KeptClip:
    record = ClipRecord(
        key, source, "d", start, start + 2.0, caption, frames, 64, 64, "train", "000000-0000.safetensors", 0
    )
    return KeptClip(record, RunningStats(2, 1.0, 2.0))


def test_plan_goes_on_with_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "UNIT_SOURCES", 2)
    found = sources(*"abcdefg")
    whole = plan_units(found, {}, 9.0)
    assert [[each.name for _, each in unit.sources] for unit in whole] == [["a", "b"], ["c", "d"], ["e", "f"], ["g"]]
    for done in itertools.chain.from_iterable(itertools.combinations(whole, count) for count in range(5)):
        records = {unit.number: [SourceRecord(each, "") for each, _ in unit.sources] for unit in done}
        assert plan_units(found, records, 9.0) == tuple(unit for unit in whole if unit not in done)
    records = {unit.number: [SourceRecord(each, "") for each, _ in unit.sources] for unit in whole}
    (added,) = plan_units(sources(*"abcdefgh"), records, 9.0)
    assert (added.number, [each.name for _, each in added.sources]) == (4, ["h"])
    changed = {mark("a", mtime=1): SourceVideo("a", Path("a")), mark("b", caption="x"): SourceVideo("b", Path("b"))}
    assert [each.name for _, each in plan_units(changed, records, 9.0)[0].sources] == ["a", "b"]


def test_given_up_is_tried_again_with_more_time_only() -> None:
    records = {0: [SourceRecord(mark("a"), "", waited=5.0)]}
    assert plan_units(sources("a"), records, 5.0) == ()
    assert plan_units(sources("a"), records, 4.0) == ()
    assert len(plan_units(sources("a"), records, 5.1)) == 1
    read = SourceRecord(mark("a"), "digest")
    for order in ({0: records[0], 1: [read]}, {0: [read], 1: records[0]}):
        assert latest(order, [mark("a"), mark("gone")]) == [read]


def test_every_unit_is_claimed_once(tmp_path: Path) -> None:
    (tmp_path / "units").mkdir()
    units = [SourceBatch(number, ()) for number in range(6)]
    first, second = claim_units(tmp_path, units), claim_units(tmp_path, units)
    mine: dict[int, list[int]] = {0: [], 1: []}
    for turn, (_, walk) in itertools.product(range(6), enumerate((first, second))):
        unit, is_mine = next(walk)
        assert unit.number == turn
        mine[int(walk is second)] += [unit.number] if is_mine else []
    assert sorted(mine[0] + mine[1]) == list(range(6))


def test_fingerprint_of_a_file_and_of_a_prompt(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    path.write_bytes(b"12345")
    video = SourceVideo("a.mp4", path, "x")
    before = fingerprint(video)
    assert (before.size, before.mtime_ns) == (5, path.stat().st_mtime_ns)
    path.write_bytes(b"123456")
    assert fingerprint(video) != before
    prompt = SourceVideo("p:1", path, "x", kind="prompt")
    assert (fingerprint(prompt).size, fingerprint(prompt).mtime_ns) == (0, 0)  # another line does not change this one


def test_moments_add_up_in_any_division() -> None:
    values = torch.randn(60, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 3 + 50
    for sizes in ([60], [1, 59], [20, 20, 20], [7, 0, 13, 40]):
        total = sum((moments_of(part) for part in values.split(sizes) if len(part)), RunningStats())
        assert (total.count, total.mean) == (60, pytest.approx(values.mean().item(), rel=1e-12))
        assert total.std == pytest.approx(values.std(correction=0).item(), rel=1e-9)
    assert RunningStats() + RunningStats() == RunningStats()
    assert RunningStats().std == 0.0


def test_index_keeps_the_first_of_equal_clips() -> None:
    entries = [
        SourceRecord(mark("a"), "1", (clip("1-0", "a"), clip("1-2", "a", start=2.0))),
        SourceRecord(mark("b"), "2", (), (Skipped("b", "too short"),)),
        SourceRecord(mark("c"), "1", (clip("1-0", "c"), clip("1-4", "c", caption="three"))),
        SourceRecord(mark("a", caption="other"), "1", (clip("1-0", "a"),)),
    ]
    index = build_index(entries, [Skipped("d", "no caption")])
    assert [clip.record.key for clip in index.clips] == ["1-0", "1-2", "1-4"]
    assert index.skipped == (
        Skipped("d", "no caption"), Skipped("b", "too short"), Skipped("c", DUPLICATE, "same as a"),
        Skipped("a", DUPLICATE, "same as a"),
    )  # fmt: skip
    told = describe_index(index)
    assert (told["sources"], told["clips"], told["hours"]) == (5, 3, round(6 / 3600, 6))
    assert told["skipped"] == {DUPLICATE: 2, "no caption": 1, "too short": 1}
    assert told["captions"] == {"distinct": 2, "words": {"fewest": 1, "median": 1.5, "most": 2}}
    assert told["latents"] == {"mean": 1.0, "deviation": 1.0}
    said = [
        "kept 3 clips from 2 of 5 sources (0:06 in all)",
        "  3 of 17x64x64",
        f"  skipped 2: {DUPLICATE} (c, a): same as a",
        "  skipped 1: no caption (d)",
        "  skipped 1: too short (b)",
    ]
    mend = "prepare more videos, or with another heldout share or seed; --set heldout=0 trains on all"
    assert summary(index, 0.05) == [*said, f"  none is held out for validation: {mend}"]
    assert summary(index, 0.0) == [*said, "  none is held out for validation, as heldout=0 says"]
    last = replace(index.clips[2], record=replace(index.clips[2].record, split="heldout"))
    assert summary(replace(index, clips=(*index.clips[:2], last)), 0.05) == said
    emptied = summary(replace(index, clips=(last,)), 0.99)[-1]
    assert emptied == "  none is left to train on: prepare more videos, or with a smaller heldout share"
    assert describe_index(build_index(entries))["index"] != told["index"]


def test_lines_survive_what_unicode_calls_a_line(tmp_path: Path) -> None:
    rows = [Skipped("a\u2028b\x85c\x0b", "why\n", "\x1c"), Skipped("\N{SNOWMAN}", "x")]
    write_lines(tmp_path / "rows.jsonl", rows, "rows")
    assert read_lines(tmp_path / "rows.jsonl", Skipped, fix="") == tuple(rows)
    (tmp_path / "rows.jsonl").write_text('{"name": 1')
    with pytest.raises(UserError, match="cannot read it"):
        read_lines(tmp_path / "rows.jsonl", Skipped, fix="")


def test_contact_sheet_is_text_of_strangers_made_harmless(tmp_path: Path) -> None:
    evil = "<script>alert(1)</script> & \"'\x1b\u202e"
    records = [clip(f"k{n}", f"{evil}{n}", caption=f"{evil} {n}").record for n in range(MOST_CLIPS * 3)]
    write_contact(tmp_path, records, {evil: [Skipped(evil, evil, evil)] * 9}, evil)
    page = (tmp_path / "contact.html").read_text(encoding="utf-8")
    assert page.count("<script>") == 1  # our own
    assert page.count("&lt;script&gt;alert(1)&lt;/script&gt; &amp; &quot;&#x27;") >= 2 * MOST_CLIPS
    assert not re.search("[\x1b\u202e]", page)
    shown = [int(number) for number in re.findall(r"u202e (\d+)<small>", page)]
    assert shown == list(range(0, 3 * MOST_CLIPS, 3))
    assert page.count("<figure>") == MOST_CLIPS
    assert not re.search(r"https?://", page)
    write_contact(tmp_path, [], {}, "kept nothing")
    assert "Nothing was skipped" in (tmp_path / "contact.html").read_text()


def test_thumbnail_shows_three_frames() -> None:
    import io

    from PIL import Image

    frames = torch.zeros(5, 3, 32, 64, dtype=torch.uint8)
    frames[2, 0], frames[4, 1] = 255, 255
    image = Image.open(io.BytesIO(bytes(thumbnail(frames).tolist())))
    assert image.size == (3 * 192, 96)
    colors = [image.getpixel((96 + 192 * place, 48)) for place in range(3)]
    for color, expected in zip(colors, [(0, 0, 0), (255, 0, 0), (0, 255, 0)], strict=True):
        assert max(abs(a - b) for a, b in zip(color, expected, strict=True)) < 6


def test_what_does_not_fit_is_not_stored() -> None:
    assert torch.equal(to_dtype(torch.tensor([1.0]), torch.float16, "x"), torch.tensor([1.0], dtype=torch.float16))
    with pytest.raises(UserError, match=r"^dtype: x are too large"):
        to_dtype(torch.tensor([1e6]), torch.float16, "x")
    nan = torch.tensor([float("nan")])
    with pytest.raises(UserError, match=r"^compute_dtype: x come out as NaN or infinity \(use float32\)"):
        to_dtype(nan.bfloat16(), torch.float32, "x")
    with pytest.raises(UserError, match=r"^compute_dtype: x come out as NaN or infinity \(it is float32 already"):
        to_dtype(nan, torch.float32, "x")
