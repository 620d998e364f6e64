"""`export model --push-to-hub`, `export push`, and `sample --model USER/NAME`, against a hub of our own."""

from __future__ import annotations

import filecmp
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hub_server import Hub, Repository, serving
from tiny_student import save_lora_student

from rats_video.backbones.wan import WanBackbone
from rats_video.inference.student import load_card

Command = Callable[..., Any]


@pytest.fixture(scope="module")
def student(loaded: WanBackbone, tiny_wan: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "mine"
    save_lora_student(loaded, tiny_wan, 4, folder)
    return folder


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    with serving(tmp_path / "cache") as hub:
        yield hub


@pytest.fixture(scope="module")
def exported(command: Command, student: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exports")
    for form in ("diffusers", "lora", "merged"):
        assert command("export", "model", student, "--format", form, "--output", folder / form).code == 0
    return folder


def frames(command: Command, output: Path, *options: object) -> Path:
    done = command("sample", "--prompt", "a fast red circle", "--seed", 3, "--output", output, *options)
    assert done.code == 0, done.err
    (clip,) = output.glob("*.mp4")
    return clip


@pytest.mark.parametrize("form", ["diffusers", "lora", "merged"])
def test_what_is_pushed_comes_back_with_the_same_frames(
    command: Command, student: Path, tiny_wan: Path, exported: Path, hub: Hub, tmp_path: Path, form: str
) -> None:
    base = [] if form == "diffusers" else ["--base", tiny_wan]
    folder = exported / form
    pushed = command("export", "push", folder, "me/student")
    assert (pushed.code, pushed.err) == (0, "")
    assert pushed.out.splitlines()[0] == f"on the hub: {hub.url}/me/student"
    assert hub.files("me/student") == {
        str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }
    here = frames(command, tmp_path / "here", "--model", folder, *base)
    there = frames(command, tmp_path / "there", "--model", "me/student", *base)
    trained = frames(command, tmp_path / "trained", "--model", student)
    assert filecmp.cmp(here, there, shallow=False)
    assert filecmp.cmp(here, trained, shallow=False) or form == "merged"  # rounding of the sum


def test_export_goes_to_the_hub_after_its_check(command: Command, student: Path, hub: Hub, tmp_path: Path) -> None:
    options = ["--format", "lora", "--output", tmp_path / "out", "--push-to-hub", "me/student", "--private"]
    done = command("export", "model", student, *options)
    assert (done.code, done.err) == (0, ""), done.err
    assert done.out.splitlines()[0] == f"lora: {tmp_path / 'out'}"
    assert done.out.splitlines()[-2:] == [
        f"on the hub: {hub.url}/me/student", "to sample it: rats-video sample --model me/student"
    ]  # fmt: skip
    assert hub.repositories["me/student"].private
    head = yaml.safe_load(hub.files("me/student")["README.md"].decode().split("---")[1])
    assert (head["base_model_relation"], head["pipeline_tag"]) == ("adapter", "text-to-video")
    assert load_card(tmp_path / "out").model == "tiny-wan"  # no path of ours


def test_another_form_over_the_first_leaves_nothing_of_it(command: Command, exported: Path, hub: Hub) -> None:
    assert command("export", "push", exported / "lora", "me/student").code == 0
    hub.repositories["me/student"].commit(hub.files("me/student") | {"clip.mp4": b"mine"})
    assert command("export", "push", exported / "merged", "me/student").code == 0
    expected = {str(path.relative_to(exported / "merged")) for path in (exported / "merged").rglob("*.*")}
    assert set(hub.files("me/student")) == expected | {"clip.mp4"}


@pytest.mark.parametrize(
    ("name", "token", "message"),
    [
        ("me/student", None, "me/student: no token for the hub (`hf auth login` or set HF_TOKEN; "),
        ("me/student", "hf_old", "me/student: the hub does not take the token (make a new one in its settings, then "),
        (
            "other/student", "hf_me",
            "other/student: the hub does not allow it: you may not make a repository in other (take a token that may, ",
        ),
        ("me/taken", "hf_me", "me/taken: holds something else than an export of rats-video: config.json (give another"),
    ],
)  # fmt: skip
def test_what_the_hub_refuses_is_one_line(
    command: Command, exported: Path, tmp_path: Path, name: str, token: str | None, message: str
) -> None:
    with serving(tmp_path / "cache", token=token) as hub:
        hub.repositories["me/taken"] = taken = Repository()
        taken.commit({"config.json": b"{}"})
        done = command("export", "push", exported / "lora", name)
        assert list(hub.repositories) == ["me/taken"]
    assert done.code == 2
    (line,) = done.err.splitlines()
    assert line.startswith(f"error: {message}")
    folder = exported / "lora"
    assert line.endswith(f"the export is whole in {folder}; to try again: rats-video export push {folder} {name})")


def test_export_stays_where_the_hub_does_not_take_it(command: Command, student: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with serving(tmp_path / "cache", token=None):
        done = command("export", "model", student, "--format", "lora", "--output", out, "--push-to-hub", "me/student")
    assert done.code == 2
    assert done.out.startswith(f"lora: {out}\n")
    assert done.err.endswith(f"rats-video export push {out} me/student)\n")
    assert (out / "README.md").is_file()


def test_hub_that_does_not_answer(command: Command, exported: Path, tmp_path: Path) -> None:
    with serving(tmp_path / "cache") as hub:
        url = hub.url
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("huggingface_hub.constants.ENDPOINT", url)
        patch.setenv("HF_TOKEN", "hf_me")
        done = command("export", "push", exported / "lora", "me/student", "--private")
        patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        offline = command("export", "push", exported / "lora", "me/student")
    assert (done.code, offline.code) == (2, 2)
    assert done.err.startswith(f"error: me/student: the hub does not answer at {url}: ")
    assert done.err.endswith(f"rats-video export push {exported / 'lora'} me/student --private)\n")
    assert offline.err.startswith("error: me/student: HF_HUB_OFFLINE is set")


@pytest.mark.parametrize(
    "name", ["student", "me/", "/me", "me/a/b", "me/a--b", "me/a b", "me/a@main", "../me", "me/.git"]
)
def test_name_is_refused_before_anything_is_made(command: Command, student: Path, tmp_path: Path, name: str) -> None:
    done = command("export", "model", student, "--format", "lora", "--output", tmp_path / "x", "--push-to-hub", name)
    assert done.code == 2
    assert done.err.startswith(f"error: --push-to-hub: not a repository's name: {name} (give USER/NAME")
    assert not (tmp_path / "x").exists()


def test_nothing_unchecked_goes_to_the_hub(command: Command, student: Path, hub: Hub, tmp_path: Path) -> None:
    out = ["--format", "lora", "--output", tmp_path / "out", "--no-verify"]
    done = command("export", "model", student, *out, "--push-to-hub", "me/student")
    assert (done.code, (tmp_path / "out").exists()) == (2, False)
    assert "--no-verify: nothing goes to the hub unchecked" in done.err
    assert command("export", "model", student, *out).code == 0
    done = command("export", "push", tmp_path / "out", "me/student")
    assert (done.code, done.err) == (
        2, f"error: {tmp_path / 'out'}: was never compared with its student (export it again without --no-verify)\n"
    )  # fmt: skip
    done = command("export", "push", student, "me/student")
    assert f"{student}: no export: no README.md of `export model` in it" in done.err
    assert hub.requests == []


@pytest.mark.usefixtures("hub")
def test_public_repository_is_not_taken_for_a_private_one(command: Command, exported: Path) -> None:
    assert command("export", "push", exported / "lora", "me/student").code == 0
    done = command("export", "push", exported / "lora", "me/student", "--private")
    assert done.code == 2
    assert "me/student: is public already" in done.err
