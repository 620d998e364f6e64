"""The order of prepared clips: even, without end, the same for all who read it."""

from __future__ import annotations

import itertools
import json
import threading
from collections import Counter
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_cache import SHAPE, SIZE, write_cache

from rats_video.datasets.prepared import cache as cache_module
from rats_video.datasets.prepared.cache import CLIPS as CLIPS_FILE
from rats_video.datasets.prepared.cache import SHARDS, ClipCache
from rats_video.datasets.prepared.loader import ClipBatch, ClipLoader, turn
from rats_video.errors import UserError

WIDE = (5, 32, 64)
LONG = (9, 32, 32)
ORDER = ["0003", "0004", "0001", "0006", "0000", "0002", "0005"]
CLIPS = {SIZE: 7, WIDE: 3, LONG: 1}


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> ClipCache:
    return write_cache(tmp_path_factory.mktemp("cache"), CLIPS, heldout=1)


def keys(batch: ClipBatch) -> list[str]:
    return [record.key for record in batch.records]


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("clips")]


def same(one: ClipBatch, other: ClipBatch) -> bool:
    return (
        keys(one) == keys(other)
        and torch.equal(one.latents, other.latents)
        and torch.equal(one.text.embeds, other.text.embeds)
    )


# ------------------------------------------------------------------------------------------------------------- turns


def test_turns_known_answers() -> None:
    assert [turn([5], step) for step in range(3)] == [(0, 0), (0, 1), (0, 2)]
    assert [turn([1, 1], step) for step in range(4)] == [(1, 0), (0, 0), (1, 1), (0, 1)]
    assert [turn([1, 2, 1], step)[0] for step in range(4)] == [2, 1, 1, 0]


@given(st.lists(st.integers(1, 50), min_size=1, max_size=6), st.integers(1, 200))
def test_buckets_take_turns_in_proportion(sizes: list[int], steps: int) -> None:
    seen: Counter[int] = Counter()
    for step in range(steps):
        bucket, before = turn(sizes, step)
        assert before == seen[bucket]
        seen[bucket] += 1
        for each, size in enumerate(sizes):
            assert abs(seen[each] - (step + 1) * size / sum(sizes)) < len(sizes)


@given(st.lists(st.integers(1, 50), min_size=1, max_size=6), st.integers(0, 5))
def test_every_round_gives_every_bucket_its_size(sizes: list[int], rounds: int) -> None:
    whole = sum(sizes)
    seen = Counter(turn(sizes, step)[0] for step in range(rounds * whole, (rounds + 1) * whole))
    assert seen == Counter(dict(enumerate(sizes)))


# ------------------------------------------------------------------------------------------------------------- order


def test_a_batch_is_what_the_cache_holds(cache: ClipCache) -> None:
    batch = ClipLoader(cache, batch_size=3, seed=1).batch(4)
    assert batch.latents.shape == (3, *SHAPE)
    assert batch.latents.dtype == batch.text.embeds.dtype == torch.float32
    assert (batch.spec.num_frames, batch.spec.height, batch.spec.width) == batch.records[0].size
    assert batch.spec.fps == 8.0
    for record, latents, embeds in zip(batch.records, batch.latents, batch.text.embeds, strict=True):
        assert record.split == "train"
        assert latents[0, 0, 0, 0] == int(record.key)
        assert (embeds == int(record.key) + 1).all()


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 12), st.integers(0, 3))
def test_every_clip_is_seen_before_any_is_seen_again(cache: ClipCache, batch_size: int, seed: int) -> None:
    loader = ClipLoader(cache, batch_size=batch_size, seed=seed)
    streams: dict[tuple[int, int, int], list[str]] = {size: [] for size in CLIPS}
    for step in range(2 * sum(CLIPS.values())):
        batch = loader.batch(step)
        assert len({record.size for record in batch.records}) == 1
        streams[batch.records[0].size] += keys(batch)
    for size, count in CLIPS.items():
        stream = streams[size]
        assert len(stream) == 2 * count * batch_size
        epochs = [stream[start : start + count] for start in range(0, len(stream), count)]
        assert all(len(set(epoch)) == count for epoch in epochs)
        if batch_size >= 4 and count == 7:
            assert len(set(map(tuple, epochs))) > 1  # each in an order of its own


