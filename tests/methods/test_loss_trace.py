"""Six steps of a tiny distillation, compared with the trace that is kept beside this file.

After an intended change of the method, write the trace anew and say in the commit what moved:

    UPDATE_GOLDEN=1 pytest tests/methods/test_loss_trace.py
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from rats_video.backbones.wan import WanBackbone
from rats_video.distillation.settings import DistillConfig
from rats_video.methods.gate import build_gate
from rats_video.methods.rats import Rats
from rats_video.methods.teacher import EmaTeacherConfig, TeacherSampler
from rats_video.training.loop import train_loop
from rats_video.training.metrics import read_metrics
from rats_video.training.run_folder import RunFolder
from rats_video.types import Reward

TRACE = Path(__file__).with_name("loss_trace.json")
KEYS = ("loss", "reward/student", "reward/teacher", "gate/weight", "shaping/0.900", "shaping/0.000", "grad_norm", "lr")
ARMS = {
    "frozen": ("student.num_steps=[4]", "teacher.reuse=2"),
    "ema": ("teacher.kind=ema", "teacher.num_steps=6", "teacher.decay=0.5", "teacher.guidance_scale=2"),
}


@pytest.mark.parametrize("arm", ARMS)
def test_loss_trace(
    backbone: WanBackbone,
    color_reward: Reward,
    make_config: Callable[..., DistillConfig],
    captions: tuple[str, ...],
    tmp_path: Path,
    arm: str,
) -> None:
    cfg = make_config("training.steps=6", "training.optimizer.warmup_steps=2", *ARMS[arm])
    base = backbone.with_own_denoiser() if isinstance(cfg.teacher, EmaTeacherConfig) else backbone
    student = backbone.with_own_denoiser()
    teacher = TeacherSampler(base, color_reward, cfg.teacher, cfg.shift)
    gate = build_gate(cfg.method.gate, backbone.temporal_stride)
    rats = Rats(student, teacher, color_reward, gate, cfg.method, cfg.student, cfg.shift)
    train_loop(rats, cfg, captions, RunFolder(tmp_path))
    trace = [{key: row[key] for key in KEYS} for row in read_metrics(tmp_path / "metrics.jsonl")]

    golden = json.loads(TRACE.read_text()) if TRACE.exists() else {}
    if os.environ.get("UPDATE_GOLDEN"):
        TRACE.write_text(json.dumps(golden | {arm: trace}, indent=1) + "\n")
    else:
        assert len(trace) == len(golden[arm]) == 6
        for ours, theirs in zip(trace, golden[arm], strict=True):
            assert ours == pytest.approx(theirs, rel=1e-4)
