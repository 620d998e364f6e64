from __future__ import annotations

from collections.abc import Callable

import pytest

from rats_video.distillation.resume import FREE, changed_keys
from rats_video.distillation.settings import DistillConfig

MakeConfig = Callable[..., DistillConfig]
RESTARTS = "training.optimizer.restarts"
LORA = ("student.weights.kind=lora", "student.weights.rank=2")


@pytest.mark.parametrize(
    "changes",
    [
        ("training.micro_batch_size=1", "compute.cache_text=true", "compute.activation_checkpointing=true"),
        ("compute.decode.checkpoint=true", "compute.decode.offload=true", "compute.offload=block"),
        ("compute.attention=xformers", "compute.compile=true", "teacher.cache=guides"),
        ("parallel.shard=true", "parallel.context=2", "evaluation.num_clips=9", "comparison.num_videos=2"),
        ("training.steps=99", "training.checkpoint_every=7", "heldout_reward=null", "architecture=wan21_1b"),
    ],
)
def test_what_leaves_the_weights_as_they_would_be_may_change(make_config: MakeConfig, changes: tuple[str, ...]) -> None:
    assert changed_keys(make_config(*LORA), make_config(*LORA, *changes)) == []


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ("seed=9", "seed"),
        ("compute.dtype=bfloat16", "compute.dtype"),
        ("compute.decode.window=1", "compute.decode.window"),
        ("compute.decode.dtype=bfloat16", "compute.decode.dtype"),
        ("compute.decode.small=taew2_1", "compute.decode.small"),
        ("training.batch_size=4", "training.batch_size"),
        ("training.optimizer.kind=adamw8bit", "training.optimizer.kind"),
        ("student.weights.rank=4", "student.weights.rank"),
        ("student.num_steps=[4, 2]", "student.num_steps"),
        ("prompts.train=other.txt", "prompts.train"),
        ("clip.height=64", "clip.height"),
    ],
)
def test_what_decides_the_weights_may_not(make_config: MakeConfig, change: str, key: str) -> None:
    assert changed_keys(make_config(*LORA), make_config(*LORA, change)) == [key]


def test_of_another_choice_only_its_kind_is_named(make_config: MakeConfig) -> None:
    other = make_config("teacher.kind=ema", "method.gate.kind=constant", "method.alpha=7")
    assert changed_keys(make_config(*LORA), other) == [
        "method.alpha", "method.gate.kind", "teacher.kind", "student.weights.kind"
    ]  # fmt: skip


def test_terms_of_a_sum(make_config: MakeConfig) -> None:
    sum_of_two = ("reward.kind=sum", "reward.terms.a.reward.path=x", "reward.terms.b.reward.kind=pickscore")
    before = make_config(*sum_of_two)
    assert changed_keys(before, make_config(*sum_of_two, "reward.terms.b.reward.chunk=1")) == []
    for change in ("reward.terms.b.weight", "reward.terms.a.mean", "reward.terms.b.reward.frames"):
        assert changed_keys(before, make_config(*sum_of_two, f"{change}=2")) == [change]
    other = make_config(*sum_of_two, "reward.terms.c.reward.path=y")
    assert changed_keys(before, other) == changed_keys(other, before) == ["reward.terms"]


def test_steps_may_not_change_where_the_rate_decays_to_them(make_config: MakeConfig) -> None:
    decay = "training.optimizer.decay=true"
    assert changed_keys(make_config(decay), make_config(decay, "training.steps=99")) == ["training.steps"]


@pytest.mark.parametrize(
    ("restarts", "changed"),
    [
        ("[8]", []),
        ("[]", ["training.steps"]),
        ("[9]", ["training.steps", RESTARTS]),
        ("[4, 8]", ["training.steps", RESTARTS]),
    ],
)
def test_a_run_is_made_longer_as_long_as_no_step_so_far_has_another_rate(
    make_config: MakeConfig, restarts: str, changed: list[str]
) -> None:
    decay = "training.optimizer.decay=true"
    longer = make_config(decay, "training.steps=12", f"training.optimizer.restarts={restarts}")
    assert changed_keys(make_config(decay, "training.steps=8"), longer) == changed


def test_a_critics_rate_counts_as_well(make_config: MakeConfig) -> None:
    dmd2 = ("method={kind: dmd2}", "method.fake_score.optimizer={lr: 1.0e-3, decay: true}")
    assert changed_keys(make_config(*dmd2), make_config(*dmd2, "training.steps=9")) == ["training.steps"]
    longer = make_config(*dmd2, "training.steps=9", "method.fake_score.optimizer.restarts=[2]")
    assert changed_keys(make_config(*dmd2), longer) == []


def test_free_keys_are_keys(make_config: MakeConfig) -> None:
    known = make_config().model_dump()
    for key in FREE - {"reward.chunk", "reward.terms.*.reward.chunk"}:  # of a CLIP reward
        tree = known
        for part in key.split("."):
            tree = tree[part]


def test_a_guard_compares_its_looks_and_may_decide_the_weights(make_config: MakeConfig) -> None:
    before, acts = make_config("guard={every: 10}"), make_config("guard={every: 10, on_alarm: shape}")
    assert changed_keys(before, make_config("guard={every: 5, choose: last}")) == []
    assert changed_keys(before, make_config("guard={every: 10, num_clips: 4}")) == ["guard.num_clips"]
    assert changed_keys(before, make_config("guard={every: 10}", "heldout_reward=null")) == ["heldout_reward"]
    assert changed_keys(acts, make_config("guard={every: 5, on_alarm: shape}")) == ["guard.every"]
    assert changed_keys(before, acts) == ["guard.on_alarm"]