@settings(max_examples=30, deadline=None)
@given(st.sampled_from([(1, 1), (4, 2), (6, 3), (6, 6), (12, 4)]), st.integers(0, 10**7), st.integers(0, 2**40))
def test_any_number_of_processes_share_the_same_batch(
    cache: ClipCache, sizes: tuple[int, int], step: int, seed: int
) -> None:
    batch_size, processes = sizes
    share = batch_size // processes
    whole = ClipLoader(cache, batch_size=batch_size, seed=seed, prompt_dropout=0.5).batch(step)
    parts = [
        ClipLoader(
            cache, batch_size=batch_size, seed=seed, prompt_dropout=0.5, rows=slice(rank * share, (rank + 1) * share)
        ).batch(step)
        for rank in range(processes)
    ]
    assert [key for part in parts for key in keys(part)] == keys(whole)
    assert torch.equal(torch.cat([part.latents for part in parts]), whole.latents)
    assert torch.equal(torch.cat([part.text.embeds for part in parts]), whole.text.embeds)


def test_seeds_give_orders_of_their_own(cache: ClipCache) -> None:
    orders = {tuple(keys(ClipLoader(cache, batch_size=7, seed=seed, size=SIZE).batch(0))) for seed in range(8)}
    assert len(orders) == 8


def test_an_order_is_what_it_was(cache: ClipCache) -> None:
    """Runs are resumed by later versions of this package."""
    assert [turn([7, 1, 3], step) for step in (10, 10**7)] == [(0, 6), (0, 6363636)]
    assert keys(ClipLoader(cache, batch_size=7, seed=0, size=SIZE).batch(0)) == ORDER


def test_a_far_step_costs_no_more_than_a_near_one(cache: ClipCache) -> None:
    loader = ClipLoader(cache, batch_size=2, seed=0)
    drawn: list[int] = []
    for bucket in loader._buckets:
        draw = bucket._shuffled
        bucket._order = lambda epoch, draw=draw: (drawn.append(epoch), draw(epoch))[1]  # type: ignore[misc, func-returns-value]
    loader.batch(10_000_000)
    assert len(drawn) == 2  # a clip each: no epoch before


def test_a_split_smaller_than_a_batch_repeats(cache: ClipCache) -> None:
    batch = ClipLoader(cache, batch_size=5, seed=0, split="heldout", size=LONG).batch(0)
    assert len(set(keys(batch))) == 1
    assert batch.latents.shape[0] == 5
    assert batch.records[0].split == "heldout"


def test_one_size_alone(cache: ClipCache) -> None:
    loader = ClipLoader(cache, batch_size=2, seed=0, size=WIDE)
    assert {record.size for step in range(6) for record in loader.batch(step).records} == {WIDE}


@pytest.mark.parametrize(
    ("choice", "what"),
    [({"split": "heldout"}, "it has no heldout clips"), ({"size": LONG}, "it has no train clips of 9 x 32 x 32")],
)
def test_no_clips_is_one_line(tmp_path: Path, choice: dict[str, object], what: str) -> None:
    cache = write_cache(tmp_path, {SIZE: 2})
    with pytest.raises(UserError, match=f"{tmp_path}: {what}"):
        ClipLoader(cache, batch_size=1, seed=0, **choice)  # type: ignore[arg-type]


# ----------------------------------------------------------------------------------------------------------- dropout


def test_no_prompt_or_every_prompt_is_dropped(cache: ClipCache) -> None:
    assert (ClipLoader(cache, batch_size=4, seed=0).batch(0).text.embeds > 0).all()
    assert (ClipLoader(cache, batch_size=4, seed=0, prompt_dropout=1.0).batch(0).text.embeds == 0).all()


def test_prompts_are_dropped_at_their_rate_and_no_clip_with_them(cache: ClipCache) -> None:
    loader = ClipLoader(cache, batch_size=10, seed=0, prompt_dropout=0.2)
    dropped = [float((embeds == 0).all()) for step in range(60) for embeds in loader.batch(step).text.embeds]
    assert 0.15 < sum(dropped) / len(dropped) < 0.25
    plain = ClipLoader(cache, batch_size=10, seed=0)
    assert torch.equal(loader.batch(3).latents, plain.batch(3).latents)


# ---------------------------------------------------------------------------------------------------------- the thread


