"""Pipelines and students on the model hub, by ids such as `Wan-AI/Wan2.1-T2V-1.3B-Diffusers@main`."""

from __future__ import annotations

import contextlib
import functools
import glob
import os
import re
import shutil
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from rats_video.errors import Interrupted, UserError, printable, warn
from rats_video.hub_errors import client_errors, is_unreachable, refusal
from rats_video.reading import read_json

INDEX = "model_index.json"
CARD = "rats.json"
LORAS = "pytorch_lora_weights"  # what the names of a student's LoRA files begin with
_ROOT = {INDEX, CARD, "README.md", "training.json"}  # beside the parts: the licence, and how a model was trained
_SMALL = {".json", ".txt", ".model", ".jinja"}  # of a part, beside its weights
PICKLE_SUFFIXES = {".bin", ".pt", ".pth", ".ckpt"}
_SHARD = r"(?:-\d{5}-of-\d{5})?"
WEIGHTS = re.compile(rf"(?:diffusion_pytorch_)?model{_SHARD}(?:\.(?P<variant>[\w-]+?))?{_SHARD}")
"""A file of weights as diffusers and transformers name it, without its suffix."""
_NAME = r"[A-Za-z0-9][\w.-]*"
_ID = re.compile(rf"(?P<repository>{_NAME}/{_NAME})(?:@(?P<revision>[\w.][\w./-]*))?", re.ASCII)
_COMMIT = re.compile(r"[0-9a-f]{40}")
_SECONDS = 10.0  # to wait for the hub's first answer


@dataclass(frozen=True)
class HubId:
    """A repository on the hub, `USER/NAME`, at a branch, a tag or a commit; None is its main branch."""

    repository: str
    revision: str | None = None

    def __str__(self) -> str:
        return self.repository if self.revision is None else f"{self.repository}@{self.revision}"

    @property
    def is_pinned(self) -> bool:
        """True if it names a commit, which cannot change."""
        return self.revision is not None and bool(_COMMIT.fullmatch(self.revision))


def parse_id(text: str) -> HubId | None:
    """The id that `text` is by its shape, if it is one."""
    match = _ID.fullmatch(text)
    return None if match is None or ".." in text else HubId(match["repository"], match["revision"])


def is_repository(name: str) -> bool:
    """True if the hub takes `name` as a repository's: USER/NAME."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils._validators import validate_repo_id

    found = parse_id(name)
    if found is None or found.revision is not None:
        return False
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def fetch(hub: HubId, *, where: str, weights: bool = True) -> Path:
    """The folder in the hub's cache that holds what is needed of a pipeline or a student; its name is the commit.

    What is not there yet is downloaded, its size said before. A connection that breaks goes on where it was; a command
    that ends keeps the files that came whole. Where the hub cannot be reached, what the cache has is taken.

    Args:
        hub: the repository.
        where: the option or key that names it, for messages.
        weights: whether its weights are wanted too.

    Raises:
        UserError: it is not there, holds something else, may not be read, or has no place on the disk.
        Interrupted: by Ctrl-C.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils.tqdm import disable_progress_bars

    with _explained(hub, where):
        try:
            commit, sizes = _listing(hub)
        except client_errors() as error:
            if not is_unreachable(error) or (found := cached(hub)) is None:
                raise
            if not isinstance(error, OSError):
                warn(f"the hub cannot be reached; its cache has {found}", where=f"{where}: {hub}")
            return found
        wanted = _wanted(hub, commit, sizes, where=where, weights=weights)
        _announce(HubId(hub.repository, commit), {name: sizes[name] for name in wanted}, where)
        if not sys.stderr.isatty():
            disable_progress_bars()
        patterns = [glob.escape(name) for name in wanted]
        return Path(snapshot_download(hub.repository, revision=hub.revision, allow_patterns=patterns))


def cached(hub: HubId) -> Path | None:
    """The folder of it in the hub's cache, as far as it was downloaded."""
    from huggingface_hub import try_to_load_from_cache

    for name in (INDEX, CARD, f"{LORAS}.safetensors"):
        if isinstance(found := try_to_load_from_cache(hub.repository, name, revision=hub.revision), str):
            return Path(found).parent
    return None


def newest_commit(hub: HubId) -> str | None:
    """The commit that it means on the hub now; None where the hub does not say."""
    try:
        return _listing(hub)[0]
    except client_errors():
        return None


# ---------------------------------------------------------------------------------------------------------- internals


