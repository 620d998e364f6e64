"""An update worked on in parts is the update worked on at once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from rats_video.backbones.wan import WanBackbone
from rats_video.distillation.method import build_rats
from rats_video.distillation.roles import build_roles
from rats_video.distillation.settings import DistillConfig
from rats_video.errors import UserError
from rats_video.training.batches import draw_batch
from rats_video.training.loop import train_loop
from rats_video.training.metrics import read_metrics
from rats_video.training.run_folder import RunFolder
from rats_video.training.update import accumulate_gradient


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("teacher", ["frozen", "ema"])
def test_parts_add_up_to_the_whole(
    loaded: WanBackbone, make_config: Callable[..., DistillConfig], captions: tuple[str, ...], tmp_path: Path,
    teacher: str, size: int,
) -> None:  # fmt: skip
    ema = ("teacher.kind=ema", "teacher.num_steps=4", "teacher.decay=0.5") if teacher == "ema" else ()
    common = ("training.steps=3", "training.batch_size=4", *ema, "teacher.reuse=2")
    weights, rows = [], []
    for name, options in (("whole", ()), ("parts", (f"training.micro_batch_size={size}",))):
        cfg = make_config(*common, *options)
        rats = build_rats(cfg, *build_roles(cfg, loaded.with_own_denoiser()))
        (tmp_path / name).mkdir()
        train_loop(rats, cfg, captions, RunFolder(tmp_path / name))
        weights.append(rats.student.weights)
        rows.append(read_metrics(tmp_path / name / "metrics.jsonl"))
    for one, other in zip(*rows, strict=True):
        assert {k: v for k, v in other.items() if k != "seconds"} == pytest.approx(
            {k: v for k, v in one.items() if k != "seconds"}, rel=1e-4, abs=1e-6
        )
    start, (whole, parts) = loaded.weights, weights
    with torch.no_grad():
        moved = max(float((whole[name] - start[name]).abs().max()) for name in start)
        apart = max(float((whole[name] - parts[name]).abs().max()) for name in start)
    assert apart < 1e-2 * moved  # AdamW divides by a gradient's size: rounding counts where that is tiny


def test_gradient_of_the_parts_is_the_gradient(
    loaded: WanBackbone, make_config: Callable[..., DistillConfig], captions: tuple[str, ...]
) -> None:
    cfg = make_config("training.batch_size=4")
    found = []
    for parts in (1, 2, 4):
        rats = build_rats(cfg, *build_roles(cfg, loaded.with_own_denoiser()))
        accumulate_gradient(rats.step, draw_batch(rats.student, cfg, captions, 0), parts)
        found.append(torch.cat([weight.grad.flatten() for weight in rats.student.weights.values()]))
    for other in found[1:]:
        assert float((other - found[0]).norm() / found[0].norm()) < 1e-5


@pytest.mark.parametrize(("size", "parts"), [(None, 1), (1, 6), (2, 3), (6, 1), (8, 1)])
def test_parts(make_config: Callable[..., DistillConfig], size: int | None, parts: int) -> None:
    given = () if size is None else (f"training.micro_batch_size={size}",)
    assert make_config(*given).training.num_micro_batches(6) == parts


def test_parts_that_are_not_equal(make_config: Callable[..., DistillConfig]) -> None:
    with pytest.raises(UserError, match=r"^training.micro_batch_size: 4 does not divide the 6 clips of a process"):
        make_config("training.micro_batch_size=4").training.num_micro_batches(6)
