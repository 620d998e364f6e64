"""Pickles become safetensors, whole and unchanged, or are refused; checkpoints are read from every shape of folder."""

from __future__ import annotations

import json
import pickle
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from rats_video.errors import UserError
from rats_video.rewards.convert import convert_checkpoint
from rats_video.rewards.files import check_keys, load_checkpoint_tensors

WEIGHTS = {
    "layers.0.weight": torch.randn(3, 4, generator=torch.Generator().manual_seed(0)),
    "layers.0.bias": torch.arange(3).half(),
    "scale": torch.tensor(4.6, dtype=torch.bfloat16),
    "ids": torch.arange(5),
}


INDEX = "model.safetensors.index.json"
PICKLED = "only has pickled weights, which can run code when they are loaded"


def same(found: dict[str, Tensor], wanted: dict[str, Tensor] = WEIGHTS) -> bool:
    return found.keys() == wanted.keys() and all(
        found[name].dtype == wanted[name].dtype and torch.equal(found[name], wanted[name]) for name in wanted
    )


@pytest.mark.parametrize(
    ("content", "left_out"),
    [
        (WEIGHTS, 0),
        (OrderedDict(WEIGHTS), 0),
        ({"state_dict": WEIGHTS}, 0),
        ({"state_dict": WEIGHTS, "epoch": 3, "optimizer": {"state": {}}}, 2),
        ({"model": {"module": WEIGHTS, "args": None}, "step": 7}, 2),
        (WEIGHTS | {"epoch": 3, "name": "HPS"}, 2),
        ({"model": {"state_dict": WEIGHTS | {"version": 1}}}, 1),
    ],
)  # fmt: skip
@pytest.mark.parametrize("zipped", [True, False])  # torch before 1.6 wrote no archives
def test_tensors_are_kept_as_they_are(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: Any, left_out: int, *, zipped: bool
) -> None:
    source = tmp_path / "HPS.pt"
    torch.save(content, source, _use_new_zipfile_serialization=zipped)
    target = convert_checkpoint(source, tmp_path / "models" / "HPS")
    assert target == tmp_path / "models" / "HPS" / "model.safetensors"
    assert same(load_file(target))
    assert same(load_checkpoint_tensors(target.parent))
    with safe_open(target, "pt") as file:
        # Without the first, transformers does not load it.
        assert file.metadata() == {"format": "pt", "converted from": source.name}
    line = f"warning: {source}: {left_out} entries that are no weights are left out\n"
    assert capsys.readouterr().err == (line if left_out else "")
    assert sorted(path.name for path in target.parent.iterdir()) == ["model.safetensors"]


def test_tied_and_strided_weights_are_written_out(tmp_path: Path) -> None:
    shared = torch.randn(4, 6)
    weights = {"one": shared, "two": shared, "turned": shared.T, "part": shared[1:3]}
    torch.save(weights, tmp_path / "tied.pt")
    assert same(load_file(convert_checkpoint(tmp_path / "tied.pt", tmp_path)), weights)


def test_other_files_of_the_folder_stay(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"old")
    torch.save(WEIGHTS, tmp_path / "pytorch_model.bin")
    assert same(load_file(convert_checkpoint(tmp_path / "pytorch_model.bin", tmp_path)))
    assert (tmp_path / "config.json").read_text() == "{}"


