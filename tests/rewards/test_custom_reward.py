"""A reward of the user's own code: what it may return, how its mistakes are told, and that a run takes it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from rats_video.commands.plan import run_plan
from rats_video.datasets.shapes.measure import measure_shapes
from rats_video.distillation.run_rewards import check_rewards
from rats_video.distillation.settings import DistillConfig
from rats_video.distillation.teacher_identity import teacher_identity
from rats_video.errors import UserError
from rats_video.methods.teacher import FrozenTeacherConfig
from rats_video.rewards.custom import CustomReward, CustomRewardConfig
from rats_video.rewards.reward import build_reward
from rats_video.training.metrics import read_metrics
from rats_video.types import PromptChecker
from rats_video.user_code import source_file

MakeConfig = Callable[..., DistillConfig]
ROOT = Path(__file__).parent.parent.parent
CPU = torch.device("cpu")
MODULE = """
import torch
from rats_video.types import RewardScores

def brightness(videos, prompts, scale=1.0):
    return scale * videos.mean(dim=(1, 2, 3, 4))

def count(videos, prompts):
    return (videos > 0.5).flatten(1).sum(dim=1)

count.differentiable = False

class PerFrame:
    def __init__(self, scale=1.0):
        self.scale = scale

    def __call__(self, videos, prompts):
        return self.scale * videos.mean(dim=(2, 3, 4))

    def looks_at(self, num_frames):
        return torch.arange(1)

    def check_prompts(self, prompts):
        pass

