"""One run on two processes, shared in every way there is, is the run of one process."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import processes
import pytest
import torch
from torch import Tensor

from rats_video.training.checkpoint import find_damage
from rats_video.training.metrics import read_metrics

pytestmark = pytest.mark.slow

STEPS = 3
EMA = ("teacher.kind=ema", "teacher.num_steps=4", "teacher.decay=0.5")
FULL = EMA
ASKED = ("teacher.asked=0.5", "teacher.asked_by=update")  # all processes ask in the same updates
LORA = (*EMA, *ASKED, "student.weights.kind=lora", "student.weights.rank=2", "student.weights.alpha=2")
# A random reward tells a group's clips apart by so little that in standard deviations rounding would count.
POLICY = (*EMA, "method.policy={samples: 2, normalize: false}")
SHARD, CONTEXT, REWARD = "parallel.shard=true", "parallel.context=2", "parallel.reward_ranks=1"
WAYS = {
    "full-data": (*FULL,),
    "full-shard": (*FULL, SHARD),
    "full-shard-context": (*FULL, SHARD, CONTEXT),
    "lora-data": (*LORA,),
    "lora-shard": (*LORA, SHARD),
    "lora-context": (*LORA, CONTEXT),
    "lora-reward": (*LORA, REWARD),
    "policy-shard-context": (*POLICY, SHARD, CONTEXT),
}
# Every other method, on two clips an update, once in each way that something of it is shared.
BARE = ("guard=null", "validation=null", "training.steps=2")
RANK_2 = ("student.weights.kind=lora", "student.weights.rank=2", "student.weights.alpha=2")
ROUNDS = "fake_score: {rounds: 2, optimizer: {lr: 1.0e-3}}"
GAN = "gan: {weight: 0.1, fake_score_weight: 0.1}"
GROUP = "policy: {samples: 2, normalize: false, trained_share: 0.5}"
DMD2 = f"method={{kind: dmd2, {ROUNDS}, {GAN}, ida: 0.9, adversarial_reward: {{weight: 0.5, {GROUP}}}}}"
RTDMD = f"method={{kind: rtdmd, {ROUNDS}, {GROUP}, distribution_weight: 0.1, cold_start: 0.5}}"
DOLLAR = f"method={{kind: dollar, {ROUNDS}, pairs: {{count: 2}}}}"
SLOW = ROUNDS.replace("1.0e-3", "1.0e-4")  # of many weights' gradients near 0 Adam makes whole steps of their rounding
SENSEFLOW = f"method={{kind: senseflow, {SLOW}, gan: {{vision: {{kind: word}}, halvings: 1}}}}"
ADVDMD = f"method={{kind: advdmd, {ROUNDS}, {GAN}, policy_from: 0, policy: {{samples: 2, noise: 1, normalize: false}}}}"
TURBO = "method={kind: t2v_turbo, pairs: {count: 2}, video_reward: {kind: motion_smoothness}}"
IN_TWO = ("training.batch_size=4", "training.micro_batch_size=1")
METHODS = {
    "dmd2 full": ((DMD2,), [(), (SHARD,), (SHARD, CONTEXT)]),
    "dmd2 lora": ((DMD2, *RANK_2), [(SHARD,), (CONTEXT,), (SHARD, CONTEXT)]),
    "dmd2 reward": ((f"method={{kind: dmd2, {ROUNDS}, reward_weight: 1}}", *RANK_2, *IN_TWO), [(SHARD,), (REWARD,)]),
    "dmd2 renoise": ((f"method={{kind: dmd2, {ROUNDS}}}", "student.sampler=renoise"), [(), (SHARD,)]),
    "advdmd": ((ADVDMD, *RANK_2, "student.sampler=renoise"), [(SHARD,)]),
    "senseflow": ((SENSEFLOW, *RANK_2), [(SHARD, CONTEXT)]),
    "rtdmd full": ((RTDMD, *IN_TWO), [(SHARD,)]),
    "rtdmd lora": ((RTDMD, *RANK_2), [(SHARD, CONTEXT), (REWARD,)]),
    "dollar full": ((DOLLAR,), [(SHARD, CONTEXT)]),
    "dollar lora": ((DOLLAR, *RANK_2, *IN_TWO), [(SHARD,), (REWARD,)]),
    "grpo": ((f"method={{kind: grpo, {GROUP}, kl_weight: 0.1}}",), [(SHARD,), (SHARD, CONTEXT)]),
    "refl": (("method.kind=refl", *RANK_2), [(SHARD,), (CONTEXT,)]),
    "imitation": (("method.kind=imitation",), [(SHARD,)]),
    "consistency": (("method={kind: consistency, pairs: {count: 2}}",), [(SHARD, CONTEXT)]),
    "t2v_turbo": ((TURBO, *RANK_2), [(SHARD,)]),
}
SHARED = [(name, ways) for name, (_, shared) in METHODS.items() for ways in shared]

Alone = Callable[[str], Path]


def folder_of(name: str, ways: tuple[str, ...] = ("alone",)) -> str:
    return "-".join((name, *ways)).replace("parallel.", "").replace(" ", "-")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("shared")


@pytest.fixture(scope="module")
def alone(config_file: Path, folder: Path) -> Alone:
    """The run of one process."""

    @functools.cache
    def train(weights: str) -> Path:
        output = folder / f"alone-{weights}"
        overrides = {"full": FULL, "lora": LORA, "policy": POLICY}[weights]
        processes.work(processes.Job(str(config_file), str(output), (*overrides, f"training.steps={STEPS}")))
        return output

    return train


@pytest.fixture(scope="module")
def together(config_file: Path, folder: Path) -> Path:
    """Folder of every way's run on two processes, and of the second half of a run that one process began."""
    config = str(config_file)
    begun = {
        weights: processes.Job(config, str(folder / f"from-one-{weights}"), (*options, "training.steps=2"))
        for weights, options in (("lora", LORA), ("full", FULL))
    }
    for job in begun.values():
        processes.work(job)
    jobs = [
        *(processes.Job(config, str(folder / way), (*ways, f"training.steps={STEPS}")) for way, ways in WAYS.items()),
        *(job._replace(overrides=(*job.overrides, SHARD, f"training.steps={STEPS}")) for job in begun.values()),
        processes.Job(config, str(folder / "from-two"), (*FULL, SHARD, "training.steps=2")),
    ]
    jobs += [
        processes.Job(config, str(folder / folder_of(name, ways)), (*BARE, *METHODS[name][0], *ways))
        for name, ways in SHARED
    ]
    for name, method in (("halves", "dmd2 lora"), ("halves-full", "dmd2 full")):
        half = processes.Job(config, str(folder / name), (*BARE, *METHODS[method][0], SHARD, "training.steps=1"))
        jobs += [half, half._replace(overrides=(*half.overrides, "training.steps=2"))]
    four = processes.Job(config, str(folder / "from-four"), (*BARE, *METHODS["rtdmd full"][0], SHARD))
    launch(folder, 4, [four._replace(overrides=(*four.overrides, "training.steps=1"))])
    launch(folder, 2, [*jobs, four])
    return folder


