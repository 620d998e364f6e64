"""What lies in a folder of weights: the variant that was published, or what is there in place of a pipeline."""

from __future__ import annotations

import shlex
from pathlib import Path

from rats_video.assets import suggest_model
from rats_video.errors import UserError
from rats_video.hub import PICKLE_SUFFIXES, WEIGHTS
from rats_video.reading import DAMAGED, read_json

_SINGLE = {".safetensors", ".gguf", *PICKLE_SUFFIXES}


def weights_variant(part: Path) -> str | None:
    """The variant, such as "fp16", of a part whose weights are stored as that alone; None where they are as usual.

    Raises:
        UserError: only pickled weights are there, none, or several variants.
    """
    files = sorted(path for path in part.iterdir() if path.suffix == ".safetensors")
    found = {match["variant"] for path in files if (match := WEIGHTS.fullmatch(path.stem))}
    if None in found:
        return None
    if len(found) == 1:
        return found.pop()
    where = str(part)
    if found:
        names = ", ".join(sorted(map(str, found)))
        raise UserError(f"holds weights as {names}", where=where, fix="leave the files of one of them in it")
    if files:
        return None  # names of a class of the user's own
    if any(path.suffix in PICKLE_SUFFIXES for path in part.iterdir()):
        load = f"from diffusers import DiffusionPipeline as P; P.from_pretrained({str(part.parent)!r})"
        code = shlex.quote(f"{load}.save_pretrained({f'{part.parent}-safetensors'!r})")
        raise UserError(
            "only has pickled weights, which can run code when they are loaded", where=where,
            fix=f"convert them once: python -c {code}",
        )  # fmt: skip
    raise UserError("holds no weights: no .safetensors file in it", where=where, fix="download it again")


def weight_files(part: Path) -> list[Path]:
    """The files of weights that are read of a part; none where it has only its configuration."""
    files = sorted(part.glob("*.safetensors"))
    usual = [path for path in files if (match := WEIGHTS.fullmatch(path.stem)) and match["variant"] is None]
    return usual or files


def refuse_layout(folder: Path, index: str) -> UserError:
    """The error for a folder whose `index` cannot be read: says what it is, and what would do."""
    what, fix = _describe(folder, index)
    return UserError(f"not a diffusers pipeline: {what}", where=str(folder), fix=fix)


def _describe(folder: Path, index: str) -> tuple[str, str]:
    """What a folder is, and what to give in its place."""
    made = "give the folder that pipeline.save_pretrained or a hub download made"
    if (folder / index).is_file():
        return f"its {index} cannot be read", made
    if (folder / "rats.json").is_file():
        return "it is a student", "give the folder of its base, which its rats.json names"
    if (folder.parent / index).is_file():
        return f"it is the {folder.name} of one", f"give {folder.parent}"
    if inside := sorted((*folder.glob(f"snapshots/*/{index}"), *folder.glob(f"*/{index}"))):
        return f"no {index} in it", f"give {inside[-1].parent}"
    files = [path for path in sorted((*folder.glob("*"), *folder.glob("*/*"))) if path.suffix in _SINGLE]
    if files:
        held = f"it holds {files[0].relative_to(folder)} and no {index}, as the original authors' layout does"
        return held, f"give one, {suggest_model(_original(folder))}"
    return (f"no {index} in it" if any(folder.glob("*")) else "it is empty"), made


def _original(folder: Path) -> str:
    """The name to look for: the folder's, and the model's in its config.json."""
    try:
        return f"{folder.name} {read_json(folder / 'config.json').get('_class_name', '')}"
    except DAMAGED:
        return folder.name
