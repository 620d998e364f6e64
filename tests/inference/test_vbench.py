"""Clips for VBench's scorer: exact names, seeds of their own, resumed, and safe from prompts that are paths."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from rats_video.backbones.wan import WanBackbone
from rats_video.config.load import write_resolved
from rats_video.distillation.settings import DistillConfig
from rats_video.errors import UserError
from rats_video.inference.student import StudentCard, save_student
from rats_video.inference.vbench import DIMENSIONS, VBenchPrompt, official_commands, read_vbench_prompts, vbench_clips
from rats_video.inference.video import read_mp4

Command = Callable[..., Any]
CARD = {"num_frames": 5.0, "height": 32.0, "width": 32.0, "fps": 8.0}
INFO = [
    {"prompt_en": "a red circle", "dimension": ["color"], "auxiliary_info": {"color": "red"}},
    {"prompt_en": "a blue square", "dimension": ["scene", "color"]},
]


@pytest.fixture(scope="module")
def run(loaded: WanBackbone, tiny_wan: Path, make_config: Callable[..., DistillConfig], tmp_path_factory: Any) -> Path:
    """What a finished run leaves, as far as sampling reads it; the student is not its teacher."""
    folder: Path = tmp_path_factory.mktemp("run")
    student = loaded.with_own_denoiser()
    with torch.no_grad():
        student.denoiser.proj_out.weight.mul_(1.5)
    save_student(student, StudentCard(str(tiny_wan), (2,), 3.0, CARD, steps=1, seed=0), folder / "student")
    write_resolved(
        make_config("evaluation.batch_size=8", "evaluation.teacher_steps=2"), folder / "config.resolved.yaml"
    )
    return folder


@pytest.fixture
def info(tmp_path: Path) -> Path:
    path = tmp_path / "VBench_full_info.json"
    path.write_text(json.dumps(INFO))
    return path


def found_by_the_scorer(folder: Path, info: Path, dimension: str) -> list[str]:
    """The clips that VBench's `build_full_info_json` finds, as its source says."""
    names = [path.name for path in folder.iterdir()]
    ending = Path(names[0]).suffix
    wanted = [each["prompt_en"] for each in json.loads(info.read_text()) if dimension in each["dimension"]]
    return [name for prompt in wanted for i in range(5) if (name := f"{prompt}-{i}{ending}") in names]


