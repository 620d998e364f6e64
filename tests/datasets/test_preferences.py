"""What a file of preferences may echo, how it is split by sources, and which words of captions count."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rats_video.datasets.prepared.cache import (
    CLIPS,
    FORMAT,
    SKIPPED,
    CacheManifest,
    ClipCache,
    ClipRecord,
    Skipped,
    write_lines,
)
from rats_video.datasets.prepared.preferences import read_preferences, split_by_source
from rats_video.errors import UserError
from rats_video.evaluation.stats import share_ci95
from rats_video.pretraining.reward_losses import preference_loss
from rats_video.pretraining.vocabulary import content_words


def record(source: str, start: float = 0.0, height: int = 32, digest: str = "") -> ClipRecord:
    return ClipRecord(
        f"{source}@{start:g}", source, digest or source, start, start + 2, "a cat", 5, height, 32, "train", "0", 0
    )


@pytest.fixture
def cache(tmp_path: Path) -> ClipCache:
    """Sources: a of three clips, b of two, c of one of another size, and a copy of a's first."""
    records = [
        *(record("a", start) for start in (0.0, 2.0, 4.0)), *(record("b", start) for start in (0.0, 2.0)),
        record("c", height=64), record("copy", digest="a"),
    ]  # fmt: skip
    write_lines(tmp_path / CLIPS, records, "clips")
    write_lines(tmp_path / SKIPPED, [Skipped("bad", "damaged")], "skipped")
    CacheManifest(FORMAT, "model", "Wan", "", "", {}, 8.0, complete=True).save(tmp_path)
    return ClipCache(tmp_path)


def write(path: Path, *lines: Any) -> Path:
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines) + "\n")
    return path


def keys(path: Path, cache: ClipCache) -> list[tuple[str, str]]:
    return [(pair.preferred.key, pair.rejected.key) for pair in read_preferences(path, cache)]


def test_what_unicode_calls_a_line_end_ends_no_line(cache: ClipCache, tmp_path: Path) -> None:
    write_lines(tmp_path / SKIPPED, [Skipped("odd\u2028name", "damaged")], "skipped")
    said = {"preferred": "a", "rejected": "b", "caption": "a\u2028dog\x85"}
    left_out = {"preferred": "odd\u2028name", "rejected": "a"}
    path = write(tmp_path / "p", *(json.dumps(line, ensure_ascii=False) for line in (said, left_out)))
    assert {pair.caption for pair in read_preferences(path, cache)} == {"a\u2028dog\x85"}


def test_clips_of_both_are_paired_in_order(cache: ClipCache, tmp_path: Path) -> None:
    path = write(tmp_path / "p", {"preferred": "a", "rejected": "b", "caption": "a dog"}, "")
    pairs = read_preferences(path, cache)
    assert [(pair.preferred.key, pair.rejected.key) for pair in pairs] == [("a@0", "b@0"), ("a@2", "b@2")]
    assert {pair.caption for pair in pairs} == {"a dog"}


def test_a_start_or_a_key_names_one_clip(cache: ClipCache, tmp_path: Path) -> None:
    line = {"preferred": "b", "rejected": "a", "rejected_start": 5.5}
    assert keys(write(tmp_path / "p", line), cache) == [("b@0", "a@4")]
    assert keys(write(tmp_path / "p", {"preferred": "a@2", "rejected": "b@2"}), cache) == [("a@2", "b@2")]
    votes = {"preferred": "a@2", "rejected": "b@2"}
    assert keys(write(tmp_path / "p", votes, votes), cache) == [("a@2", "b@2")] * 2


def test_what_prepare_skipped_is_left_out(cache: ClipCache, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "p", {"preferred": "bad", "rejected": "b"}, {"preferred": "a@0", "rejected": "b@0"})
    assert keys(path, cache) == [("a@0", "b@0")]
    assert "1 pairs left out: `prepare` skipped a source of theirs" in capsys.readouterr().err


AB = {"preferred": "a", "rejected": "b"}


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([AB, "{"], "line 2: is no JSON: EOF while parsing an object"),
        ([["a", "b"]], "line 1: must be a group of keys, got ['a', 'b']"),
        ([{"preferred": "a"}], "line 1: rejected: required, but missing"),
        ([AB | {"winner": 1}], "line 1: winner: unknown key"),
        ([AB | {"preferred": 3}], "line 1: preferred: must be text, got 3"),
        ([AB | {"rejected": "zebra"}], "line 1: 'zebra' is neither a source nor a clip"),
        ([AB | {"preferred_start": 77.5}], "line 1: 'a' has no clip at 77.5 s"),
        ([AB | {"rejected": "a"}], "line 1: 'a' and 'a' are the same clip"),
        ([AB | {"rejected": "copy"}], "line 1: 'a' and 'copy' are the same clip"),
        ([AB | {"rejected": "c"}], "line 1: 'a' and 'c' have no clips of one size"),
        ([AB, {"preferred": "b@2", "rejected": "a@2"}], "line 2: a tie: line 1 says the opposite"),
        (["{", AB, "}", ""], "2 of 4 lines are wrong, the first is line 1: is no JSON: "),
        ([""], "holds no pairs"),
    ],
)
def test_what_is_wrong_is_named_with_its_line(cache: ClipCache, tmp_path: Path, lines: list[Any], message: str) -> None:
    path = write(tmp_path / "prefs.jsonl", *lines)
    with pytest.raises(UserError) as caught:
        read_preferences(path, cache)
    assert str(caught.value).startswith(f"{path}: {message}")
    assert len(str(caught.value).splitlines()) == 1