class Malicious:
    """Leaves a mark when it is loaded."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[[Path], None], tuple[Path]]:
        return Path.touch, (self.mark,)


def _malicious(path: Path) -> None:
    torch.save({"state_dict": WEIGHTS, "extra": Malicious(path.with_name("mark"))}, path)


def _plain_pickle(path: Path) -> None:
    path.write_bytes(pickle.dumps(Malicious(path.with_name("mark")), protocol=2))


def _truncated(path: Path) -> None:
    torch.save(WEIGHTS, path)
    path.write_bytes(path.read_bytes()[:-300])


@pytest.mark.parametrize(
    ("write", "line"),
    [
        (_malicious, "refused: it is no checkpoint, or loading it would run code"),
        (_plain_pickle, "refused: it is no checkpoint, or loading it would run code"),
        (lambda path: torch.save(nn.Linear(2, 2), path), "refused: it is no checkpoint, or loading it would run code"),
        (lambda path: path.write_text("<!DOCTYPE html>"), "refused: it is no checkpoint, or loading it would run code"),
        (_truncated, ""),
        (lambda path: path.write_bytes(b""), "cannot be read: "),
        (lambda path: None, "cannot be read: "),  # noqa: ARG005
        (lambda path: torch.save(torch.ones(3), path), "holds no named tensors"),
        (lambda path: torch.save({"epoch": 3}, path), "holds no named tensors"),
        (lambda path: torch.save({"state_dict": {}}, path), "holds no named tensors"),
        (lambda path: torch.save([torch.ones(1)], path), "holds no named tensors"),
    ],
)
def test_what_is_no_checkpoint_is_one_line_and_leaves_nothing(
    tmp_path: Path, write: Callable[[Path], object], line: str
) -> None:
    source = tmp_path / "x.pt"
    write(source)
    with pytest.raises(UserError) as caught:
        convert_checkpoint(source, tmp_path / "out")
    assert str(caught.value).startswith(f"{source}: {line}")
    assert len(str(caught.value).splitlines()) == 1
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "mark").exists()


def test_a_target_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    torch.save(WEIGHTS, tmp_path / "x.pt")
    (tmp_path / "out").write_text("a file")
    with pytest.raises(UserError, match="cannot write the weights: "):
        convert_checkpoint(tmp_path / "x.pt", tmp_path / "out")


# ------------------------------------------------------------------------------------------------------- reading


def test_a_file_a_folder_and_shards_hold_the_same(tmp_path: Path) -> None:
    one, named, sharded = (tmp_path / name for name in ("one", "named", "sharded"))
    for folder in (one, named, sharded):
        folder.mkdir()
    save_file(WEIGHTS, one / "model.safetensors")
    save_file(WEIGHTS, named / "HPSv3.safetensors")
    shards = {"a.safetensors": list(WEIGHTS)[:2], "b.safetensors": list(WEIGHTS)[2:]}
    for file, names in shards.items():
        save_file({name: WEIGHTS[name] for name in names}, sharded / file)
    index = {"weight_map": {name: file for file, names in shards.items() for name in names}}
    (sharded / INDEX).write_text(json.dumps(index))
    save_file({"other": torch.ones(1)}, one / "adapter.safetensors")  # beside model.safetensors: not part of it
    for path in (one, one / "model.safetensors", named, named / "HPSv3.safetensors", sharded):
        assert same(load_checkpoint_tensors(path))


def _two_files(folder: Path) -> None:
    for name in ("a", "b"):
        save_file(WEIGHTS, folder / f"{name}.safetensors")


@pytest.mark.parametrize(
    ("write", "line"),
    [
        (_two_files, "{folder}: holds 2 safetensors files, e.g. a.safetensors, and no model.safetensors"),
        (lambda folder: None, "{folder}: no safetensors file in it"),  # noqa: ARG005
        (
            lambda folder: torch.save(WEIGHTS, folder / "pytorch_model.bin"),
            f"{{folder}}: {PICKLED} (rats-video rewards convert {{folder}}/pytorch_model.bin {{folder}})",
        ),
        (lambda folder: (folder / "x.safetensors").write_bytes(b"no"), "{folder}/x.safetensors: cannot be read: "),
        (
            lambda folder: (folder / INDEX).write_text('{"weight_map": 3}'),
            f"{{folder}}/{INDEX}: is no readable index of shards",
        ),
        (
            lambda folder: (folder / INDEX).write_text('{"weight_map": {"x": "a.safetensors"}}'),
            "{folder}/a.safetensors: cannot be read: ",
        ),
    ],
)  # fmt: skip
def test_unreadable_folder_is_one_line(tmp_path: Path, write: Callable[[Path], object], line: str) -> None:
    write(tmp_path)
    with pytest.raises(UserError) as caught:
        load_checkpoint_tensors(tmp_path)
    assert str(caught.value).startswith(line.format(folder=tmp_path))
    assert len(str(caught.value).splitlines()) == 1


def test_a_pickled_file_is_refused_by_its_name(tmp_path: Path) -> None:
    line = rf"rats-video rewards convert {tmp_path}/HPS\.pt {tmp_path}/HPS\)"
    with pytest.raises(UserError, match=line):
        load_checkpoint_tensors(tmp_path / "HPS.pt")


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({}, None),
        ({"ids": None}, "here: lacks 1 of 4 tensors, the first is ids"),
        ({"ids": None, "positions": torch.ones(5)}, "here: lacks 1 of 4 tensors, the first is ids"),
        ({"z": torch.ones(1), "b": torch.ones(1)}, "here: holds 2 tensors too many, the first is b"),
        ({"scale": torch.ones(1)}, "here: scale is [1], must be []"),
    ],
)
def test_every_key_is_checked(change: dict[str, Tensor | None], line: str | None) -> None:
    found = {name: tensor for name, tensor in (WEIGHTS | change).items() if tensor is not None}
    wanted = {name: torch.empty_like(tensor, device="meta") for name, tensor in WEIGHTS.items()}
    if line is None:
        check_keys(found, wanted, where=Path("here"))
        return
    with pytest.raises(UserError) as caught:
        check_keys(found, wanted, where=Path("here"))
    assert str(caught.value) == line