def test_layout_is_found_resumed_and_reproduced(
    command: Command, run: Path, info: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[int] = []
    from rats_video.commands import vbench

    monkeypatch.setattr(
        "rats_video.commands.vbench.sample_batch",
        lambda backbone, prompts, *rest, real=vbench.sample_batch, **options: (
            made.append(len(prompts)) or real(backbone, prompts, *rest, **options)
        ),
    )
    options = ["evaluate", run, "--prompts", info, "--teacher", "--vbench-layout", tmp_path / "v"]
    code, out, err = command(*options)
    assert code == 0, err
    student, teacher = tmp_path / "v" / "student", tmp_path / "v" / "teacher"
    expected = sorted(f"{prompt}-{i}.mp4" for prompt in ("a red circle", "a blue square") for i in range(5))
    for folder in (student, teacher):
        assert sorted(path.name for path in folder.iterdir()) == expected
        assert sorted(found_by_the_scorer(folder, info, "color")) == expected
        assert len(found_by_the_scorer(folder, info, "scene")) == 5
    assert made == [8, 2, 8, 2]
    assert out.splitlines()[:2] == [
        f"student: 10 clips at 2 NFE, 10 of them new: {student}",
        f"teacher: 10 clips at 4 NFE, 10 of them new: {teacher}",
    ]
    assert (
        out.splitlines()[3] == f"for d in color scene; do vbench evaluate --dimension $d --videos_path {student}; done"
    )
    records = {name: json.loads((tmp_path / "v" / f"{name}.json").read_text()) for name in ("student", "teacher")}
    assert records["student"]["clips"] == records["teacher"]["clips"]  # the same noise
    assert len({clip["seed"] for clip in records["student"]["clips"]}) == 10
    assert records["student"]["weights"] != records["teacher"]["weights"]
    assert records["teacher"]["guidance_scale"] == 2.0

    clip = student / "a red circle-3.mp4"
    before = {path: path.read_bytes() for path in student.iterdir()}
    clip.write_bytes(before[clip][:900])
    (student / "a blue square-0.mp4").unlink()
    made.clear()
    again = command(*options)
    assert made == [2]
    assert "student: 10 clips at 2 NFE, 2 of them new" in again.out
    for path in student.iterdir():
        torch.testing.assert_close(read_mp4(path)[0], _decoded(before[path], tmp_path), atol=0.06, rtol=0)
    assert sorted(path.name for path in (tmp_path / "v").iterdir()) == [
        "student", "student.json", "teacher", "teacher.json",
    ]  # fmt: skip


def _decoded(data: bytes, folder: Path) -> torch.Tensor:
    (folder / "before.mp4").write_bytes(data)
    return read_mp4(folder / "before.mp4")[0]


def test_other_settings_and_strange_files_are_refused(command: Command, run: Path, info: Path, tmp_path: Path) -> None:
    options = ["evaluate", run, "--prompts", info, "--vbench-layout", tmp_path / "v"]
    assert command(*options, "--dimensions", "scene").code == 0
    assert len(list((tmp_path / "v" / "student").iterdir())) == 5
    before = {path: path.read_bytes() for path in (tmp_path / "v").rglob("*.*")}
    code, _, err = command(*options, "--seed", 7)
    assert (code, "student.json: tells of clips of another seed (give another" in err) == (2, True)
    (tmp_path / "v" / "student" / "notes.json").write_text("{}")
    code, _, err = command(*options)
    assert (code, "holds 'notes.json'; VBench's scorer may then find no clip" in err) == (2, True)
    (tmp_path / "v" / "student" / "notes.json").unlink()
    assert {path: path.read_bytes() for path in (tmp_path / "v").rglob("*.*")} == before
    record = tmp_path / "v" / "student.json"
    record.rename(tmp_path / "elsewhere.json")
    code, _, err = command(*options)
    assert (code, "holds files, and no student.json says what made them" in err) == (2, True)
    record.write_text("{")
    code, _, err = command(*options)
    assert (code, "student.json: is damaged" in err) == (2, True)
    record.write_bytes(before[record])
    assert "10 clips at 2 NFE, 5 of them new" in command(*options).out
    assert len(json.loads(record.read_text())["clips"]) == 10


@pytest.mark.parametrize(
    ("prompt", "why"),
    [
        ("../x", "holds what no file name can hold"),
        ("a red/blue circle", "holds what no file name can hold"),
        ("/etc/passwd", "holds what no file name can hold"),
        ("..", "would make a hidden file"),
        ("x" * 249, "is too long for a file name of 255 bytes"),
        ("é" * 125, "is too long for a file name of 255 bytes"),
        ("a\x00b", "prompt: holds the control character"),
        ("", "prompt: must have at least 1 character"),
    ],
)
def test_hostile_prompts_are_refused_before_anything_is_made(
    command: Command, run: Path, tmp_path: Path, prompt: str, why: str
) -> None:
    path = tmp_path / "p.json"
    path.write_text(json.dumps([*INFO, {"prompt_en": prompt, "dimension": ["scene"]}]))
    code, _, err = command("evaluate", run, "--prompts", path, "--vbench-layout", tmp_path / "v")
    assert code == 2
    assert why in err.splitlines()[-1]
    assert len(err.splitlines()) == 1
    assert sorted(each.name for each in tmp_path.iterdir()) == ["p.json"]


def test_longest_name_that_fits() -> None:
    clips = vbench_clips([VBenchPrompt("x" * 248, ("temporal_flickering",))], seed=0)
    assert len(clips) == 25
    assert max(len(clip.file) for clip in clips) == 255


def test_seed_of_a_clip_hangs_on_no_other_prompt() -> None:
    one, two = VBenchPrompt("a"), VBenchPrompt("b", ("temporal_flickering",))
    few, many = vbench_clips([two], 3), vbench_clips([one, two], 3)
    assert few == many[5:]
    assert {clip.seed for clip in few}.isdisjoint(clip.seed for clip in vbench_clips([two], 4))


def test_folder_of_lists_joins_their_dimensions(tmp_path: Path) -> None:
    lists = {"scene.txt": "a\nb", "color.txt": "b\nc\n", "all_dimension.txt": "never read"}
    for name, text in lists.items():
        (tmp_path / name).write_text(text)
    found = read_vbench_prompts(tmp_path)
    assert found == [
        VBenchPrompt("b", ("color", "scene", "background_consistency")), VBenchPrompt("c", ("color",)),
        VBenchPrompt("a", ("scene", "background_consistency")),
    ]  # fmt: skip
    assert [each.prompt for each in read_vbench_prompts(tmp_path, ["scene"])] == ["b", "a"]
    assert read_vbench_prompts(tmp_path / "scene.txt")[0] == VBenchPrompt("a", ("scene", "background_consistency"))
    with pytest.raises(UserError, match=re.escape("--dimensions: no prompt in")):
        read_vbench_prompts(tmp_path, ["scene", "smell"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no list named after a dimension in it"):
        read_vbench_prompts(tmp_path / "empty")


def test_lists_of_one_dimension_hold_the_prompts_of_all(tmp_path: Path) -> None:
    """github Vchitect/VBench 45e79ec: 11 lists in prompts_per_dimension, 16 dimensions in VBench_full_info.json."""
    own = (
        "appearance_style", "color", "human_action", "multiple_objects", "object_class", "overall_consistency", "scene",
        "spatial_relationship", "subject_consistency", "temporal_flickering", "temporal_style",
    )  # fmt: skip
    for name in own:
        (tmp_path / f"{name}.txt").write_text(f"a {name}")
    found = {each.prompt: each for each in read_vbench_prompts(tmp_path)}
    assert found["a subject_consistency"].dimensions == ("subject_consistency", "motion_smoothness", "dynamic_degree")
    assert found["a scene"].dimensions == ("scene", "background_consistency")
    assert found["a overall_consistency"].dimensions == ("overall_consistency", "aesthetic_quality", "imaging_quality")
    line, *flicker = official_commands(Path("v"), list(found.values()))
    assert line.split(";")[0].split()[3:] == [name for name in DIMENSIONS if name != "temporal_flickering"]  # 15
    assert len(flicker) == 2
    (line,) = official_commands(Path("v"), read_vbench_prompts(tmp_path / "scene.txt"))
    assert line.startswith("for d in background_consistency scene;")
    wanted = read_vbench_prompts(tmp_path, ["imaging_quality"])
    assert [each.prompt for each in wanted] == ["a overall_consistency"]


def test_spaces_of_vbench_prompts_stay(tmp_path: Path) -> None:
    (tmp_path / "i.json").write_text('[{"prompt_en": "a cat ", "dimension": ["scene"]}]')
    assert vbench_clips(read_vbench_prompts(tmp_path / "i.json"), 0)[0].file == "a cat -0.mp4"


def test_commands() -> None:
    flicker, own = VBenchPrompt("a", ("temporal_flickering",)), VBenchPrompt("b")
    assert official_commands(Path("v/it's"), [flicker, own]) == [
        "vbench static_filter --videos_path 'v/it'\"'\"'s' --result_path 'v/it'\"'\"'s-static'",
        "vbench evaluate --dimension temporal_flickering --videos_path 'v/it'\"'\"'s-static/filtered_videos'",
    ]
    (line,) = official_commands(Path("v"), [own])
    assert line.startswith("for d in subject_consistency ")
    assert line.endswith("do vbench evaluate --dimension $d --videos_path v --mode=custom_input; done")
    (line,) = official_commands(Path("v"), [VBenchPrompt("c", ("scene", "color"))], ["scene"])
    assert line == "vbench evaluate --dimension scene --videos_path v"
