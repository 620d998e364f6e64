"""What a model's folder states, beside what a run asks of it: told in one line, and only where they differ."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import hunyuan_family
import pytest
import torch
import wan22_family
from cogvideox_family import COGVIDEOX_FAMILIES
from family import Family
from hunyuan_family import HUNYUAN
from ltx_family import LTX_FAMILIES
from shared import made_once
from wan22_family import WAN22_FAMILIES

from rats_video.backbones.kinds import load_backbone
from rats_video.backbones.wan import WanBackbone
from rats_video.distillation.folder_settings import folder_settings
from rats_video.distillation.roles import build_backbone
from rats_video.distillation.settings import DistillConfig
from rats_video.errors import UserError
from rats_video.inference.student import ITSELF, StudentCard, save_student

pytestmark = pytest.mark.pipeline
MakeConfig = Callable[..., DistillConfig]
CPU = torch.device("cpu")


@pytest.fixture
def base(tiny_wan: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_wan, tmp_path / "base"))


def write_scheduler(folder: Path, **settings: object) -> None:
    path = folder / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps({key: value for key, value in json.loads(path.read_text()).items()
                                if "shift" not in key} | settings))  # fmt: skip


@pytest.mark.parametrize("stated", [{"shift": 3.0}, {"flow_shift": 3.03, "shift": 1.0}, {}, {"shift": "3"},
                                    {"shift": 8.0, "use_dynamic_shifting": True}])  # fmt: skip
def test_nothing_is_said_where_nothing_differs(
    make_config: MakeConfig, base: Path, capsys: pytest.CaptureFixture[str], stated: dict[str, object]
) -> None:
    write_scheduler(base, **stated)
    build_backbone(make_config(f"model={base}"), CPU)
    assert capsys.readouterr().err == ""


def test_another_shift_is_told_in_one_line(
    make_config: MakeConfig, base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_scheduler(base, shift=8.0)
    build_backbone(make_config(f"model={base}"), CPU)
    assert capsys.readouterr().err == (
        f"warning: {base}: its own files say shift 8, this run 3; if that is not meant: --set shift=8\n"
    )


def test_all_that_a_fine_tuning_states_is_compared(
    make_config: MakeConfig, loaded: WanBackbone, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    clip = {"num_frames": 9.0, "height": 32.0, "width": 32.0, "fps": 12.0}
    card = StudentCard(ITSELF, (50,), 5.0, clip, steps=1, seed=0, guidance_scale=4.0)
    save_student(loaded, card, tmp_path / "card")
    shutil.copy(tmp_path / "card" / "rats.json", base)
    build_backbone(make_config(f"model={base}"), CPU)
    assert capsys.readouterr().err == (
        f"warning: {base}: its own files say shift 5, teacher.guidance_scale 4, clip.num_frames 9, clip.fps 12, this "
        "run 3, 2, 5, 8; if that is not meant: --set shift=5 --set teacher.guidance_scale=4 --set clip.num_frames=9 "
        "--set clip.fps=12\n"
    )


def test_damaged_files_are_named(loaded: WanBackbone, base: Path, make_config: MakeConfig) -> None:
    (base / "scheduler" / "scheduler_config.json").write_text("[")
    with pytest.raises(UserError, match=r"scheduler_config\.json: no scheduler's configuration"):
        folder_settings(base, loaded, make_config().clip.spec)


def test_each_family_states_its_own(tmp_path_factory: pytest.TempPathFactory) -> None:
    def stated(family: Family, **size: int) -> dict[str, float]:
        folder = made_once(tmp_path_factory, family.name, family.build)
        return folder_settings(folder, load_backbone(folder), replace(family.clip, **size))

    assert all(stated(family) == {"shift": wan22_family.SHIFT} for family in WAN22_FAMILIES)  # UniPC's `flow_shift`
    assert stated(HUNYUAN) == {"shift": hunyuan_family.SHIFT}
    # LTX, 512 x 704 with 97 frames: 13 x 16 x 22 tokens, and the formula of its pipeline's `calculate_shift`.
    mu = 0.95 + (13 * 16 * 22 - 1024) * (2.05 - 0.95) / (4096 - 1024)
    assert stated(LTX_FAMILIES[0], num_frames=97, height=512, width=704) == {"shift": pytest.approx(math.exp(mu))}
    learned, rotary, paired = map(stated, COGVIDEOX_FAMILIES)
    assert learned == {"shift": 3.0, "clip.height": 32.0, "clip.width": 48.0}
    assert rotary == {"shift": 2.0, "clip.height": 32.0, "clip.width": 48.0}
    assert paired == {"shift": 2.0}  # its size is the largest that it has positions for
