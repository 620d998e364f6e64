from __future__ import annotations

import hashlib
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from rats_video import files
from rats_video.distillation.settings import DistillConfig
from rats_video.distillation.teacher_identity import teacher_identity
from rats_video.methods.teacher import FrozenTeacherConfig

MakeConfig = Callable[..., DistillConfig]


def identity(cfg: DistillConfig) -> dict[str, object]:
    assert isinstance(cfg.teacher, FrozenTeacherConfig)
    return teacher_identity(cfg, cfg.teacher)


@pytest.mark.parametrize(
    "change",
    [
        "teacher.num_steps=4", "teacher.guidance_scale=3", "shift=2", "clip.fps=16", "compute.dtype=bfloat16",
        "embedded_guidance=1", "compute.decode.dtype=bfloat16", "teacher.guidance_scale_2=3",
    ],
)  # fmt: skip
def test_other_rollouts_are_not_found_again(make_config: MakeConfig, change: str) -> None:
    assert identity(make_config(change)) != identity(make_config())


def test_what_only_the_student_has_does_not_count(make_config: MakeConfig) -> None:
    changes = (
        "training.optimizer.lr=1", "method.alpha=7", "compute.activation_checkpointing=true",
        "compute.decode.checkpoint=true", "compute.decode.window=1", "student.grad_steps=1",
    )  # fmt: skip
    assert identity(make_config(*changes)) == identity(make_config())


def test_of_a_sum_every_term_counts(make_config: MakeConfig, reward_folders: tuple[Path, Path]) -> None:
    first, second = reward_folders

    def of(*changes: str, a: Path = first, b: Path = second) -> dict[str, object]:
        terms = (f"reward.terms.a.reward.path={a}", f"reward.terms.b.reward.path={b}")
        return identity(make_config("reward.kind=sum", *terms, *changes))

    assert of() == of()
    others = [of(a=second, b=first), of(b=first), of("reward.terms.a.weight=2"), of("reward.terms.b.spread=2")]
    assert all(other != of() for other in others)


def test_every_byte_of_weights_and_configurations_counts(
    make_config: MakeConfig, tiny_wan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_wan, model)
    cfg = make_config(f"model={model}")
    folders = (model, Path(cfg.reward.path))
    kinds = {".safetensors", ".json"}
    paths = [path for folder in folders for path in sorted(folder.rglob("*")) if path.suffix in kinds]
    assert {path.name for path in paths} >= {"config.json", "tokenizer.json", "scheduler_config.json"}
    monkeypatch.setattr(files, "HASHED_BYTES", 1000)
    before = identity(cfg)["weights"]
    assert before == hashlib.sha256(b"".join(path.read_bytes() for path in paths)).hexdigest()
    for path in (next(path for path in paths if path.suffix == kind) for kind in sorted(kinds)):
        whole = path.read_bytes()
        path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        assert identity(cfg)["weights"] != before
        path.write_bytes(whole)
    assert identity(cfg)["weights"] == before


def test_code_beside_a_custom_reward_counts(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    (tmp_path / "my_faulty_reward.py").write_text("from my_faulty_helper import score")
    (tmp_path / "my_faulty_helper.py").write_text("def score(videos, _): return videos.mean((1, 2, 3, 4))")
    cfg = make_config("reward={kind: custom, target: 'my_faulty_reward:score'}")
    before = identity(cfg)
    assert identity(cfg) == before
    (tmp_path / "my_faulty_helper.py").write_text("def score(videos, _): return -videos.mean((1, 2, 3, 4))")
    assert identity(cfg) != before