def launch(folder: Path, count: int, jobs: Sequence[processes.Job]) -> None:
    (folder / "jobs.json").write_text(json.dumps(jobs))
    launcher = ["torch.distributed.run", f"--nproc-per-node={count}", "--rdzv-backend=c10d"]
    address = ["--rdzv-endpoint=localhost:0", "--local-addr=localhost"]
    done = subprocess.run(
        [sys.executable, "-m", *launcher, *address, processes.__file__, str(folder / "jobs.json")],
        capture_output=True, text=True, timeout=3600, check=False,  # two busy cores take long
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def flat(record: dict[str, Any]) -> dict[str, float]:
    """The numbers of a guard's record, by step, name and clip."""
    rows = {"teacher": record["teacher"]} | {str(look["step"]): look["scores"] for look in record["looks"]}
    numbers = {f"{row} {name} {i}": v for row, by in rows.items() for name, vs in by.items() for i, v in enumerate(vs)}
    return numbers | {f"drift {look['step']}": look["drift"] for look in record["looks"]} | {"best": record["best"]}


def clip_scores(run: Path) -> dict[str, float]:
    """Of all validation clips that there are, by file and name."""
    clips = [clip for look in json.loads((run / "validation" / "index.json").read_text()) for clip in look["clips"]]
    assert all((run / "validation" / clip["file"]).is_file() for clip in clips)
    assert len(clips) == 3 * 3  # before, after two, and after the last step
    return {f"{clip['file']} {name}": score for clip in clips for name, score in clip["scores"].items()}


def assert_same_run(one: Path, other: Path) -> None:
    ours, theirs = (read_metrics(run / "metrics.jsonl") for run in (one, other))
    assert len(ours) == len(theirs) == STEPS
    for row, expected in zip(ours, theirs, strict=True):
        assert {**row, "seconds": 0} == pytest.approx({**expected, "seconds": 0}, rel=1e-5, abs=1e-6)
    seen, expected_seen = (flat(json.loads((run / "guard.json").read_text())) for run in (one, other))
    assert seen == pytest.approx(expected_seen, rel=1e-4, abs=1e-5)
    assert clip_scores(one) == pytest.approx(clip_scores(other), rel=1e-4, abs=1e-5)
    assert_close(one, other, {"checkpoints", "teacher", "optimizer", "best"})
    assert any((one / "student").rglob("*.safetensors"))  # the finished one


def assert_close(one: Path, other: Path, parts: set[str]) -> None:
    """All tensors below both folders, of which there are some of each part."""
    tensors, expected = processes.tensors_of(one), processes.tensors_of(other)
    assert tensors.keys() == expected.keys()
    assert all(any(part in name.split("/") for name in tensors) for part in parts)
    for name, tensor in tensors.items():
        assert_close_as_a_whole(tensor.double(), expected[name].double(), name)


def assert_close_as_a_whole(ours: Tensor, theirs: Tensor, what: str) -> None:
    """A step moves a weight by 1e-3, whatever its gradient: where that is small, so much the more by its rounding.

    Two processes add float32 up in another order, so single weights may be a hundredth of a step apart (3.4e-6 were
    seen), but a tensor's as a whole no more than a thousandth.
    """
    error = ours - theirs
    assert error.norm() <= 1e-4 * theirs.norm() + 1e-6 * error.numel() ** 0.5, what
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5, msg=lambda text: f"{what}: {text}")


