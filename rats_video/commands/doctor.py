"""`doctor`: what is here, and what is missing for which command. It imports nothing heavy that may be broken itself."""

from __future__ import annotations

import importlib
import os
import platform
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import rats_video
from rats_video.errors import first_line

GB = 1e9
PORTS = {7860: "demo", 7861: "rate"}
EXTRAS = {
    "gradio": ("demo", "`demo`"),
    "bitsandbytes": ("gpu", "training.optimizer.kind=adamw8bit"),
    "xformers": ("gpu", "compute.attention=xformers"),
    "torchao": ("quant", "`export model` in 8 and 4 bits"),
    "tensorboard": ("trackers", "tracking.trackers=[tensorboard]"),
    "trackio": ("trackers", "tracking.trackers=[trackio]"),
    "wandb": ("trackers", "tracking.trackers=[wandb]"),
}
"""What few need: the extra that installs it, and what needs it."""
_BROKEN = (ImportError, OSError, RuntimeError, AttributeError)  # of a library that does not fit this machine
_SMALL_DISK, _MODEL_DISK = 2 * GB, 40 * GB  # a tiny run; the smallest published model and a run of it
_SECONDS = 3.0  # to wait for a program or the hub

Verdict = Literal["ok", "note", "missing"]


@dataclass(frozen=True)
class Finding:
    """One line: what was looked at and what was found; for what is not there, which command misses it and the fix.

    Args:
        verdict: "missing" keeps a basic command from working, "note" something else.
        what: was looked at.
        found: in words.
        fix: how to mend it.
    """

    verdict: Verdict
    what: str
    found: str
    fix: str = ""

    def __str__(self) -> str:
        return f"{self.verdict:<8} {self.what}: {self.found}" + (f" ({self.fix})" if self.fix else "")


def run_doctor() -> tuple[list[str], bool]:
    """The lines to show, and whether the basic commands have what they need: `run`, `distill`, `sample`, `evaluate`."""
    findings = [*_python(), *_torch(), *_video(), *_extras(), *_disks(), *_ports(), *_hub()]
    sound = not any(finding.verdict == "missing" for finding in findings)
    end = "all that the basic commands need is here" if sound else "mend what is missing, then run `rats-video doctor`"
    return [*map(str, findings), end], sound


def _python() -> Iterator[Finding]:
    """Python, this package and the libraries that it requires."""
    yield Finding("ok", "rats-video", f"{rats_video.__version__}, Python {platform.python_version()}")
    if not (Path(rats_video.__file__).parent / "assets" / "tiny-wan" / "model_index.json").is_file():
        yield Finding("missing", "embedded model", "its files are not installed", "install rats-video again")
    wrong = [*_wrong_versions()]
    yield from wrong
    if not wrong:
        yield Finding("ok", "libraries", "all that are required, in versions that fit")


def _wrong_versions() -> Iterator[Finding]:
    from packaging.requirements import Requirement

    try:
        requirements = [Requirement(line) for line in metadata.requires("rats-video") or ()]
    except metadata.PackageNotFoundError:
        yield Finding("note", "libraries", "rats-video is not installed, so nobody knows what it needs", "make install")
        return
    for need in requirements:
        if need.marker is not None and not need.marker.evaluate({"extra": ""}):
            continue
        have = _version(need.name)
        if have is None or not need.specifier.contains(have, prereleases=True):
            found = "not installed" if have is None else f"{have} is too old"
            yield Finding("missing", need.name, found, f"pip install '{need.name}{need.specifier}'")


def _torch() -> Iterator[Finding]:
    """PyTorch, the driver and the GPUs."""
    driver = _driver()
    try:
        torch: Any = importlib.import_module("torch")
    except _BROKEN as error:
        yield Finding("missing", "torch", f"cannot be imported: {first_line(error)}", "install it again: pytorch.org")
        return
    built = f"for CUDA {torch.version.cuda}" if torch.version.cuda else "for CPUs"
    yield Finding("ok", "torch", f"{torch.__version__}, built {built}")
    if torch.cuda.is_available():
        yield Finding("ok", "driver", driver or "unknown: nvidia-smi is not here")
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            free, total = torch.cuda.mem_get_info(index)
            found = f"{properties.name}, {free / GB:.0f} of {total / GB:.0f} GB free"
            yield Finding("ok", f"GPU {index}", found)
    elif driver is None:
        yield Finding("note", "GPU", "none: the tiny model runs, published models need one")
    elif torch.version.cuda:
        yield Finding("note", "GPU", f"driver {driver} is here, and torch sees no GPU", "update the driver, or reboot")
    else:
        fix = "install torch for CUDA: pytorch.org"
        yield Finding("note", "GPU", f"driver {driver} is here, and this torch is built for CPUs", fix)


