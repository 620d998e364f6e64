from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from rats_video import files
from rats_video.build.distill import _teacher_identity
from rats_video.config.distill import DistillConfig, FrozenTeacher

MakeConfig = Callable[..., DistillConfig]


def identity(cfg: DistillConfig) -> dict[str, object]:
    assert isinstance(cfg.teacher, FrozenTeacher)
    return _teacher_identity(cfg, cfg.teacher)


@pytest.mark.parametrize(
    "change",
    [
        "teacher.num_steps=4", "teacher.guidance_scale=3", "shift=2", "clip.fps=16", "compute.dtype=bfloat16",
        "embedded_guidance=1", "compute.decode.dtype=bfloat16",
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


def test_every_byte_of_the_weights_counts(
    make_config: MakeConfig, tiny_wan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_wan, model)
    cfg = make_config(f"model={model}")
    folders = (model, Path(cfg.reward.path))
    paths = [path for folder in folders for path in sorted(folder.rglob("*.safetensors"))]
    monkeypatch.setattr(files, "HASHED_BYTES", 1000)
    before = identity(cfg)["weights"]
    assert before == hashlib.sha256(b"".join(path.read_bytes() for path in paths)).hexdigest()
    whole = bytearray(paths[-2].read_bytes())
    whole[-1] ^= 1
    paths[-2].write_bytes(whole)
    assert identity(cfg)["weights"] != before
