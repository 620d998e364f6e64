"""`doctor`: each thing that can be missing is one line with its fix, and only what basic commands need fails it."""

from __future__ import annotations

import importlib
import os
import shutil
import socket
import subprocess
import sys
from collections import namedtuple
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from rats_video.commands import doctor
from rats_video.hub_errors import client_errors

Command = Callable[..., Any]
Patch = pytest.MonkeyPatch


@pytest.fixture(autouse=True)
def alone(monkeypatch: Patch) -> None:
    """Nothing here depends on the machine: no hub, no driver, no port, a large disk."""
    usage = namedtuple("usage", "total used free")  # noqa: PYI024
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(2e12, 1e12, 1e12))
    monkeypatch.setattr(doctor, "_driver", lambda: None)
    monkeypatch.setattr(doctor, "PORTS", {})
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def lines(sound: bool = True) -> dict[str, str]:  # noqa: FBT001, FBT002
    """The lines by what they are about."""
    said, is_sound = doctor.run_doctor()
    assert is_sound is sound
    assert all("\n" not in line for line in said)
    return {line[9:].partition(":")[0]: line for line in said}


def breaks(monkeypatch: Patch, name: str, error: Exception) -> None:
    """Makes a library's import fail."""
    original = importlib.import_module

    def load(wanted: str, *arguments: Any) -> ModuleType:
        if wanted == name:
            raise error
        return original(wanted, *arguments)

    monkeypatch.setattr(importlib, "import_module", load)


def test_all_is_here(command: Command) -> None:
    code, out, _ = command("doctor")
    assert code == 0
    assert out.endswith("all that the basic commands need is here\n")
    found = lines()
    assert found["torch"].startswith(f"ok       torch: {torch.__version__}, built for ")
    assert found["libraries"] == "ok       libraries: all that are required, in versions that fit"
    assert found["av"].startswith("ok       av: ")
    assert found["GPU"] == "note     GPU: none: the tiny model runs, published models need one"
    assert found["disk of this folder"] == f"ok       disk of this folder: 1000 GB free in {Path.cwd()}"
    assert found["model hub"].startswith("note     model hub: HF_HUB_OFFLINE is set")


@pytest.mark.parametrize(
    ("name", "error", "verdict", "says"),
    [
        ("torch", OSError("libcudart.so.12: cannot open"), "missing", "cannot be imported: libcudart.so.12"),
        ("torch", ImportError("no module"), "missing", "(install it again: pytorch.org)"),
        ("av", ImportError("libx264.so: no such file"), "missing", "no video can be written: libx264.so"),
        ("decord", ImportError("no module"), "note", "`prepare` reads with av, slower: no module"),
    ],
)
def test_a_library_that_does_not_load(
    command: Command, monkeypatch: Patch, name: str, error: Exception, verdict: str, says: str
) -> None:
    breaks(monkeypatch, name, error)
    line = lines(sound=verdict != "missing")[name]
    assert line.startswith(f"{verdict:<8} {name}: ")
    assert says in line
    code, out, _ = command("doctor")
    assert code == (1 if verdict == "missing" else 0)
    if code:
        assert out.endswith("mend what is missing, then run `rats-video doctor`\n")


def test_ffmpeg_without_an_encoder(monkeypatch: Patch) -> None:
    import av

    monkeypatch.setattr(av.codec, "Codec", lambda name, _: av.codec.codec.Codec(f"no-{name}", "w"))
    assert "no video can be written: its FFmpeg has no libx264" in lines(sound=False)["av"]


def test_versions_that_do_not_fit(monkeypatch: Patch) -> None:
    original = metadata.version
    monkeypatch.setattr(metadata, "version", lambda name: "4.0.1" if name == "transformers" else original(name))
    line = lines(sound=False)["transformers"]
    assert line.startswith("missing  transformers: 4.0.1 is too old (pip install 'transformers>=")


def test_extras_name_their_command_and_do_not_fail(monkeypatch: Patch) -> None:
    original = metadata.version

    def version(name: str) -> str:
        if name in doctor.EXTRAS:
            raise metadata.PackageNotFoundError(name)
        return original(name)

    monkeypatch.setattr(metadata, "version", version)
    found = lines()
    assert found["gradio"] == "note     gradio: not installed, for `demo` (pip install 'rats-video[demo]')"
    declared = [line for line in metadata.requires("rats-video") or () if "extra" in line]
    for name, (extra, _) in doctor.EXTRAS.items():
        assert found[name].startswith(f"note     {name}: not installed, for ")
        assert any(line.startswith(f"{name}>=") and f'extra == "{extra}"' in line for line in declared)


def test_a_driver_that_torch_does_not_use(monkeypatch: Patch) -> None:
    monkeypatch.setattr(doctor, "_driver", lambda: "580.65.06")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "driver 580.65.06 is here, and this torch is built for CPUs" in lines()["GPU"]
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert "torch sees no GPU (update the driver, or reboot)" in lines()["GPU"]


def test_gpus(monkeypatch: Patch) -> None:
    monkeypatch.setattr(doctor, "_driver", lambda: "580.65.06")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(name="NVIDIA H100"))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: (int(80e9) - index * int(60e9), int(85e9)))
    found = lines()
    assert found["driver"] == "ok       driver: 580.65.06"
    assert found["GPU 0"] == "ok       GPU 0: NVIDIA H100, 80 of 85 GB free"
    assert found["GPU 1"] == "ok       GPU 1: NVIDIA H100, 20 of 85 GB free"


@pytest.mark.parametrize(("free", "verdict"), [(1e9, "missing"), (5e9, "note"), (50e9, "ok")])
def test_disk(monkeypatch: Patch, free: float, verdict: str) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=free))
    assert lines(sound=verdict != "missing")["disk of this folder"].startswith(verdict)


def test_a_port_in_use(monkeypatch: Patch) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        monkeypatch.setattr(doctor, "PORTS", {port: "demo"})
        assert lines()[f"port {port}"] == (
            f"note     port {port}: in use, so `demo` does not open (give it another --port)"
        )
    assert lines()[f"port {port}"] == f"ok       port {port}: free, for `demo`"


def test_the_hub(monkeypatch: Patch) -> None:
    asked: list[str] = []

    def head(url: str, *, timeout: float) -> None:
        assert timeout <= 5
        asked.append(url)

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.get_session", lambda: SimpleNamespace(head=head))
    monkeypatch.setattr("huggingface_hub.get_token", lambda: "hf_secret")
    line = lines()["model hub"]
    assert line == f"ok       model hub: {asked[0]} answers; a token is here"
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    assert "no token: `hf auth login` for gated models and to push" in lines()["model hub"]

    unreachable = client_errors()[0]

    def fail(_: str, **__: Any) -> None:
        raise unreachable("Name or service not known")

    monkeypatch.setattr("huggingface_hub.get_session", lambda: SimpleNamespace(head=fail))
    assert "does not answer: Name or service not known (give --model a folder" in lines()["model hub"]


def test_it_starts_where_torch_does_not(tmp_path: Path) -> None:
    """Neither the command nor what it imports needs torch before it looks for it."""
    (tmp_path / "torch.py").write_text("raise OSError('libtorch.so: cannot open shared object file')")
    argv = [sys.executable, "-P", "-m", "rats_video.cli", "doctor"]
    environment = os.environ | {"PYTHONPATH": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(argv, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 1, done.stderr
    assert "missing  torch: cannot be imported: libtorch.so: cannot open" in done.stdout
    assert "Traceback" not in done.stderr
