"""`calibrate` as a user calls it, on the tiny pipeline: what it measures, writes and refuses."""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from rats_video.backbones.wan import WanBackbone
from rats_video.commands.calibrate import REWARD_TO_SHAPING
from rats_video.config.load import load_config
from rats_video.distillation.method import build_rats
from rats_video.distillation.roles import build_backbone, build_roles
from rats_video.distillation.settings import DistillConfig
from rats_video.inference.sampler import SamplerSpec, sample_videos
from rats_video.methods.gate import SigmoidGateConfig
from rats_video.methods.rats import rats_step
from rats_video.rewards.sum import SumRewardConfig
from rats_video.rewards.word import WordReward
from rats_video.seeds import seeded
from rats_video.training.batches import draw_batch

Command = Callable[..., Any]
NUM_PROMPTS = 6


def table(out: str) -> dict[str, list[str]]:
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in out.splitlines() if line[:1] == "|"]
    return {row[0]: row[1:] for row in lines[2:]}


def calibrated(path: Path) -> DistillConfig:
    return load_config(DistillConfig, str(path), group="distill")


@pytest.fixture(scope="module")
def single(command: Command, config_file: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """What is printed and written for the word reward."""
    path = tmp_path_factory.mktemp("calibrated") / "calibrated.yaml"
    config = os.path.relpath(config_file)  # found again from wherever the result lies
    code, out, err = command("calibrate", "--config", config, "--num-prompts", NUM_PROMPTS, "--output", path)
    assert code == 0, err
    return out, path


def test_the_table_is_that_of_clips_sampled_by_hand(
    single: tuple[str, Path], config_file: Path, loaded: WanBackbone, reward_folders: tuple[Path, Path]
) -> None:
    cfg = load_config(DistillConfig, str(config_file), group="distill")
    rows = table(single[0])
    assert list(rows) == [
        *("reward", "reward/alignment", "reward/quality"),
        *("heldout_reward", "heldout_reward/alignment", "heldout_reward/quality"),
    ]
    prompts = Path(cfg.prompts.train).read_text().splitlines()  # type: ignore[union-attr]
    drawn = [prompts[i] for i in torch.randperm(len(prompts), generator=seeded(cfg.seed, 7))[:NUM_PROMPTS].tolist()]
    specs = SamplerSpec(cfg.teacher.num_steps, cfg.shift, cfg.teacher.guidance_scale), SamplerSpec(4, cfg.shift)
    for role, folder in zip(("reward", "heldout_reward"), reward_folders, strict=True):
        judge = WordReward.load(folder)
        teacher, base = (
            torch.cat([
                judge(samples.videos, samples.prompts).clip.detach()
                for samples in sample_videos(loaded, drawn, cfg.clip.spec, spec, seed=cfg.seed)
            ])
            for spec in specs
        )  # fmt: skip
        both, leads = torch.cat([teacher, base]), teacher - base
        mean, spread, lead, wins = rows[role]
        assert float(mean) == pytest.approx(float(both.mean()), abs=2e-3)
        assert float(spread) == pytest.approx(float(both.std()), abs=2e-3)
        assert float(lead.split()[0]) == pytest.approx(float(leads.mean()), abs=2e-3)
        assert wins == f"{float((leads > 0).float().mean()):.0%}"
        if role == "reward":
            gate = calibrated(single[1]).method.gate
            assert isinstance(gate, SigmoidGateConfig)
            assert gate.tau == pytest.approx(float(leads.abs().quantile(0.5)) / 2, rel=0.01)


def test_exactly_the_suggested_keys_change_and_the_gradients_are_in_the_stated_ratio(
    single: tuple[str, Path], config_file: Path
) -> None:
    before, cfg = load_config(DistillConfig, str(config_file), group="distill"), calibrated(single[1])
    old, new = before.method.gate, cfg.method.gate
    assert isinstance(old, SigmoidGateConfig)
    assert isinstance(new, SigmoidGateConfig)
    assert new == old.model_copy(update={"tau": new.tau})
    method = before.method.model_copy(update={"gate": new, "reward_weight": cfg.method.reward_weight})
    assert cfg == before.model_copy(update={"method": method})
    assert cfg.method.reward_weight != before.method.reward_weight

    cpu = torch.device("cpu")
    student, teacher = build_roles(cfg, build_backbone(cfg, cpu))
    prompts = Path(cfg.prompts.train).read_text().splitlines()  # type: ignore[union-attr]
    norms = {"reward_weight": 0.0, "alpha": 0.0}
    for dropped, step in itertools.product(norms, range(4)):
        change = cfg.method.model_copy(update={dropped: 0.0})
        rats = build_rats(cfg.model_copy(update={"method": change}), student, teacher)
        loss, _ = rats_step(rats, draw_batch(student, cfg, prompts, step))
        grads = torch.autograd.grad(loss, list(student.weights.values()), allow_unused=True)
        norms[dropped] += math.sqrt(sum(float(grad.square().sum()) for grad in grads if grad is not None))
    assert norms["alpha"] / norms["reward_weight"] == pytest.approx(REWARD_TO_SHAPING, rel=0.02)


def test_distill_just_works_with_it(command: Command, single: tuple[str, Path], tmp_path: Path) -> None:
    out, path = single
    assert out.splitlines()[-1] == f"written: {path}; next: rats-video distill --config {path}"
    code, _, err = command("distill", "--config", path, "--output", tmp_path / "run", "--set", "training.steps=1")
    assert code == 0, err


def test_a_sum_is_brought_to_unit_spread(
    command: Command, config_file: Path, reward_folders: tuple[Path, Path], tmp_path: Path
) -> None:
    first, second = reward_folders
    sets = {
        "reward.kind": "sum", "reward.terms.a.reward.path": first, "reward.terms.b.reward.path": second,
        "reward.terms.a.weight": 3, "heldout_reward": "null", "method.gate.kind": "constant",
    }  # fmt: skip
    changes = [part for key, value in sets.items() for part in ("--set", f"{key}={value}")]
    path = tmp_path / "sum.yaml"
    asked = ("calibrate", "--config", config_file, "--num-prompts", NUM_PROMPTS, "--output", path, *changes)
    code, out, err = command(*asked)
    assert code == 0, err
    rows = table(out)
    assert [name for name in rows if name.count("/") < 2] == ["reward", "reward/a", "reward/b"]
    assert float(rows["reward"][0]) == pytest.approx(0, abs=0.02)
    assert float(rows["reward"][1]) == pytest.approx(1, abs=0.02)

    reward = calibrated(path).reward  # the options given are in it
    assert isinstance(reward, SumRewardConfig)
    a, b = reward.terms["a"], reward.terms["b"]
    assert a.weight / b.weight == pytest.approx(3, rel=0.01)
    assert (a.mean, a.spread) == pytest.approx([float(value) for value in rows["reward/a"][:2]], rel=0.01, abs=6e-4)
    assert calibrated(path).method.gate.kind == "constant"
    assert "tau" not in out

    code, _, err = command(*asked)
    assert code == 2
    assert "sum.yaml: already exists (add --overwrite or another --output)" in err
    assert command(*asked, "--overwrite", "--set", "method.reward_weight=0")[:1] == (0,)
    assert calibrated(path).method.reward_weight == 0


def test_a_teacher_that_is_no_better_is_warned_of(command: Command, config_file: Path, tmp_path: Path) -> None:
    same = ("--set", "teacher.num_steps=4", "--set", "teacher.guidance_scale=1")
    path = tmp_path / "same.yaml"
    code, out, err = command("calibrate", "--config", config_file, "--num-prompts", 3, "--output", path, *same)
    assert code == 0, err
    assert "warning: reward: the teacher's lead, +0 ± 0, is none beyond doubt" in err
    assert table(out)["reward"][2:] == ["+0.000 ± 0.000", "0%"]
    assert calibrated(path).method.gate == load_config(DistillConfig, str(config_file), group="distill").method.gate


def test_what_cannot_be_written_is_refused_at_once(command: Command, config_file: Path, tmp_path: Path) -> None:
    code, _, err = command("calibrate", "--config", config_file, "--output", tmp_path / "a.txt")
    assert code == 2
    assert "a.txt: a config's name ends in .yaml or .yml" in err
    own = tmp_path / "own.yaml"
    own.write_text(f"extends: {config_file}\n")
    code, _, err = command("calibrate", "--config", own, "--output", own, "--overwrite")
    assert code == 2
    assert "own.yaml: would extend itself (give another name)" in err
    assert own.read_text() == f"extends: {config_file}\n"
