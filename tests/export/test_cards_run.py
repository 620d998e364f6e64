"""The code of each card, run where nothing is installed but what the card says: no package of ours either."""

from __future__ import annotations

import importlib.metadata
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from ltx2_family import LTX23
from packaging.requirements import Requirement
from shared import made_once
from wan22_family import build
from wan_i2v_family import build_image_pipeline

from rats_video.assets import ASSETS
from rats_video.backbones.compute import LoraConfig
from rats_video.backbones.kinds import load_backbone
from rats_video.export.base import PACKAGES
from rats_video.inference.student import StudentCard, save_student

Command = Callable[..., Any]
CLIP = {"num_frames": 17.0, "height": 64.0, "width": 64.0, "fps": 8.0}


@pytest.fixture(scope="module")
def lora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA on the embedded teacher."""
    role = load_backbone(ASSETS / "tiny-wan").with_adapter("student", LoraConfig(kind="lora", rank=2, alpha=2))
    with torch.no_grad():
        for weight in role.weights.values():
            weight.add_(0.01)
    folder = tmp_path_factory.mktemp("students") / "mine"
    save_student(role, StudentCard("tiny-wan", (4,), 3.0, CLIP, steps=1, seed=0), folder)
    return folder


def needed(packages: Iterable[str]) -> dict[str, importlib.metadata.Distribution]:
    """The distributions that `pip install` of these brings here, by name."""
    found: dict[str, importlib.metadata.Distribution] = {}
    todo = [Requirement(package) for package in packages]
    while todo:
        asked = todo.pop()
        if (name := asked.name.lower()) in found:
            continue
        found[name] = importlib.metadata.distribution(name)
        assert asked.specifier.contains(found[name].version, prereleases=True), asked
        further = map(Requirement, found[name].requires or ())
        todo += [each for each in further if each.marker is None or each.marker.evaluate({"extra": ""})]
    return found


def environment(card: str, folder: Path) -> None:
    """Lays out, by links, what the card's pip line installs."""
    (line,) = re.findall(r"```sh\npip install (.*)\n```", card)
    for distribution in needed(shlex.split(line)).values():
        for top in {file.parts[0] for file in distribution.files or () if file.parts[0] not in {"..", "__pycache__"}}:
            if not (folder / top).exists():
                (folder / top).symlink_to(str(distribution.locate_file(top)))


def test_versions_are_those_that_we_need() -> None:
    """But torchao's, of which older ones read what ours wrote."""
    ours = [Requirement(each) for each in importlib.metadata.requires("rats-video") or ()]
    floors = {each.name: str(each.specifier) for each in ours if each.marker is None}
    asked = [Requirement(shlex.split(package)[0]) for package in PACKAGES]
    assert {each.name: str(each.specifier) or floors[each.name] for each in asked} == {
        name: floors[name] for name in ("diffusers", "transformers", "accelerate")
    }


@pytest.mark.parametrize("forms", [("diffusers", "merged"), ("lora",), ("int8",)], ids=lambda forms: forms[0])
def test_code_of_the_card_runs(command: Command, lora: Path, tmp_path: Path, forms: tuple[str, ...]) -> None:
    """Ten seconds of imports each: they are what is tested."""
    sources = {form: lora if form == "lora" else "tiny-wan-student" for form in forms}
    run_cards(command, tmp_path, {form: (form, source) for form, source in sources.items()})


def test_code_of_cards_that_open_pictures_runs(
    command: Command, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """One picture, a first and a last one, and clips with sound; all with what each program must be told."""
    size = {"num_frames": 9.0, "height": 32.0, "width": 64.0, "fps": 8.0}
    exports: dict[str, tuple[str, Path | str]] = {}
    for kind, form, make in (
        ("wan21-first-last", "diffusers", partial(build_image_pipeline, clip_sees=2, experts=False)),
        ("wan22-5b", "lora", partial(build, experts=False)),
        ("ltx2.3", "lora", LTX23.build),
    ):
        base = made_once(tmp_path_factory, f"i2v-{kind}", make)
        backbone = load_backbone(base)
        role = (
            backbone.with_adapter("student", LoraConfig(kind="lora", rank=2, alpha=2)) if form == "lora" else backbone
        )
        card = StudentCard(
            str(base), (4,), 3.0, size if kind != "ltx2.3" else size | {"height": 64.0}, steps=1, seed=0,
            first_frame=True,
        )  # fmt: skip
        save_student(role, card, tmp_path / "students" / kind)
        exports[kind] = form, tmp_path / "students" / kind
    run_cards(command, tmp_path, exports)


def run_cards(command: Command, folder: Path, exports: Mapping[str, tuple[str, Path | str]]) -> None:
    """Export students, by name, in a form each, and run the code of all cards in one process."""
    (folder / "packages").mkdir()
    code = [f"import sys; sys.path.append({str(folder / 'packages')!r})"]
    for name, (form, source) in exports.items():
        done = command("export", "model", source, "--format", form, "--no-verify", "--output", folder / name)
        assert done.code == 0, done.err
        card = (folder / name / "README.md").read_text()
        environment(card, folder / "packages")
        (python,) = re.findall(r"```python\n(.*?)\n```", card, re.DOTALL)
        code.append(re.sub(r"clip\.(webp|mp4)", rf"{name}.\1", python))
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", "\n".join(code)], cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert all(next(folder.glob(f"{name}.[wm]*")).stat().st_size > 100 for name in exports)
