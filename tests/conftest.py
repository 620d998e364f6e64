"""Shared by all tests: a tiny random Wan pipeline, two tiny rewards, and configurations of a distillation on them."""

from __future__ import annotations

import gc
import io
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import NamedTuple
from unittest import mock

os.environ.setdefault("OMP_NUM_THREADS", "1")  # two threads beside another job are slower than one

# The tests' own rewards are code that they have just written; tests/security takes it back.
os.environ.setdefault("RATS_VIDEO_TRUST_CODE", "1")

import pytest
import torch
import wan_family
from torch import Tensor

from rats_video.backbones.wan import WanBackbone
from rats_video.config.load import load_config
from rats_video.datasets.shapes.render import WORDS, split_combinations
from rats_video.distillation.settings import DistillConfig
from rats_video.pretraining.vae import VaeConfig
from rats_video.rewards.word import WordReward
from rats_video.seeds import seeded
from rats_video.types import ClipSpec, PromptBatch, RewardScores

torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def fast_disk() -> Iterator[None]:
    """Skips fsync, 10 ms for each of thousands of files; tests/small_tools/test_files.py tests it."""
    with mock.patch("os.fsync"):
        yield


@pytest.fixture(autouse=True, scope="module")
def fast_collections() -> None:
    """Leaves a million objects, the modules, out of the garbage collections to come: each would take half a second."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(tryfirst=True)  # before `-m` chooses
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks the tests that build a model or run a whole command."""
    for item in items:
        if PIPELINES.intersection(getattr(item, "fixturenames", ())) or item.path.parent.name in PIPELINE_FOLDERS:
            item.add_marker(pytest.mark.pipeline)


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """For `make check`, does not even import what it takes nothing of: that takes longer than its tests."""
    if config.option.markexpr != "not pipeline":
        return None
    if collection_path.is_dir():
        return True if collection_path.name in PIPELINE_FOLDERS else None
    return True if "\npytestmark = pytest.mark.pipeline\n" in collection_path.read_text() else None


PIPELINES = {"tiny_wan", "browser"}
PIPELINE_FOLDERS = {"backbones", "cli", "commands", "distributed", "export", "faults", "reporting", "security"}


pytest_plugins = ["browser"]


# ------------------------------------------------------------------------------------- what takes longer than a step


WholeRuns = Callable[[], AbstractContextManager[None]]


def no_figure(*arguments: object, **_: object) -> None:
    """An empty file where a figure would be drawn."""
    (path,) = (argument for argument in arguments if isinstance(argument, Path))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()


STAND_INS: dict[str, Callable[..., object]] = {
    "rats_video.commands.train_student.plan_of_run": lambda *_: {"seconds_per_step": 1.0, "peak_bytes": 1},
    "rats_video.commands.finish.plot_training": no_figure,
    "rats_video.commands.finish.plot_guard": no_figure,
    "rats_video.commands.evaluate.plot_nfe_curve": no_figure,
}


@pytest.fixture(scope="session")
def whole_runs() -> Iterator[WholeRuns]:
    """Runs of this process have no plan and empty figures, but within `whole_runs()` and where a test is so marked."""
    stack, asked = ExitStack(), 0

    def shorten() -> None:
        for target, stand_in in STAND_INS.items():
            stack.enter_context(mock.patch(target, stand_in))

    @contextmanager
    def whole() -> Iterator[None]:
        nonlocal asked
        asked += 1
        stack.close()
        try:
            yield
        finally:
            asked -= 1
            if not asked:
                shorten()

    shorten()
    yield whole
    stack.close()


@pytest.fixture(autouse=True)
def whole_run_where_asked(request: pytest.FixtureRequest) -> Iterator[None]:
    if request.node.get_closest_marker("whole_run"):
        with request.getfixturevalue("whole_runs")():
            yield
    else:
        yield


TINY_CONFIG = """
seed: 5
model: {model}
clip: {{num_frames: 5, height: 32, width: 32}}
prompts: {{kind: file, train: {prompts}/train.txt, heldout: {prompts}/heldout.txt}}
reward: {{kind: word, path: {reward}}}
heldout_reward: {{kind: word, path: {heldout}}}
method: {{kind: rats, alpha: 2.0, gate: {{kind: sigmoid, tau: 0.05, floor: 0.1}}}}
teacher: {{kind: frozen, num_steps: 8, guidance_scale: 2.0}}
student: {{num_steps: [4]}}
guard: null
training:
  steps: 2
  batch_size: 2
  optimizer: {{lr: 1.0e-3}}
  checkpoint_every: 3
comparison: {{num_videos: 1}}
evaluation: {{nfe: [4], num_clips: 4, batch_size: 4, teacher_steps: 4, guidance_scale: 2.0}}
"""