def _driver() -> str | None:
    """The version of NVIDIA's driver, where its tool says one."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, check=True).stdout  # noqa: S603
    except (OSError, subprocess.SubprocessError):
        return None
    return next(iter(said.split()), None)


def _video() -> Iterator[Finding]:
    """The readers and writers of videos."""
    try:
        av: Any = importlib.import_module("av")
        av.codec.Codec("libx264", "w")
        yield Finding("ok", "av", f"{av.__version__}, writes H.264")
    except _BROKEN as error:
        fix = f"pip install --force-reinstall 'av{_required('av')}'"
        yield Finding("missing", "av", f"no video can be written: {first_line(error)}", fix)
    except ValueError:  # its UnknownCodecError
        fix = "pip install --force-reinstall --only-binary av av"
        yield Finding("missing", "av", "no video can be written: its FFmpeg has no libx264", fix)
    try:
        importlib.import_module("decord")
        yield Finding("ok", "decord", _version("decord") or "unknown version")
    except _BROKEN as error:
        fix = "pip install decord" if platform.machine() == "x86_64" else "it has no wheels for this processor"
        yield Finding("note", "decord", f"`prepare` reads with av, slower: {first_line(error)}", fix)


def _extras() -> Iterator[Finding]:
    for name, (extra, needed_for) in EXTRAS.items():
        have = _version(name)
        if have is None:
            yield Finding("note", name, f"not installed, for {needed_for}", f"pip install 'rats-video[{extra}]'")
        else:
            yield Finding("ok", name, have)


def _disks() -> Iterator[Finding]:
    """Space and permission where files are written."""
    hub = os.environ.get("HF_HUB_CACHE") or Path(os.environ.get("HF_HOME", "~/.cache/huggingface")) / "hub"
    places = {"this folder": Path(), "temporary files": Path(tempfile.gettempdir()), "the hub's cache": Path(hub)}
    for name, given in places.items():
        place = given.expanduser().absolute()
        while not place.exists():  # it will be made there
            place = place.parent
        free = shutil.disk_usage(place).free
        what, found = f"disk of {name}", f"{free / GB:.0f} GB free in {place}"
        if not os.access(place, os.W_OK):
            verdict: Verdict = "note" if name == "the hub's cache" else "missing"
            yield Finding(verdict, what, f"{place} cannot be written to", "change its permissions, or another folder")
        elif free < _SMALL_DISK:
            yield Finding("missing", what, found, "make room")
        elif free < _MODEL_DISK and name != "temporary files":
            yield Finding("note", what, f"{found}: enough for the tiny model, published ones need {_MODEL_DISK / GB:g}")
        else:
            yield Finding("ok", what, found)


def _ports() -> Iterator[Finding]:
    for port, command in PORTS.items():
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                yield Finding("note", f"port {port}", f"in use, so `{command}` does not open", "give it another --port")
            else:
                yield Finding("ok", f"port {port}", f"free, for `{command}`")


def _hub() -> Iterator[Finding]:
    """Whether models can be downloaded, and whether the hub knows who asks."""
    try:
        from huggingface_hub import constants, get_session, get_token

        from rats_video.hub_errors import client_errors
    except _BROKEN as error:
        yield Finding("missing", "model hub", first_line(error), "pip install --force-reinstall huggingface-hub")
        return
    address = constants.ENDPOINT
    if constants.HF_HUB_OFFLINE:
        yield Finding("note", "model hub", "HF_HUB_OFFLINE is set: only models in its cache", "unset it to download")
        return
    try:
        get_session().head(address, timeout=_SECONDS)
    except client_errors() as error:
        fix = "give --model a folder that is here"
        yield Finding("note", "model hub", f"{address} does not answer: {first_line(error)}", fix)
        return
    token = "a token is here" if get_token() else "no token: `hf auth login` for gated models and to push"
    yield Finding("ok", "model hub", f"{address} answers; {token}")


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _required(name: str) -> str:
    """The versions of a library that rats-video requires, as pip takes them."""
    from packaging.requirements import Requirement

    needs = map(Requirement, metadata.requires("rats-video") or ())
    return next((str(need.specifier) for need in needs if need.name == name), "")
