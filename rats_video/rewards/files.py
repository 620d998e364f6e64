"""Loads models from their folders, whole and without running code."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from rats_video.errors import AsUserError, UserError, first_line
from rats_video.reading import DAMAGED, check_finite, load_tensors, read_json, read_sizes

_PICKLED = (".bin", ".pt", ".pth", ".ckpt")
ORIGIN = "converted from"  # in the header of a converted checkpoint


def load_tokenizer(folder: Path, words: int, added: Sequence[str] = (), *, fix: str) -> Any:
    """The tokenizer in a folder, with `added` special tokens after its own; it must then have `words` tokens.

    Raises:
        UserError: there is none, or one of another size.
    """
    from transformers import AddedToken, AutoTokenizer

    # Without its files transformers would make up an empty one, which takes every prompt for the same one.
    if not _has_tokenizer(folder):
        raise UserError("no tokenizer in it", where=str(folder), fix=fix)
    with AsUserError("cannot load its tokenizer", where=str(folder), fix=fix):
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in added])
    if len(tokenizer) != words:
        raise UserError(f"its tokenizer has {len(tokenizer)} tokens, the model {words}", where=str(folder), fix=fix)
    return tokenizer


def _has_tokenizer(folder: Path) -> bool:
    """True if a folder holds the files of a byte-pair tokenizer, CLIP's or Qwen's."""
    return (folder / "tokenizer.json").is_file() or all(
        (folder / name).is_file() for name in ("vocab.json", "merges.txt")
    )


def read_config(folder: Path) -> dict[str, Any]:
    """The config.json of a folder; raises UserError if there is none that can be read."""
    try:
        return dict(read_json(folder / "config.json"))
    except DAMAGED as error:
        raise UserError("no readable config.json in it", where=str(folder)) from error


def load_transformers_model(kind: Any, folder: Path, model_type: str, dtype: torch.dtype, **options: bool) -> Any:
    """A model of the transformers class `kind`, made with `options`, from a hub folder, on the CPU.

    Raises:
        UserError: the folder holds another model, lacks a weight, has one that is not finite, or only pickled ones.
    """
    from transformers.utils import logging

    _check_files(kind, folder, model_type)
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # its report of missing weights is a table; ours is a line
    logging.disable_progress_bar()
    try:
        with AsUserError(f"cannot load it as a {kind.__name__}", where=str(folder)):
            model, report = kind.from_pretrained(
                folder, dtype=dtype, use_safetensors=True, local_files_only=True, output_loading_info=True, **options
            )
    finally:
        logging.set_verbosity(verbosity)
    if missing := sorted(report["missing_keys"]):
        raise UserError(f"lacks {len(missing)} weights of a {kind.__name__}, e.g. {missing[0]}", where=str(folder))
    check_finite(model.state_dict().items(), where=folder)
    return model


def fill_transformers_model(kind: Any, config: Any, weights: dict[str, Tensor], dtype: torch.dtype) -> Any:
    """A model of the transformers class `kind` with all of its weights given, on the CPU."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    return kind.from_pretrained(None, config=config, state_dict=weights, dtype=dtype)


def _check_files(kind: Any, folder: Path, model_type: str) -> None:
    try:
        found = read_sizes(folder / "config.json")["model_type"]
    except DAMAGED as error:
        raise UserError(
            f"not a {kind.__name__}: no readable config.json in it",
            where=str(folder), fix="give the folder of a hub download",
        ) from error  # fmt: skip
    if found != model_type:
        raise UserError(f"is a {found!r} model, not a {kind.__name__} (model_type {model_type!r})", where=str(folder))
    _refuse_pickles(folder)


def load_checkpoint_tensors(path: Path) -> dict[str, Tensor]:
    """Every tensor of a checkpoint by its name, on the CPU.

    Args:
        path: a safetensors file; or a folder with `model.safetensors`, with an index of shards, or with one such file.

    Raises:
        UserError: there is none, more than one, or only a pickled one; a file cannot be read.
    """
    tensors: dict[str, Tensor] = {}
    for file in _safetensors_files(path):
        try:
            tensors |= load_tensors(file)
        except (OSError, SafetensorError) as error:
            raise UserError(f"cannot be read: {first_line(error)}", where=str(file)) from error
    return tensors


def checkpoint_origin(path: Path) -> str:
    """The name of the file that a checkpoint was converted from, where `rewards convert` did it; else nothing."""
    with safe_open(_safetensors_files(path)[0], framework="pt") as file:
        return str((file.metadata() or {}).get(ORIGIN, ""))


def check_keys(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor], *, where: Path) -> None:
    """Raise UserError, naming the first, if names are missing or left over, or if a tensor has another shape.

    Args:
        found: what a checkpoint holds.
        wanted: what the model has; only its shapes are read, so it may be on the meta device.
        where: the checkpoint.
    """
    if missing := sorted(wanted.keys() - found.keys()):
        raise UserError(f"lacks {len(missing)} of {len(wanted)} tensors, the first is {missing[0]}", where=str(where))
    if unknown := sorted(found.keys() - wanted.keys()):
        raise UserError(f"holds {len(unknown)} tensors too many, the first is {unknown[0]}", where=str(where))
    for name in sorted(wanted):
        has, needs = list(found[name].shape), list(wanted[name].shape)
        if has != needs:
            raise UserError(f"{name} is {has}, must be {needs}", where=str(where))


def _safetensors_files(path: Path) -> list[Path]:
    if not path.is_dir():
        _refuse_pickles(path)
        return [path]
    index, whole = path / "model.safetensors.index.json", path / "model.safetensors"
    if index.is_file():
        try:
            return sorted({path / Path(name).name for name in read_json(index)["weight_map"].values()})
        except DAMAGED as error:
            raise UserError("is no readable index of shards", where=str(index)) from error
    found = [whole] if whole.is_file() else sorted(path.glob("*.safetensors"))
    if len(found) > 1:
        what = f"holds {len(found)} safetensors files, e.g. {found[0].name}, and no model.safetensors"
        raise UserError(what, where=str(path))
    if not found:
        _refuse_pickles(path)
        raise UserError("no safetensors file in it", where=str(path))
    return found


def _refuse_pickles(path: Path) -> None:
    """Raise UserError for a pickled file, and for a folder with nothing better."""
    if path.is_dir() and any(path.glob("*.safetensors")):
        return
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    if pickled := [file for file in files if file.suffix in _PICKLED]:
        folder = path if path.is_dir() else path.with_suffix("")
        raise UserError(
            "only has pickled weights, which can run code when they are loaded", where=str(path),
            fix=f"rats-video rewards convert {pickled[0]} {folder}",
        )  # fmt: skip