def test_a_file_that_is_not_there(cache: ClipCache, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere: cannot read it"):
        read_preferences(tmp_path / "nowhere", cache)


# ----------------------------------------------------------------------------------------------------------- split

LINKS = st.lists(st.frozensets(st.sampled_from("abcdefghijklmnop"), min_size=1, max_size=2), min_size=1, max_size=40)


@given(links=LINKS, heldout=st.frozensets(st.sampled_from("abcq"), max_size=3), share=st.floats(0.05, 0.5))
def test_no_source_is_on_both_sides_and_the_held_out_are_never_trained_on(
    links: list[frozenset[str]], heldout: frozenset[str], share: float
) -> None:
    sides = split_by_source(links, heldout, max(1, int(share * len(links))), seed=3)
    assert sides == split_by_source(links, heldout, max(1, int(share * len(links))), seed=3)
    assert len(sides) == len(links)
    train = frozenset().union(*(link for link, side in zip(links, sides, strict=True) if side is False))
    validation = frozenset().union(*(link for link, side in zip(links, sides, strict=True) if side is True))
    assert not train & validation
    assert not train & heldout


def test_pairs_of_their_own_sources_are_all_used() -> None:
    links = [frozenset({f"a{i}", f"b{i}"}) for i in range(50)]
    sides = split_by_source(links, frozenset({"a7"}), 10, seed=0)
    assert (sides.count(True), sides.count(False)) == (10, 40)
    assert sides[7] is True
    assert sides != split_by_source(links, frozenset({"a7"}), 10, seed=1)


def test_of_a_web_of_sources_the_pairs_across_are_left_out() -> None:
    links = [frozenset({f"s{i}", f"s{j}"}) for i in range(20) for j in range(i)]
    sides = split_by_source(links, frozenset(), 38, seed=0)  # a fifth: 9 of 20 sources, whose pairs are 36
    assert (sides.count(True), sides.count(False), sides.count(None)) == (36, 55, 99)


# ----------------------------------------------------------------------------------------- words, losses, intervals


def test_content_words_are_the_frequent_ones_that_tell_something() -> None:
    captions = ["The red cat, in 4 boxes."] * 3 + ["A RED dog's bed in snow"] * 2 + ["red: cat"] * 5
    assert content_words(captions, 5, at_least=2) == ["cat", "boxes", "bed", "dog's", "snow"]
    assert content_words(captions, 5, at_least=3) == ["cat", "boxes"]
    assert content_words(captions, 1, at_least=2) == ["cat"]


def test_preference_loss_is_bradley_terry() -> None:
    good, bad = torch.tensor([1.0, 0.0, 3.0]), torch.tensor([0.0, 0.0, 5.0])
    each = torch.log(1 + torch.exp(bad - good))
    torch.testing.assert_close(preference_loss(good, bad), each.mean())
    torch.testing.assert_close(preference_loss(good, bad, torch.tensor([True, False, True])), (each[0] + each[2]) / 2)
    assert preference_loss(good, bad, torch.zeros(3, dtype=torch.bool)) == 0
    turned = torch.log(1 + torch.exp(good - bad))
    torch.testing.assert_close(preference_loss(good, bad, smoothing=0.1), (0.9 * each + 0.1 * turned).mean())


def test_smoothed_preference_is_best_at_a_finite_margin() -> None:
    margin = torch.tensor(0.0, requires_grad=True)
    optimizer = torch.optim.SGD([margin], lr=5.0)
    for _ in range(400):
        optimizer.zero_grad()
        preference_loss(margin, torch.tensor(0.0), smoothing=0.05).backward()
        optimizer.step()
    assert margin.sigmoid().item() == pytest.approx(0.95, abs=1e-3)


def test_interval_of_a_share_is_wilsons() -> None:
    assert share_ci95(1.0, 20) == pytest.approx((0.8389, 1.0), abs=1e-4)
    assert share_ci95(0.5, 100) == pytest.approx((0.4038, 0.5962), abs=1e-4)
    assert share_ci95(0.0, 5)[1] == pytest.approx(0.4345, abs=1e-4)