@pytest.mark.parametrize("way", WAYS)
def test_two_processes_train_what_one_trains(alone: Alone, together: Path, way: str) -> None:
    assert_same_run(together / way, alone(way.split("-", maxsplit=1)[0]))


@pytest.mark.parametrize("weights", ["lora", "full"])
def test_run_of_one_process_goes_on_split_over_two(alone: Alone, together: Path, weights: str) -> None:
    assert_same_run(together / f"from-one-{weights}", alone(weights))


def test_split_run_goes_on_in_one_process(alone: Alone, together: Path, config_file: Path) -> None:
    again = together / "from-two"
    processes.work(processes.Job(str(config_file), str(again), (*FULL, f"training.steps={STEPS}")))
    assert_same_run(again, alone("full"))


@pytest.fixture(scope="module")
def method_alone(config_file: Path, folder: Path) -> Alone:
    """The run of a method in one process."""

    @functools.cache
    def train(name: str) -> Path:
        output = folder / folder_of(name)
        processes.work(processes.Job(str(config_file), str(output), (*BARE, *METHODS[name][0])))
        return output

    return train


def rows_of(run: Path) -> list[dict[str, float]]:
    return [{**row, "seconds": 0} for row in read_metrics(run / "metrics.jsonl")]


@pytest.mark.parametrize(("name", "ways"), SHARED, ids=[folder_of(*each) for each in SHARED])
def test_two_processes_train_what_one_trains_by_every_method(
    method_alone: Alone, together: Path, name: str, ways: tuple[str, ...]
) -> None:
    one, two = method_alone(name), together / folder_of(name, ways)
    rows, expected = rows_of(two), rows_of(one)
    assert len(rows) == 2
    for row, its in zip(rows, expected, strict=True):
        assert row == pytest.approx(its, rel=1e-5, abs=2e-6)
    critic = {"fake_score-optimizer", "fake_score"} if "fake_score" in METHODS[name][0][0] else set()
    assert_close(two / "checkpoints", one / "checkpoints", {*critic, "optimizer", "student"})


@pytest.mark.parametrize(("halves", "name"), [("halves", "dmd2 lora"), ("halves-full", "dmd2 full")])
def test_split_critic_goes_on_bit_for_bit(together: Path, halves: str, name: str) -> None:
    whole, again = together / folder_of(name, (SHARD,)), together / halves
    assert rows_of(again) == rows_of(whole)
    tensors, its = (processes.tensors_of(run / "checkpoints") for run in (whole, again))
    assert tensors.keys() == its.keys()
    assert any("fake_score-optimizer" in key for key in its)
    assert [key for key, tensor in tensors.items() if not torch.equal(tensor, its[key])] == []


def test_each_process_writes_its_shards_of_full_weights_alone(together: Path) -> None:
    (folder,) = (together / "full-shard" / "checkpoints").iterdir()
    files = [f"shard-{rank:05d}-model-00001-of-00001.safetensors" for rank in (1, 2)]
    assert sorted(path.name for path in folder.iterdir()) == [*files, "state.json"]
    assert find_damage(folder) is None
    sizes = [(folder / file).stat().st_size for file in files]
    assert max(sizes) < 1.2 * min(sizes)
    (adapters,) = (together / "lora-shard" / "checkpoints").iterdir()
    assert sorted(path.stem for path in adapters.iterdir()) == ["optimizer", "state", "student", "teacher"]


def test_run_of_four_processes_goes_on_in_two(method_alone: Alone, together: Path) -> None:
    one, again = method_alone("rtdmd full"), together / "from-four"
    for row, its in zip(rows_of(again), rows_of(one), strict=True):
        assert row == pytest.approx(its, rel=1e-5, abs=2e-6)
    assert_close(again / "checkpoints", one / "checkpoints", {"student", "optimizer", "fake_score"})