@functools.cache  # once a process, however many parts of it ask
def _listing(hub: HubId) -> tuple[str, Mapping[str, int]]:
    """The commit, and the bytes of each file in it."""
    from huggingface_hub import HfApi

    info = HfApi().model_info(hub.repository, revision=hub.revision, files_metadata=True, timeout=_SECONDS)
    assert info.sha is not None
    return info.sha, {file.rfilename: file.size or 0 for file in info.siblings or ()}


def _wanted(hub: HubId, commit: str, sizes: Mapping[str, int], *, where: str, weights: bool) -> list[str]:
    """The files that we read, of a whole pipeline or of a student: LTX-Video's repository holds ten times as much."""
    root = {name for name in sizes if "/" not in name}
    loras = {name for name in root if name.startswith(LORAS) and name.endswith(".safetensors")}
    if not loras and not root & {INDEX, CARD}:
        held = next((name for name in sorted(sizes) if name.endswith(".safetensors")), "")
        raise UserError(
            f"{hub}: neither a pipeline nor a student: no {INDEX} and no {CARD} in it{held and f', but {held}'}",
            where=where, fix="give a repository in diffusers' layout; those of Wan and others end in -Diffusers",
        )  # fmt: skip
    chosen = (root & _ROOT) | (loras if weights else set())
    for part in _parts(hub, commit, sizes):
        files = {name for name in sizes if name.rpartition("/")[0] == part}
        chosen |= {name for name in files if Path(name).suffix in _SMALL}
        if weights:
            chosen |= _weights(files, where=f"{where}: {hub}")
    return sorted(chosen)


def _parts(hub: HubId, commit: str, sizes: Mapping[str, int]) -> set[str]:
    """The folders of a pipeline's parts, as its index lists them, or of a student's denoisers."""
    from huggingface_hub import hf_hub_download

    folders = {name.rpartition("/")[0] for name in sizes}
    if INDEX not in sizes:
        return {name for name in folders if name.startswith("transformer")}
    try:
        index = read_json(Path(hf_hub_download(hub.repository, INDEX, revision=commit)))
        return folders & {name for name, value in index.items() if isinstance(value, list) and value != [None, None]}
    except (ValueError, AttributeError):  # the loader says so
        return set()


def _weights(files: set[str], *, where: str) -> set[str]:
    """The weights of a part: of several variants the one without a name."""
    found = {name for name in files if name.endswith(".safetensors")}
    pickled = [name for name in sorted(files) if Path(name).suffix in PICKLE_SUFFIXES]
    if pickled and not found:
        raise UserError(
            f"{pickled[0]} is pickled, and loading it could run code", where=where,
            fix="take a repository with .safetensors files",
        )  # fmt: skip
    plain = {name for name in found if (match := WEIGHTS.fullmatch(Path(name).stem)) and match["variant"] is None}
    return plain or found


def _announce(hub: HubId, sizes: Mapping[str, int], where: str) -> None:
    """Say what will be downloaded; raises UserError where the disk has no place for it."""
    from huggingface_hub import constants, try_to_load_from_cache

    cache = Path(constants.HF_HUB_CACHE)
    lacking = [
        size for name, size in sizes.items()
        if not isinstance(try_to_load_from_cache(hub.repository, name, revision=hub.revision), str)
    ]  # fmt: skip
    free = shutil.disk_usage(next(folder for folder in (cache, *cache.parents) if folder.is_dir())).free
    if sum(lacking) > free:
        raise UserError(
            f"{hub.repository}: its files are {_size(sum(lacking))}, and {cache} has {_size(free)} left", where=where,
            fix="free some space, or set HF_HOME to another disk",
        )  # fmt: skip
    if lacking and os.environ.get("RANK", "0") == "0":
        files = f"{len(lacking)} file{'s' if len(lacking) != 1 else ''}"
        line = f"{hub.repository}: downloading {_size(sum(lacking))} in {files} into {cache}"
        print(printable(line), file=sys.stderr)  # noqa: T201


def _size(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"


@contextlib.contextmanager
def _explained(hub: HubId, where: str) -> Iterator[None]:
    """Within it, an error of the hub's client becomes one line."""
    try:
        yield
    except KeyboardInterrupt as stop:
        raise Interrupted(f"stopped; the same command goes on with the download of {hub}") from stop
    except client_errors() as error:
        if (found := refusal(error, hub.repository, hub.revision)) is None:
            raise
        what, fix = found
        raise UserError(f"{hub}: no such folder here, and {what}", where=where, fix=fix) from error