@pytest.fixture(scope="session")
def clip() -> ClipSpec:
    return ClipSpec(num_frames=5, height=32, width=32, fps=8.0)


@pytest.fixture(scope="session")
def captions() -> tuple[str, ...]:
    """Training prompts of the shapes data."""
    return tuple(attributes.prompt for attributes in split_combinations()[0][:12])


@pytest.fixture(scope="session")
def vae_config() -> VaeConfig:
    return wan_family.VAE_CONFIG


@pytest.fixture(scope="session")
def tiny_wan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline folder of random weights that `diffusers.WanPipeline` loads."""
    folder = tmp_path_factory.mktemp("models") / "tiny-wan"
    wan_family.build(folder)
    return folder


@pytest.fixture(scope="session")
def reward_folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Folders of two random word rewards: one of each encoder."""
    torch.manual_seed(1)
    root = tmp_path_factory.mktemp("rewards")
    words = [word for choices in WORDS.values() for word in choices]
    WordReward(words, "frames", width=16).save(root / "reward")
    WordReward(words, "volume", width=16).save(root / "heldout")
    return root / "reward", root / "heldout"


@pytest.fixture(scope="session")
def loaded(tiny_wan: Path) -> WanBackbone:
    return WanBackbone.from_pretrained(tiny_wan)


@pytest.fixture
def backbone(loaded: WanBackbone) -> WanBackbone:
    """The tiny model with a denoiser of the test's own."""
    return loaded.with_own_denoiser()


class ColorReward:
    """Higher as frames near one colour a prompt: simple, differentiable, with frame scores, and unlike any network."""

    def __call__(self, videos: Tensor, prompts: Sequence[str]) -> RewardScores:
        target = torch.tensor([[len(prompt) % 3 / 2, 0.2, 0.8] for prompt in prompts])[:, None, :, None, None]
        frames = -(videos - target).square().mean(dim=(2, 3, 4))
        return RewardScores(frames.mean(dim=1), frames, {"color": frames.mean(dim=1)})


@pytest.fixture
def color_reward() -> ColorReward:
    return ColorReward()


@pytest.fixture(scope="session")
def config_file(
    whole_runs: WholeRuns,  # noqa: ARG001  # who has a configuration may train, and need not wait for the plan
    tmp_path_factory: pytest.TempPathFactory,
    tiny_wan: Path,
    reward_folders: tuple[Path, Path],
    captions: tuple[str, ...],
) -> Path:
    folder = tmp_path_factory.mktemp("configs")
    (folder / "train.txt").write_text("\n".join(captions[:8]))
    (folder / "heldout.txt").write_text("\n".join(captions[8:]))
    reward, heldout = reward_folders
    path = folder / "smoke.yaml"
    path.write_text(TINY_CONFIG.format(model=tiny_wan, reward=reward, heldout=heldout, prompts=folder))
    return path


@pytest.fixture(scope="session")
def make_config(config_file: Path) -> Callable[..., DistillConfig]:
    """A tiny distillation, changed by `a.b=value` overrides."""
    return lambda *overrides: load_config(DistillConfig, str(config_file), group="distill", overrides=overrides)


@pytest.fixture
def batch(backbone: WanBackbone, clip: ClipSpec, captions: tuple[str, ...]) -> PromptBatch:
    return PromptBatch(0, captions[:2], backbone.sample_noise(2, clip, seeded(9)), num_steps=4)


class Outcome(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture(scope="session")
def command(whole_runs: WholeRuns) -> Callable[..., Outcome]:  # noqa: ARG001
    """Runs the command line in this process, without plan and figures."""
    from rats_video.cli.app import main

    def call(*arguments: object) -> Outcome:
        out, err = io.StringIO(), io.StringIO()
        argv = ["rats-video", *map(str, arguments)]
        with (
            mock.patch.object(sys, "argv", argv),
            redirect_stdout(out),
            redirect_stderr(err),
            pytest.raises(SystemExit) as caught,
        ):
            main()
        return Outcome(int(caught.value.code or 0), out.getvalue(), err.getvalue())

    return call
