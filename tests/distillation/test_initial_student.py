"""A run that starts from an earlier student: the same student before its first step, or one line that says why not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from rats_video.backbones.base import PipelineBackbone
from rats_video.backbones.compute import LoraConfig
from rats_video.backbones.lora import LORA_FILE
from rats_video.backbones.wan import WanBackbone
from rats_video.distillation.roles import build_roles
from rats_video.distillation.settings import DistillConfig
from rats_video.errors import UserError
from rats_video.inference.sampler import clip_noise
from rats_video.inference.student import StudentCard, save_student
from rats_video.types import ClipSpec

pytestmark = pytest.mark.pipeline

MakeConfig = Callable[..., DistillConfig]
LORA = ("student.weights.kind=lora", "student.weights.rank=2")
CLIP = {"num_frames": 5.0, "height": 32.0, "width": 32.0, "fps": 8.0}
EMA = ("teacher.kind=ema", "teacher.num_steps=4", "teacher.decay=0.5")


@pytest.fixture
def base(loaded: WanBackbone) -> WanBackbone:
    return loaded.with_own_denoiser()


@pytest.fixture(scope="module")
def students(loaded: WanBackbone, tiny_wan: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """An earlier LoRA run and an earlier full one."""
    folder = tmp_path_factory.mktemp("earlier")
    card = StudentCard(str(tiny_wan), (4,), 3.0, CLIP, steps=2, seed=9)
    roles = {"lora": loaded.with_own_denoiser().with_adapter("student", LoraConfig(kind="lora", rank=2, alpha=6)),
             "full": loaded.with_own_denoiser()}  # fmt: skip
    with torch.no_grad():
        for name, role in roles.items():
            for weight in role.weights.values():
                weight.add_(0.02 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)))
            save_student(role, card, folder / name / "student")
    return {name: folder / name for name in roles}


@torch.no_grad()
def velocity(role: PipelineBackbone, clip: ClipSpec) -> Tensor:
    return role.velocity(clip_noise(role, clip, 0, 0), torch.tensor([0.7]), role.encode_text(["a red circle"]))


@pytest.mark.parametrize("teacher", [(), EMA])
@pytest.mark.parametrize(("init", "weights"), [("lora", (*LORA, "student.weights.alpha=3")), ("lora", ()),
                                               ("full", ())])  # fmt: skip
def test_student_and_its_average_start_where_the_earlier_one_ended(
    base: WanBackbone, loaded: WanBackbone, students: dict[str, Path], make_config: MakeConfig, clip: ClipSpec,
    init: str, weights: tuple[str, ...], teacher: tuple[str, ...],
) -> None:  # fmt: skip
    expected = velocity(loaded.with_own_denoiser().load_role(students[init] / "student"), clip)
    plain = velocity(loaded, clip)
    assert (expected - plain).abs().max() > 0.01
    student, guide = build_roles(make_config(f"student.init={students[init]}", *weights, *teacher), base)
    torch.testing.assert_close(velocity(student, clip), expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(velocity(guide, clip), expected if teacher else plain, atol=1e-6, rtol=0)
    assert all(weight.requires_grad for weight in student.weights.values())
    assert {name for name in student.weights if "lora" in name} == (set(student.weights) if weights else set())


def test_a_folder_and_a_file_do_as_well(base: WanBackbone, students: dict[str, Path], make_config: MakeConfig) -> None:
    for init in (students["lora"] / "student", students["lora"] / "student" / LORA_FILE):
        student, _ = build_roles(make_config(f"student.init={init}", *LORA), base.with_own_denoiser())
        assert all(weight.abs().max() > 0 for weight in student.weights.values())


@pytest.mark.parametrize(
    ("init", "options", "expected"),
    [
        (
            "full",
            LORA,
            "student.init: {full}/student is a whole denoiser, this student a LoRA (set student.",
        ),
        ("lora", (*LORA, "student.weights.rank=4"), "is of rank 2, this student of 4 (set student.weights.rank=2)"),
        ("lora", (*LORA, "student.weights.targets=[to_q]"), "to_v, this student to_q (set student.weights.targets to "),
        ("nowhere", LORA, "student.init: no such folder: {nowhere}"),
        ("empty", LORA, "student.init={empty}: no student in it: neither rats.json nor pytorch_lora_weights.safetens"),
        ("empty/file", LORA, "{empty/file}: not a LoRA file with its rank and alpha"),
    ],
)
def test_what_cannot_be_a_start(
    base: WanBackbone, students: dict[str, Path], make_config: MakeConfig, tmp_path: Path, init: str,
    options: tuple[str, ...], expected: str,
) -> None:  # fmt: skip
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "file").write_text("no tensors")
    given = students.get(init, tmp_path / init)
    with pytest.raises(UserError) as caught:
        build_roles(make_config(f"student.init={given}", *options), base)
    assert expected.replace(f"{{{init}}}", str(given)) in str(caught.value)


def test_denoiser_of_another_size(
    base: WanBackbone, students: dict[str, Path], make_config: MakeConfig, tmp_path: Path
) -> None:
    from diffusers import WanTransformer3DModel

    other = WanTransformer3DModel(num_attention_heads=1, attention_head_dim=12, num_layers=1, text_dim=8, ffn_dim=8)
    other.save_pretrained(tmp_path / "student" / "transformer")
    (tmp_path / "student" / "rats.json").write_text((students["full"] / "student" / "rats.json").read_text())
    with pytest.raises(UserError, match=r"student is of another model: transformer\.\S+ does not match"):
        build_roles(make_config(f"student.init={tmp_path}"), base)


def test_what_makes_a_poor_start_is_told(
    base: WanBackbone, students: dict[str, Path], make_config: MakeConfig, tmp_path: Path, tiny_wan: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    build_roles(make_config(f"student.init={students['full']}"), base)
    assert capsys.readouterr().err == ""
    other = replace(StudentCard(str(tiny_wan), (4,), 5.0, CLIP, steps=2, seed=5), model="/x/another")
    save_student(base, other, tmp_path / "other")
    build_roles(make_config(f"student.init={tmp_path / 'other'}"), base)
    assert capsys.readouterr().err.splitlines() == [
        f"warning: student.init={tmp_path / 'other'}: was trained on another, this run's model is {tiny_wan.name}",
        f"warning: student.init={tmp_path / 'other'}: was trained at shift 5, this run's is 3",
        "warning: seed: student.init was trained with seed 5 as well, and saw the same prompts and noise; give another",
    ]