@pytest.mark.parametrize("prefetch", [0, 1, 3])
def test_batches_from_anywhere_are_those_of_their_steps(cache: ClipCache, prefetch: int) -> None:
    loader = ClipLoader(cache, batch_size=3, seed=2, prompt_dropout=0.3, prefetch=prefetch)
    for start in (0, 5, 10**6):  # a run that is resumed in the middle of an epoch sees what an uninterrupted one sees
        for step, batch in zip(range(start, start + 6), loader.batches(start), strict=False):
            assert same(batch, loader.batch(step))


def test_the_thread_reads_ahead_in_bounds_and_ends_with_its_iterator(cache: ClipCache) -> None:
    loader = ClipLoader(cache, batch_size=1, seed=0, prefetch=3)
    read: list[int] = []
    all_read = threading.Event()
    whole = loader.batch

    def batch(step: int) -> ClipBatch:
        read.append(step)
        if len(read) == 4:
            all_read.set()
        return whole(step)

    loader.batch = batch  # type: ignore[method-assign]
    before = len(threads())
    batches = loader.batches(7)
    next(batches)
    assert all_read.wait(30)
    assert read == [7, 8, 9, 10]
    assert len(threads()) == before + 1
    batches.close()  # type: ignore[attr-defined]
    assert len(threads()) == before
    assert read == [7, 8, 9, 10]


def test_a_damaged_shard_is_one_line_when_its_turn_comes(tmp_path: Path) -> None:
    cache = write_cache(tmp_path, {SIZE: 8}, shard_clips=4)
    shard = sorted((tmp_path / SHARDS).iterdir())[1]
    shard.write_bytes(shard.read_bytes()[:-20])
    loader = ClipLoader(cache, batch_size=1, seed=0, prefetch=4)
    good = list(itertools.takewhile(lambda step: loader._buckets[0].clip(step).shard != shard.name, range(8)))
    before = len(threads())
    batches = loader.batches(0)
    assert [int(next(batches).records[0].key) < 4 for _ in good] == [True] * len(good)
    with pytest.raises(UserError, match=f"{shard}: cannot read it: .*delete it and run the same prepare again"):
        next(batches)
    assert len(threads()) == before


# ------------------------------------------------------------------------------------------------------------- shards


def test_a_row_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    cache = write_cache(tmp_path, {SIZE: 4})
    shard = next((tmp_path / SHARDS).iterdir())
    write_cache(tmp_path / "other", {SIZE: 2})
    next((tmp_path / "other" / SHARDS).iterdir()).replace(shard)
    with pytest.raises(UserError, match=f"{shard}: cannot read it: it has no row [23]"):
        ClipLoader(cache, batch_size=4, seed=0).batch(0)


def test_few_of_many_shards_are_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_module, "OPEN_SHARDS", 3)
    cache = write_cache(tmp_path, {SIZE: 12}, shard_clips=1)
    loader = ClipLoader(cache, batch_size=4, seed=0)
    first = [loader.batch(step) for step in range(6)]
    maps = Path("/proc/self/maps").read_text(encoding="utf-8")
    assert 1 <= maps.count(str(tmp_path)) <= 3 + 1  # and the empty prompt
    assert all(same(batch, loader.batch(step)) for step, batch in enumerate(first))


def test_what_is_read_of_a_half_precision_cache_is_float32(tmp_path: Path) -> None:
    batch = ClipLoader(write_cache(tmp_path, {SIZE: 3}, dtype=torch.bfloat16), batch_size=2, seed=0).batch(0)
    assert batch.latents.dtype == batch.text.embeds.dtype == torch.float32
    assert [int(clip[0, 0, 0, 0]) for clip in batch.latents] == [int(key) for key in keys(batch)]


@pytest.mark.parametrize("shard", ["../secret.safetensors", "/etc/x.safetensors", ".hidden", "a/b.safetensors", ""])
def test_a_strangers_cache_names_no_file_outside_its_shards(tmp_path: Path, shard: str) -> None:
    folder = write_cache(tmp_path / "cache", {SIZE: 2}).folder
    lines = (folder / CLIPS_FILE).read_text().splitlines()
    (folder / CLIPS_FILE).write_text(json.dumps({**json.loads(lines[0]), "shard": shard}) + "\n")
    with pytest.raises(UserError, match=r"clips\.jsonl: cannot read it: .*\(prepare again\)"):
        _ = ClipCache(folder).records
