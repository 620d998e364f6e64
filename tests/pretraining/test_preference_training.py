"""A reward of prepared clips: it learns what was planted, on sources it never saw, and only that."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from rats_video.backbones.wan import WanBackbone
from rats_video.condition import Condition
from rats_video.datasets.prepared.cache import (
    CLIPS,
    FORMAT,
    CacheManifest,
    ClipCache,
    ClipRecord,
    save_shard,
    write_lines,
)
from rats_video.datasets.prepared.preferences import Preference
from rats_video.datasets.shapes.corruptions import CORRUPTIONS
from rats_video.errors import UserError
from rats_video.pretraining.comparisons import CorruptedPairs, PreferencePairs
from rats_video.pretraining.decoded import DecodedClips
from rats_video.pretraining.preference import (
    Accuracy,
    PreferenceTrainConfig,
    accuracy,
    calibration,
    measure,
    train_preference,
    word_accuracy,
)
from rats_video.rewards.self_test import self_test
from rats_video.rewards.word import WordReward
from rats_video.seeds import seeded
from rats_video.types import ClipSpec, RewardScores

pytestmark = pytest.mark.pipeline

CPU = torch.device("cpu")
CONFIG = {"width": 16, "batch_size": 8, "steps": 40, "optimizer": {"lr": 1e-2}}


def record(name: str, caption: str = "", size: int = 32) -> ClipRecord:
    return ClipRecord(f"{name}_0", name, f"digest of {name}", 0.0, 1.0, caption, 5, size, size, "train", "0", 0)


class Painted(DecodedClips):
    """Clips of some gray, a smooth pattern and a grain, all told by their name: `0.7 anything`."""

    def __init__(self) -> None:
        pass

    def videos(self, records: Sequence[ClipRecord], device: torch.device) -> Tensor:
        def paint(one: ClipRecord) -> Tensor:
            generator = seeded(*one.source.encode())
            coarse = torch.rand(1, 3, 3, 4, 4, generator=generator)
            pattern = torch.nn.functional.interpolate(coarse, (5, one.height, one.width), mode="trilinear")
            return (float(one.source[:3]) - 0.15 + 0.3 * pattern[0].transpose(0, 1)).clamp(0, 1)

        return torch.stack(list(map(paint, records))).to(device)


def pairs(num: int, *, first: int = 0, seed: int = 0) -> list[Preference]:
    """Pairs of a bright and a dark clip, which of them is preferred as `seed` says: always the bright one for 0."""
    turned = torch.rand(first + num, generator=seeded(seed)) < (0.5 if seed else 0)
    found = []
    for index in range(first, first + num):
        bright, dark = record(f"0.{5 + index % 3} {index}"), record(f"0.{2 + index % 3} {index} other")
        found.append(Preference(dark, bright) if turned[index] else Preference(bright, dark))
    return found


def opposite(judged: list[Preference]) -> list[Preference]:
    return [Preference(pair.rejected, pair.preferred) for pair in judged]


def trained(
    train: list[Preference], folder: Path, choosing: list[Preference] | None = None, look: int = 10
) -> WordReward:
    cfg = PreferenceTrainConfig.model_validate(CONFIG | {"look_every": look})
    torch.manual_seed(0)
    reward = WordReward([], "frames", 16, any_prompt=True, quality_weight=1.0)
    other = None if choosing is None else PreferencePairs(Painted(), choosing, CPU)
    return train_preference(cfg, reward, PreferencePairs(Painted(), train, CPU), other, folder)


def test_a_planted_preference_is_learned_and_holds_for_other_sources(tmp_path: Path) -> None:
    """Untrained it happens to prefer what is bright, so the dark one is planted."""
    heldout = PreferencePairs(Painted(), opposite(pairs(60, first=100)), CPU)
    torch.manual_seed(0)
    before = measure(WordReward([], "frames", 16, any_prompt=True), heldout, 20)["all"]
    reward = trained(opposite(pairs(40)), tmp_path, opposite(pairs(20, first=60)))
    after = measure(reward, heldout, 20)
    assert list(after) == ["all"]
    assert (after["all"].num_pairs, after["all"].num_sources) == (60, 60)
    assert after["all"].share > 0.95
    assert before.share < 0.05
    assert after["all"].beats_chance
    found = calibration(reward, heldout, 20)
    assert found["quality_accuracy"] > 0.95
    assert found["quality_margin"] > 1
    assert 0.8 < found["quality_confidence"] < 1


def test_random_preferences_give_chance_on_other_sources(tmp_path: Path) -> None:
    found = measure(
        trained(pairs(40, seed=1), tmp_path), PreferencePairs(Painted(), pairs(60, first=100, seed=1), CPU), 20
    )
    assert not found["all"].beats_chance
    assert found["all"].low < 0.5 < found["all"].high


def test_the_best_weights_are_kept_not_the_last(tmp_path: Path) -> None:
    """Chosen by pairs that say the opposite, the best weights are those of the first look, when least was learned."""
    heldout = PreferencePairs(Painted(), pairs(60, first=100), CPU)
    last = calibration(trained(pairs(40), tmp_path / "last"), heldout, 20)
    best = calibration(trained(pairs(40), tmp_path / "best", opposite(pairs(20, first=60)), look=2), heldout, 20)
    assert best["quality_margin"] < 0.8 * last["quality_margin"]


# --------------------------------------------------------------------------------------------------- what is measured


class Brightness:
    def __call__(self, videos: Tensor, _: Sequence[str]) -> RewardScores:
        return RewardScores(videos.mean(dim=(1, 2, 3, 4)))


def test_measure_of_a_reward_that_knows_and_of_one_that_says_nothing() -> None:
    heldout = PreferencePairs(Painted(), pairs(21), CPU)
    assert measure(Brightness(), heldout, 4)["all"].share == 1
    assert measure(Brightness(), PreferencePairs(Painted(), opposite(pairs(21)), CPU), 4)["all"].share == 0

    class Same:
        def __call__(self, videos: Tensor, _: Sequence[str]) -> RewardScores:
            return RewardScores(torch.zeros(len(videos)))

    assert measure(Same(), heldout, 4)["all"].share == 0.5
    assert measure(Same(), heldout, 4)["all"].margin == 0


def test_accuracy_counts_sources_not_pairs() -> None:
    found = accuracy([1.0, 2.0, -1.0, 0.0], ["a", "a", "b", "b"])
    assert found == Accuracy(0.625, found.low, found.high, 0.5, 4, 2)
    assert (found.low, found.high) == pytest.approx((0.1417, 0.9443), abs=1e-3)
    wide, narrow = accuracy([1.0] * 40, ["a"] * 40), accuracy([1.0] * 40, list(map(str, range(40))))
    assert (wide.beats_chance, narrow.beats_chance) == (False, True)


def test_damage_is_measured_way_by_way_and_always_the_same() -> None:
    records = [record(f"0.5 {index}", "a cat", 32 if index % 3 else 48) for index in range(7)]
    damaged = CorruptedPairs(Painted(), records, CPU, seed=4)
    batches = list(damaged.fixed(3))
    assert [batch.kind for batch in batches[:7]] == [way.__name__ for way in CORRUPTIONS]
    for batch, again in zip(batches, damaged.fixed(3), strict=True):
        assert torch.equal(batch.bad, again.bad)
        assert batch.damaged is not None
        unharmed = ~batch.damaged[:, :, None, None, None]
        assert torch.equal(batch.good * unharmed, batch.bad * unharmed)
    found = measure(Brightness(), damaged, 4)
    assert list(found) == ["all", *(way.__name__ for way in CORRUPTIONS)]
    assert found["blur"].num_pairs == found["swap"].num_pairs == 7
    in_turn = [batch.kind for batch in CorruptedPairs(Painted(), records, CPU, seed=4, in_turn=True).fixed(2)]
    assert in_turn == ["noise", "blur", "flicker", "ghosting"]
    lonely = {batch.kind for batch in CorruptedPairs(Painted(), records[:1], CPU, seed=4).fixed(3)}
    assert lonely == {way.__name__ for way in CORRUPTIONS} - {"swap"}


def test_draws_are_of_one_size_without_repetition() -> None:
    records = [record(f"0.5 {index}", str(index), 32 if index % 3 else 48) for index in range(9)]
    damaged = CorruptedPairs(Painted(), records, CPU, seed=4)
    drawn = [damaged.draw(4, seeded(step)) for step in range(30)]
    assert {tuple(one.good.shape[-2:]) for one in drawn} == {(32, 32), (48, 48)}
    assert all(len(set(one.sources)) == len(one.sources) for one in drawn)
    assert {len(one.sources) for one in drawn} == {3, 4}


def test_prompt_of_a_pair_is_what_both_were_to_show() -> None:
    one, other = record("0.5 a", "a cat"), record("0.2 b", "a dog")
    judged = [Preference(one, other), Preference(one, other, "a pet"), Preference(one, record("0.1 c", "a cat"))]
    (batch,) = PreferencePairs(Painted(), judged, CPU).fixed(3)
    assert batch.prompts == ["", "a pet", "a cat"]
    assert batch.captions == ["a cat", "a pet", "a cat", "a dog", "a pet", "a cat"]


def test_word_accuracy_of_one_who_knows() -> None:
    class Knows(WordReward):
        def logits(self, videos: Tensor) -> tuple[Tensor, Tensor]:
            bright = videos.mean(dim=(1, 2, 3, 4))
            clip = torch.stack([bright, -bright, bright, bright], dim=1)
            return clip, clip[:, None].expand(-1, videos.shape[1], -1)

    reward = Knows(["bright", "dark", "never"], any_prompt=True)
    shown = [record("0.8 a", "bright"), record("0.3 b", "dark"), record("0.2 c", "dark"), record("0.5 d", "bright")]
    found = PreferencePairs(Painted(), [Preference(one, record("0.1 z")) for one in shown], CPU)
    assert word_accuracy(reward, found, 3) == 1
    assert word_accuracy(reward, PreferencePairs(Painted(), [Preference(shown[0], shown[1])], CPU), 3) is None


# ------------------------------------------------------------------------------------------- prompts without any word


def test_any_prompt_is_scored_by_quality_where_no_word_is_known(capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    reward = WordReward(["cat", "dog"], "frames", 16, any_prompt=True, quality_weight=2.0)
    videos = torch.rand(3, 5, 3, 32, 32, generator=seeded(1))
    with torch.no_grad():
        clip, frames = reward.logits(videos)
        scores = reward(videos, ["a Cat, asleep", "", "zebra"])
    quality = torch.nn.functional.logsigmoid(clip[:, -1])
    torch.testing.assert_close(scores.clip[1:], 2 * quality[1:])
    assert scores.parts["alignment"].tolist()[1:] == [0, 0]
    word = torch.nn.functional.logsigmoid(clip[0, 0]) / 2 + torch.nn.functional.logsigmoid(frames[0, :, 0]).mean() / 2
    torch.testing.assert_close(scores.clip[0], word + 2 * quality[0])
    reward.check_prompts(["a cat", "zebra", "a dog"])
    assert "1 of 3 prompts hold no word that the reward knows" in capsys.readouterr().err


@pytest.mark.parametrize("words", [[], ["cat"]])
def test_saved_it_is_sound_for_a_run(tmp_path: Path, words: list[str]) -> None:
    WordReward(words, "volume", 16, any_prompt=True, quality_weight=1.0).save(tmp_path)
    reward = WordReward.load(tmp_path)
    assert (reward.any_prompt, reward.quality_weight, reward.words) == (True, 1.0, tuple(words))
    self_test(reward, ClipSpec(5, 32, 32, 8.0), ["a zebra", "a cat"], where="reward").require_loss()


@pytest.mark.parametrize("weight", ["-1", "NaN", "1e999", '"0.1"'])
def test_a_weight_that_is_none_is_one_line(tmp_path: Path, weight: str) -> None:
    WordReward(["cat"], "frames", 16, quality_weight=0.5).save(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(path.read_text().replace('"quality_weight": 0.5', f'"quality_weight": {weight}'))
    with pytest.raises(UserError, match="not a word reward"):
        WordReward.load(tmp_path)


# --------------------------------------------------------------------------------------------------- decoded clips


def test_clips_are_decoded_once_and_are_the_vae_s(
    loaded: WanBackbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    latents = torch.randn(3, *loaded.latent_shape(ClipSpec(5, 32, 32, 8.0)), generator=seeded(1))
    save_shard(tmp_path / "shards" / "0", latents, Condition(torch.zeros(3, 1, 1)))
    records = [ClipRecord(f"k{i}", f"s{i}", f"d{i}", 0, 1, "", 5, 32, 32, "train", "0", i) for i in range(3)]
    write_lines(tmp_path / CLIPS, records, "clips")
    CacheManifest(FORMAT, "m", "Wan", "v", "t", {}, 8.0, complete=True).save(tmp_path)
    cache = ClipCache(tmp_path)
    clips = DecodedClips(cache, [*records, *records], loaded, tmp_path / "pixels")
    with torch.no_grad():
        expected = loaded.decode(latents).clamp(0, 1)
    torch.testing.assert_close(clips.videos(records[::-1], CPU), expected.flip(0), atol=0.5 / 255 + 1e-6, rtol=0)
    monkeypatch.setattr(WanBackbone, "decode", None)  # what is there is taken
    again = DecodedClips(cache, records, loaded, tmp_path / "pixels")
    assert torch.equal(again.videos(records, CPU), clips.videos(records, CPU))
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 100}))
    with pytest.raises(UserError, match=r"take 0.0 GB, 0.0 GB are free \(set a smaller num_pairs"):
        DecodedClips(cache, records[:2], loaded, tmp_path / "pixels")
