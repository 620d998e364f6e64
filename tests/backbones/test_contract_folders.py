"""What every family says of damaged folders: see `Family`."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from contract import FAMILIES, Case
from safetensors.torch import load_file, save_file

from rats_video.backbones import folder as folder_reader
from rats_video.backbones.base import PipelineBackbone
from rats_video.backbones.kinds import load_backbone
from rats_video.errors import UserError

pytestmark = pytest.mark.usefixtures("no_gradient")

ErrorOfPart = Callable[[Path, str], str]


def copied(case: Case, tmp_path: Path) -> Path:
    return Path(shutil.copytree(case.folder, tmp_path / "model"))


def error_of(folder: Path, backbone: type[PipelineBackbone] | None = None) -> str:
    with pytest.raises(UserError) as caught:
        (backbone.from_pretrained if backbone else load_backbone)(folder)
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


@pytest.fixture
def error_of_part(case: Case, monkeypatch: pytest.MonkeyPatch) -> ErrorOfPart:
    """`error_of(folder)` of which one part is damaged: the others, which take nearly all the time, are not read."""
    read = folder_reader._load_part

    def error(folder: Path, damaged: str) -> str:
        def load(kind: Any, path: Path, *options: Any, **named: Any) -> Any:
            is_damaged = path.name == damaged
            return read(kind, path, *options, **named) if is_damaged else case.backbone.parts[path.name]

        monkeypatch.setattr(folder_reader, "_load_part", load)
        return error_of(folder)

    return error


def folders(case: Case) -> list[str]:
    """The components it has: some are optional."""
    return [name for name in type(case.backbone).component_classes() if (case.folder / name).is_dir()]


def test_folder_of_another_family(case: Case) -> None:
    other = next(f.backbone for f in FAMILIES if not set(f.backbone.pipelines) & set(case.backbone.pipelines))
    assert f"is a {type(case.pipeline).__name__} (give one of: {other.pipelines[0]}" in error_of(case.folder, other)


def test_folder_without_a_component(case: Case, tmp_path: Path) -> None:
    folder = copied(case, tmp_path)
    for part in folders(case):
        (folder / part).rename(tmp_path / "aside")
        assert f"model: no {part}/ in it" in error_of(folder)
        (tmp_path / "aside").rename(folder / part)


def test_folder_with_a_damaged_component(case: Case, tmp_path: Path, error_of_part: ErrorOfPart) -> None:
    folder = copied(case, tmp_path)
    for part in folders(case):
        (folder / part).rename(tmp_path / "aside")
        (folder / part).mkdir()
        for file in (tmp_path / "aside").iterdir():
            (folder / part / file.name).write_bytes(file.read_bytes()[:-100])
        assert f"model: cannot load it as a {case.backbone.family} pipeline: {part}/" in error_of_part(folder, part)
        shutil.rmtree(folder / part)
        (tmp_path / "aside").rename(folder / part)


@pytest.mark.parametrize("odd", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(case: Case, tmp_path: Path, error_of_part: ErrorOfPart, odd: float) -> None:
    folder = copied(case, tmp_path)
    parts = [name for name, part in case.backbone.parts.items() if isinstance(part, torch.nn.Module)]
    assert {"transformer", "vae", "text_encoder"} <= set(parts)
    for part in parts:
        path = next((folder / part).glob("*.safetensors"))
        whole = load_file(path)
        name = max(name for name, weight in whole.items() if weight.is_floating_point())
        broken = whole[name].clone()
        broken.view(-1)[-1] = odd
        save_file({**whole, name: broken}, path, {"format": "pt"})
        found = error_of_part(folder, part)
        line = f"{name} holds NaN or infinity (1 of its {broken.numel()} numbers) (download, "
        assert found.startswith(f"{folder / part}: ")
        assert line in found  # transformers puts `model.` before some of Qwen's names
        save_file(whole, path, {"format": "pt"})


@pytest.mark.parametrize("damage", ["wrong shape", "missing"])
def test_weights_that_do_not_fit(case: Case, tmp_path: Path, error_of_part: ErrorOfPart, damage: str) -> None:
    folder = copied(case, tmp_path)
    parts = [name for name, part in case.backbone.parts.items() if isinstance(part, torch.nn.Module)]
    for part in parts:
        path = next((folder / part).glob("*.safetensors"))
        whole = load_file(path)
        name = max(whole)
        rest = {key: weight for key, weight in whole.items() if key != name}
        save_file(rest if damage == "missing" else {**rest, name: torch.cat([whole[name]] * 2)}, path, {"format": "pt"})
        assert f"model: cannot load it as a {case.backbone.family} pipeline: {part}/" in error_of_part(folder, part)
        save_file(whole, path, {"format": "pt"})
