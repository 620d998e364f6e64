"""What is read of the model hub, from a hub of our own: which files, how often, and what goes wrong."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from hub_server import Hub, Repository, serving

from rats_video.assets import find_hub_id, pinned, resolve_folder
from rats_video.errors import UserError
from rats_video.hub import HubId, fetch

LTX = {
    "model_index.json": b'{"_class_name": "LTXPipeline", "vae": ["diffusers", "V"], "tokenizer": ["transformers", "T"],'
    b' "transformer": ["diffusers", "X"], "transformer_2": [null, null]}',
    "README.md": b"---\nlicense: other\n---\n",
    "vae/config.json": b"{}",
    "vae/diffusion_pytorch_model.safetensors": b"v" * 3000,
    "vae/diffusion_pytorch_model.fp16.safetensors": b"h" * 1500,
    "tokenizer/spiece.model": b"s" * 40,
    "tokenizer/added_tokens.json": b"{}",
    "transformer/config.json": b"{}",
    "transformer/diffusion_pytorch_model.safetensors.index.json": b"{}",
    "transformer/diffusion_pytorch_model-00001-of-00002.safetensors": b"1" * 500,
    "transformer/diffusion_pytorch_model-00002-of-00002.safetensors": b"2" * 500,
}
UNREAD = {
    "ltxv-13b-0.9.8-dev.safetensors": b"x" * 9000,
    "vae/diffusion_pytorch_model.bin": b"x" * 9000,
    "transformer_2/config.json": b"x" * 9000,
    "upsampler/model.safetensors": b"x" * 9000,
    "media/clip.gif": b"x" * 9000,
    ".gitattributes": b"",
}
VAE = "vae/diffusion_pytorch_model.safetensors"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda _: None)
    with serving(tmp_path / "cache") as hub:
        hub.repositories["somebody/ltx"] = there = Repository()
        there.commit(LTX | UNREAD)
        yield hub


def read(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def message(name: str, where: str = "model") -> str:
    with pytest.raises(UserError) as caught:
        resolve_folder(name, where=where)
    return str(caught.value)


def test_only_what_a_pipeline_needs_is_downloaded_once(
    hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wanted = {name: content for name, content in LTX.items() if "fp16" not in name}
    folder = resolve_folder("somebody/ltx", where="model")
    assert read(folder) == wanted
    assert folder.name == hub.repositories["somebody/ltx"].head
    assert capsys.readouterr().err == f"somebody/ltx: downloading 0.0 MB in 9 files into {tmp_path / 'cache'}\n"
    assert resolve_folder("somebody/ltx", where="--base") == folder
    assert capsys.readouterr().err == ""
    weights = {name: len(content) for name, content in wanted.items() if name.endswith(".safetensors")}
    assert {name: size for name, size in hub.sent.items() if name.endswith(".safetensors")} == weights


def test_plan_needs_no_weights(hub: Hub) -> None:
    found = read(fetch(HubId("somebody/ltx"), where="model", weights=False))
    assert not [name for name in found if name.endswith(".safetensors")]
    assert {"transformer/config.json", "tokenizer/spiece.model"} <= set(found)
    assert VAE not in hub.sent


def test_connection_that_breaks_goes_on_where_it_was(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 500)  # what it goes on by, else 10 MB
    hub.cut = {VAE}
    assert (resolve_folder("somebody/ltx", where="model") / VAE).read_bytes() == LTX[VAE]
    assert hub.cut == set()
    assert hub.sent[VAE] == len(LTX[VAE])  # the first half only once


def test_what_came_whole_before_a_failure_is_kept(hub: Hub) -> None:
    hub.down = {VAE}
    said = message("somebody/ltx")
    assert said.startswith(f"model: somebody/ltx: no such folder here, and the hub does not answer at {hub.url}: ")
    assert said.endswith("(check the network; files that came whole are kept)")
    hub.down = set()
    resolve_folder("somebody/ltx", where="model")
    shard = "transformer/diffusion_pytorch_model-00001-of-00002.safetensors"
    assert hub.sent[shard] == len(LTX[shard])


def test_student_comes_without_what_only_other_programs_read(hub: Hub) -> None:
    ours = {"rats.json": b"{}", "README.md": b"-", "pytorch_lora_weights.safetensors": b"l" * 9}
    hub.repositories["somebody/student"] = Repository()
    hub.repositories["somebody/student"].commit(ours | {"base/vae/config.json": b"{}", "scheduler/a.json": b"{}"})
    assert read(resolve_folder("somebody/student", where="student.init")) == ours


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (
            "somebody/nothing",
            (
                "no such folder here, and no such repository on the hub, or a private one "
                "(check the name; for a private one `hf auth login` or set HF_TOKEN)"
            ),
        ),
        ("me/private@v2", "no such folder here, and no revision v2 of it on the hub (give a branch, a tag or a whole"),
        ("somebody/private", "no such folder here, and no such repository on the hub, or a private one (check the"),
        ("somebody/empty", "neither a pipeline nor a student: no model_index.json and no rats.json in it (give a"),
        (
            "somebody/original",
            "neither a pipeline nor a student: no model_index.json and no rats.json in it, but wan.safetensors (give",
        ),
    ],
)
def test_what_is_not_there_is_one_line(hub: Hub, name: str, expected: str) -> None:
    for private in ("me/private", "somebody/private"):
        hub.repositories[private] = Repository(private=True)
        hub.repositories[private].commit(LTX)
    hub.repositories["somebody/empty"] = Repository()
    hub.repositories["somebody/original"] = Repository()
    hub.repositories["somebody/original"].commit({"wan.safetensors": b"", "config.json": b"{}"})
    assert message(name).startswith(f"model: {name}: {expected}")


def test_gated_repository_and_old_token(tmp_path: Path) -> None:
    with serving(tmp_path / "cache", token=None) as hub:
        hub.repositories["somebody/gated"] = Repository(gated=True)
        hub.repositories["somebody/gated"].commit(LTX)
        ask = f"ask for it on {hub.url}/somebody/gated, then `hf auth login` or set HF_TOKEN"
        assert message("somebody/gated") == (
            f"model: somebody/gated: no such folder here, and its authors give it only to those who ask for it ({ask})"
        )
    with serving(tmp_path / "cache", token="hf_old") as hub:
        assert "no such folder here, and the hub does not take the token (make a new" in message("somebody/gated")


def test_pickled_weights_are_not_even_downloaded(hub: Hub) -> None:
    there = {name: content for name, content in LTX.items() if "vae/diff" not in name}
    hub.repositories["somebody/old"] = Repository()
    hub.repositories["somebody/old"].commit(there | {"vae/diffusion_pytorch_model.bin": b"x"})
    assert message("somebody/old", "--base") == (
        "--base: somebody/old: vae/diffusion_pytorch_model.bin is pickled, and loading it could run code "
        "(take a repository with .safetensors files)"
    )
    assert set(hub.sent) == {"model_index.json"}


def test_disk_without_room(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 10, 0))  # type: ignore[attr-defined]
    assert message("somebody/ltx") == (
        f"model: somebody/ltx: its files are 0.0 MB, and {tmp_path / 'cache'} has 0.0 MB left "
        "(free some space, or set HF_HOME to another disk)"
    )
    assert VAE not in hub.sent


def test_without_the_hub_its_cache_serves(hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = resolve_folder("somebody/ltx", where="model")
    commit = hub.repositories["somebody/ltx"].head
    capsys.readouterr()
    with serving(tmp_path / "cache") as other, pytest.MonkeyPatch.context() as patch:
        patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        assert resolve_folder("somebody/ltx", where="model") == folder
        assert pinned("somebody/ltx", where="model") == f"somebody/ltx@{commit}"
        assert capsys.readouterr().err == ""
        assert message("somebody/other") == (
            "model: somebody/other: no such folder here, and HF_HUB_OFFLINE is set, and the hub's cache does not have "
            "it (unset it, or give a folder)"
        )
        assert other.requests == []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("huggingface_hub.constants.ENDPOINT", other.url)  # where nobody listens any more
        patch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
        assert resolve_folder(f"somebody/ltx@{commit}", where="model") == folder
        warned = f"warning: model: somebody/ltx@{commit}: the hub cannot be reached; its cache has {folder}\n"
        assert capsys.readouterr().err == warned
        assert f"no such folder here, and the hub does not answer at {other.url}: " in message("somebody/other")


def test_revision_is_kept_by_its_commit(hub: Hub) -> None:
    first = pinned("somebody/ltx", where="model")
    hub.repositories["somebody/ltx"].commit(LTX | {"README.md": b"new"})
    second = pinned("somebody/ltx@main", where="model")
    assert first != second
    assert (resolve_folder(first, where="model") / "README.md").read_bytes() == LTX["README.md"]
    assert (resolve_folder(second, where="model") / "README.md").read_bytes() == b"new"
    assert pinned(first, where="model") == first


def test_what_is_here_is_not_looked_for_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "somebody" / "ltx").mkdir(parents=True)
    (tmp_path / "runs").mkdir()
    assert resolve_folder("somebody/ltx", where="model") == Path("somebody/ltx")
    for name in (
        "somebody/ltx",
        "runs/dmeo",
        "models/LTX-Video",
        "a/b/c",
        "/a/b",
        "~/b",
        "../b",
        "a/..",
        "tiny-wan",
        "",
    ):
        assert find_hub_id(name) is None
    assert find_hub_id("somebody/ltx@main") == HubId("somebody/ltx", "main")
    assert find_hub_id("nobody/ltx") == HubId("nobody/ltx")
