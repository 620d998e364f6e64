"""A run on a model of the hub: its records name the commit, and a resumed run goes on with that one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hub_server import Hub, serving

from rats_video.commands.pins import pin_models
from rats_video.inference.student import load_card

Command = Callable[..., Any]


@pytest.fixture
def hub(tmp_path: Path, tiny_wan: Path) -> Iterator[Hub]:
    with serving(tmp_path / "cache") as hub:
        hub.add("somebody/wan", tiny_wan)
        yield hub


def test_run_keeps_its_commit(command: Command, config_file: Path, hub: Hub, tiny_wan: Path, tmp_path: Path) -> None:
    run, first = tmp_path / "run", hub.repositories["somebody/wan"].head
    distill = ["distill", "--config", config_file, "--output", run, "--device", "cpu", "--set", "model=somebody/wan"]
    begun = command(*distill, "--set", "training.steps=1")
    assert begun.code == 0, begun.err
    assert "somebody/wan: downloading " in begun.err
    hub.add("somebody/wan", tiny_wan, {"vae/config.json": b"{"})  # which would not load
    gone_on = command(*distill, "--set", "training.steps=2", "--resume")
    assert gone_on.code == 0, gone_on.err
    assert yaml.safe_load((run / "config.resolved.yaml").read_text())["model"] == f"somebody/wan@{first}"
    assert load_card(run / "student").model == f"somebody/wan@{first}"
    sampled = command("sample", "--model", run, "--prompt", "a fast red circle", "--output", tmp_path / "clips")
    assert sampled.code == 0, sampled.err
    evaluated = command("evaluate", "somebody/wan")
    assert evaluated.err == (
        "error: somebody/wan: a student on the hub has no run beside it "
        "(give the folder of a `rats-video distill`; `rats-video sample --model` takes this one)\n"
    )


def test_models_of_a_configuration(make_config: Any, hub: Hub, tiny_wan: Path, tmp_path: Path) -> None:
    first, resolved = hub.repositories["somebody/wan"].head, tmp_path / "config.resolved.yaml"
    hub.add("somebody/lora", tiny_wan)
    init = hub.repositories["somebody/lora"].head
    cfg = make_config("model=somebody/wan@main", "student.init=somebody/lora")
    kept = pin_models(cfg)
    assert (kept.model, kept.student.init) == (f"somebody/wan@{first}", f"somebody/lora@{init}")
    assert pin_models(make_config()) == make_config()
    resolved.write_text(yaml.safe_dump({"model": kept.model, "student": {"init": None}}))
    hub.add("somebody/wan", tiny_wan, {"new": b""})
    newest = hub.repositories["somebody/wan"].head
    assert newest != first
    assert pin_models(cfg, tmp_path / "not-there").model == f"somebody/wan@{newest}"
    assert pin_models(cfg, resolved).model == f"somebody/wan@{first}"
    assert pin_models(make_config(f"model=somebody/wan@{newest}"), resolved).model == f"somebody/wan@{newest}"


def test_revision_that_moved_is_told(
    make_config: Any, hub: Hub, tiny_wan: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, resolved = hub.repositories["somebody/wan"].head, tmp_path / "config.resolved.yaml"
    resolved.write_text(f"model: somebody/wan@{first}\n")
    newest = hub.add("somebody/wan", tiny_wan, {"new": b""})
    pin_models(make_config("model=somebody/wan@main"), resolved)
    told = f"somebody/wan@main is {newest} by now; the run goes on with {first}, which it began with"
    assert capsys.readouterr().err == f"warning: model: {told}\n"
    pin_models(make_config("model=somebody/wan"), resolved)
    assert capsys.readouterr().err == ""


def test_plan_reads_a_model_of_the_hub_without_its_weights(command: Command, config_file: Path, hub: Hub) -> None:
    planned = command("plan", "--config", config_file, "--set", "model=somebody/wan", "--device-name", "cpu")
    assert planned.code == 0, planned.err
    assert not [name for name in hub.sent if name.endswith(".safetensors")]