class Scores(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(3, 1)

    def forward(self, videos, prompts):
        clip = self.linear(videos.mean(dim=(1, 3, 4)))[:, 0]
        return RewardScores(clip, None, {"linear": clip})

def words(videos, prompts): return ["good"] * len(prompts)
def cube(videos, prompts): return videos[:, :, 0, 0]
def short(videos, prompts): return videos.mean(dim=(1, 2, 3, 4))[1:]
def odd_part(videos, prompts): return RewardScores(videos.mean(dim=(1, 2, 3, 4)), None, {"x": torch.zeros(9)})
def divides(videos, prompts):
    return 1 / 0
calls = []
def no_number(videos, prompts):
    calls.append(1)  # three of them are its self-test
    return videos.mean(dim=(1, 2, 3, 4)) / (len(calls) < 4)
nothing = 3
"""


class Here(NamedTuple):
    """The folder a user starts in."""

    folder: Path
    module: str

    def build(self, name: str, **keys: Any) -> CustomReward:
        cfg = CustomRewardConfig(kind="custom", target=f"{self.module}:{name}", **keys)
        reward = build_reward(cfg, CPU, where="reward")
        assert isinstance(reward, CustomReward)
        return reward


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[Here]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path.copy())
    name = f"rewards_{abs(hash(request.node.name))}"  # a module is imported once a process
    (tmp_path / f"{name}.py").write_text(MODULE)
    yield Here(tmp_path, name)
    sys.modules.pop(name, None)


@pytest.fixture
def videos() -> Tensor:
    return torch.rand(2, 5, 3, 8, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()


def test_a_function_scores_clips(here: Here, videos: Tensor) -> None:
    scores = here.build("brightness", options={"scale": 2.0})(videos, ["a", "b"])
    torch.testing.assert_close(scores.clip, 2 * videos.mean(dim=(1, 2, 3, 4)))
    assert scores.frames is None
    scores.clip.sum().backward()
    assert videos.grad is not None
    torch.testing.assert_close(videos.grad, torch.full_like(videos, 2 / videos[0].numel()))


def test_a_class_scores_frames(here: Here, videos: Tensor) -> None:
    reward = here.build("PerFrame", options={"scale": 3.0})
    scores = reward(videos, ["a", "b"])
    assert scores.frames is not None
    torch.testing.assert_close(scores.frames, 3 * videos.mean(dim=(2, 3, 4)))
    torch.testing.assert_close(scores.clip, scores.frames.mean(dim=1))
    assert reward.looks_at(5).tolist() == [0]  # type: ignore[attr-defined]
    assert isinstance(reward, PromptChecker)
    assert not isinstance(here.build("Scores"), PromptChecker)


def test_a_module_is_frozen_and_parts_come_through(here: Here, videos: Tensor) -> None:
    scores = here.build("Scores")(videos, ["a", "b"])
    assert torch.equal(scores.parts["linear"], scores.clip)
    scores.clip.sum().backward()
    assert videos.grad is not None
    assert here.build("Scores")._scorer.linear.weight.requires_grad is False


def test_without_gradient_it_is_called_without(here: Here, videos: Tensor) -> None:
    reward = here.build("count")
    assert reward.differentiable is False  # its own word counts
    scores = reward(videos, ["a", "b"])
    assert scores.clip.dtype == torch.float32
    assert scores.clip.tolist() == [(clip > 0.5).sum().item() for clip in videos]
    declared = here.build("brightness", differentiable=False)
    assert not declared.differentiable
    assert not declared(videos, ["a", "b"]).clip.requires_grad
    assert here.build("brightness").differentiable


def test_it_says_once_that_it_runs_code(here: Here, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("brightness", "count", "brightness"):
        here.build(name)
    assert capsys.readouterr().err == f"reward: runs code of {here.folder / here.module}.py\n"


@pytest.mark.parametrize(
    "target", ["rewards", "rewards.Redness", "a.py:Redness!", ":f", "a:", "a b:c", "a:b:c", "./a:b"]
)
def test_targets_that_are_none(make_config: MakeConfig, target: str) -> None:
    with pytest.raises(UserError, match=r"reward.target: must be package.module:Name, got"):
        make_config(f"reward={{kind: custom, target: {target!r}}}")


def test_mistakes_are_one_line(here: Here) -> None:
    with pytest.raises(UserError, match=rf"^reward.target: no 'Redness' in {here.folder}/{here.module}.py$"):
        here.build("Redness")
    with pytest.raises(
        UserError, match=r"^reward.target: nothing in .*py cannot be called \(name a function or a class\)"
    ):
        here.build("nothing")
    for module in ("no_such_module", f"{here.module}.deeper"):
        with pytest.raises(UserError, match=rf"^reward.target: no module '{module}', neither in {here.folder} nor"):
            Here(here.folder, module).build("f")
    with pytest.raises(UserError, match=rf"^reward {here.module}:PerFrame: cannot be built: TypeError: .*'nope'"):
        here.build("PerFrame", options={"nope": 1})


@pytest.mark.parametrize(
    ("code", "line"),
    [
        ("import not_there", r"cannot be imported: ModuleNotFoundError: No module named 'not_there' \(.*py, line 1\)"),
        ("x = 1\nx = y", r"cannot be imported: NameError: name 'y' is not defined \(.*py, line 2\)"),
        ("def f(:", r"cannot be imported: SyntaxError"),
    ],
)
def test_a_module_that_cannot_be_imported(here: Here, code: str, line: str) -> None:
    (here.folder / f"{here.module}.py").write_text(code)
    with pytest.raises(UserError, match=rf"^reward {here.module}:f: {line}") as caught:
        here.build("f")
    assert isinstance(caught.value.__cause__, Exception)


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("words", "a list"),
        ("cube", r"a tensor \[2, 5, 8\]"),
        ("short", r"clip scores \[1\]"),
        ("odd_part", r"part 'x' \[9\]"),
    ],
)
def test_what_is_no_score_is_told(here: Here, videos: Tensor, name: str, what: str) -> None:
    expected = r"of 2 clips of 5 frames, return a tensor \[2\] or \[2, 5\], or RewardScores"
    with pytest.raises(UserError, match=rf"^reward {here.module}:{name}: returned {what} \({expected}\)$"):
        here.build(name)(videos, ["a", "b"])


def test_an_exception_inside_is_named_and_kept(here: Here, videos: Tensor) -> None:
    line = 1 + MODULE[: MODULE.index("return 1 / 0")].count("\n")
    with pytest.raises(UserError) as caught:
        here.build("divides")(videos, ["a", "b"])
    name = f"reward {here.module}:divides"
    assert str(caught.value) == f"{name}: fails: ZeroDivisionError: division by zero ({here.module}.py, line {line})"
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


def test_running_out_of_memory_is_explained_elsewhere(videos: Tensor) -> None:
    def greedy(*_: object) -> Tensor:
        raise torch.OutOfMemoryError

    with pytest.raises(torch.OutOfMemoryError):
        CustomReward(greedy, "a:greedy", Path("a.py"))(videos, ["a", "b"])


def test_installed_packages_are_not_hidden(here: Here) -> None:
    (here.folder / "rats_video").mkdir()
    (here.folder / "rats_video" / "__init__.py").write_text("raise RuntimeError")
    assert "site-packages" not in source_file("rats_video.types:X", where="reward").parts
    assert source_file("rats_video.types:X", where="reward") == ROOT / "rats_video" / "types.py"


# ------------------------------------------------------------------------------------------------------- in a run


def test_its_code_is_part_of_what_a_stored_rollout_depends_on(here: Here, make_config: MakeConfig) -> None:
    def identity(**options: int) -> dict[str, object]:
        cfg = make_config(f"reward={{kind: custom, target: '{here.module}:brightness', options: {options}}}")
        assert isinstance(cfg.teacher, FrozenTeacherConfig)
        return teacher_identity(cfg, cfg.teacher)

    before = identity()
    assert identity() == before
    assert identity(scale=2) != before
    with (here.folder / f"{here.module}.py").open("a") as file:
        file.write("# another line\n")
    assert identity() != before


def test_no_gradient_needs_a_policy(here: Here, make_config: MakeConfig) -> None:
    reward = f"reward={{kind: custom, target: '{here.module}:count'}}"

    def check(*overrides: str) -> None:
        cfg = make_config(reward, "heldout_reward=null", *overrides)
        check_rewards(cfg, build_reward(cfg.reward, CPU, where="reward"), ["a", "b"], CPU)

    with pytest.raises(
        UserError, match=r"^reward: is not differentiable and cannot be a direct loss \(set method.policy"
    ):
        check()
    check("method.policy={samples: 4}")
    check("method.reward_weight=0")


def test_the_plan_does_not_count_it(here: Here, config_file: Path) -> None:
    reward = f"reward={{kind: custom, target: '{here.module}:count'}}"
    lines = run_plan(
        config=str(config_file), gpu_memory=None, gpus=1, device_name="h100", utilisation=None, output=None,
        overrides=[reward, "method.policy={samples: 3}"],
    )  # fmt: skip
    assert f"  What the custom reward {here.module}:count needs is not counted: its code is not run." in lines
    assert "network calls a clip and step (NFE): teacher 16, student 4, policy 12" in lines
    assert here.module not in sys.modules


def test_a_run_with_measured_adherence(
    command: Callable[..., Any], config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    options = ("reward={kind: custom, target: 'examples.measured_adherence:adherence'}", "method.policy={samples: 2}")
    flags = [item for option in options for item in ("--set", option)]
    outcome = command("distill", "--config", config_file, "--output", tmp_path / "run", *flags, "--device", "cpu")
    assert outcome.code == 0, outcome.err
    assert f"reward: runs code of {ROOT / 'examples' / 'measured_adherence.py'}" in outcome.err
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert all(0 <= row["reward/policy_mean"] <= 1 for row in rows)


def test_a_run_of_a_reward_without_numbers_ends_in_one_line(
    command: Callable[..., Any], config_file: Path, here: Here
) -> None:
    outcome = command(
        "distill", "--config", config_file, "--output", "run", "--device", "cpu",
        "--set", f"reward={{kind: custom, target: '{here.module}:no_number'}}", "--set", "training.faults.skip=0",
    )  # fmt: skip
    assert outcome.code == 2
    assert "error: reward: no clip has a finite score at step 1; no checkpoint to go back to" in outcome.err


def test_the_examples(monkeypatch: pytest.MonkeyPatch, videos: Tensor) -> None:
    monkeypatch.chdir(ROOT)
    redness = Here(ROOT, "examples.redness").build("Redness", options={"weight": 2.0})
    red = torch.zeros_like(videos)
    red[0, :, 0] = 1
    scores = redness(red, ["a", "b"])
    assert scores.frames is not None
    assert scores.frames.tolist() == [[2] * 5, [0] * 5]
    adherence = Here(ROOT, "examples.measured_adherence").build("adherence")
    prompts = ["a fast red circle moving left on a gray background"] * 2
    clips = torch.rand(2, 5, 3, 64, 64)
    assert torch.equal(adherence(clips, prompts).clip, measure_shapes(clips, prompts).adherence)
    assert not adherence.differentiable
