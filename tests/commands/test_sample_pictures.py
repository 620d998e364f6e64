"""`sample` from pictures: what the clips start from, and every way in which a picture can be wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from shared import made_once
from wan22_family import build
from wan_i2v_family import build_image_pipeline

from rats_video.commands.students import SampleChoices, load_chosen
from rats_video.datasets.video.pictures import find_picture, read_picture
from rats_video.errors import UserError
from rats_video.inference.sampler import clip_noise, sample_batch
from rats_video.inference.video import write_mp4
from rats_video.types import ClipSpec

pytestmark = pytest.mark.pipeline

Command = Callable[..., Any]
CLIP = ClipSpec(num_frames=9, height=32, width=64, fps=16.0)
SIZE = ("--num-frames", 9, "--height", 32, "--width", 64, "--nfe", 4, "--device", "cpu")
PROMPT = "a fast red circle"
ALONE = "error: --image: this Wan makes videos from text alone (leave the picture out)"


@pytest.fixture(scope="module")
def ti2v(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made_once(tmp_path_factory, "i2v-wan22-5b", partial(build, experts=False))


@pytest.fixture(scope="module")
def a14b(tmp_path_factory: pytest.TempPathFactory) -> Path:
    make = partial(build_image_pipeline, clip_sees=0, experts=True)
    return made_once(tmp_path_factory, "i2v-wan22-a14b", make)


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for seed, name in enumerate(("a.png", "b.png")):
        pixels = np.random.default_rng(seed).integers(0, 256, (40, 100, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / name)
    return folder


def clips_of(folder: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((folder / "manifest.json").read_text())
    return found


def test_a_clip_is_that_of_its_picture(command: Command, ti2v: Path, pictures: Path, tmp_path: Path) -> None:
    options = (*SIZE, "--prompt", PROMPT, "--output", tmp_path / "o")
    done = command("sample", "--model", ti2v, "--image", pictures / "a.png", *options)
    assert done.code == 0, done.err
    [clip] = clips_of(tmp_path / "o")
    size = {"num_frames": CLIP.num_frames, "height": CLIP.height, "width": CLIP.width}
    loaded = load_chosen(ti2v, torch.device("cpu"), SampleChoices(size=size))
    backbone, spec = loaded.student, loaded.spec(4)
    given = backbone.given_frames(CLIP, read_picture(pictures / "a.png", CLIP, where="")[None])
    expected, _ = sample_batch(backbone, [PROMPT], clip_noise(backbone, CLIP, 0, 0), spec, given=given)
    write_mp4(expected[0], tmp_path / "expected.mp4", fps=loaded.clip.fps)
    assert (tmp_path / "o" / clip["file"]).read_bytes() == (tmp_path / "expected.mp4").read_bytes()
    again = command("sample", "--model", ti2v, "--image", pictures / "b.png", *options)
    assert again.code == 2
    assert "holds clip 0 of another image" in again.err


def test_a_list_names_pictures_and_the_wrong_ones_alone_are_left_out(
    command: Command, ti2v: Path, pictures: Path, tmp_path: Path
) -> None:
    (tmp_path / "secret.png").write_bytes((pictures / "a.png").read_bytes())
    (pictures / "link.png").symlink_to(tmp_path / "secret.png")
    (pictures / "cut.png").write_bytes((pictures / "a.png").read_bytes()[:900])
    wrong = {
        "gone.png": f"no such picture: {pictures / 'gone.png'}",
        "cut.png": f"{pictures / 'cut.png'}: damaged",
        "../secret.png": "'../secret.png' lies outside the folder of the list (copy it beside the list)",
        "link.png": "'link.png' lies outside the folder of the list",
        "http://x.y/a.png": "'http://x.y/a.png' is a URL (download it beside the list, and name the file)",
    }
    rows = [{"prompt": PROMPT, "image": name} for name in ("a.png", *wrong, "b.png")] + [{"prompt": PROMPT}]
    (pictures / "list.jsonl").write_text("\n".join(map(json.dumps, rows)))
    output = tmp_path / "o"
    done = command("sample", "--model", ti2v, "--prompts", pictures / "list.jsonl", *SIZE, "--output", output)
    assert done.code == 2
    for row, (name, message) in enumerate(wrong.items(), 2):
        assert f"warning: {pictures / 'list.jsonl'}, row {row}: image: {message}" in done.err, name
    assert f"error: {pictures / 'list.jsonl'}: 5 rows were left out" in done.err
    assert [clip["index"] for clip in clips_of(output)] == [0, 6, 7]
    assert ["image" in clip for clip in clips_of(output)] == [True, True, False]
    assert len({clip.get("image") for clip in clips_of(output)}) == 3


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        ("a14b", (), "error: --image: this Wan makes videos from a picture, and none is given (name a picture)\n"),
        ("tiny", ("--image", "a.png"), f"{ALONE}\n"),
        ("ti2v", ("--last-image", "a.png"), "error: --last-image: a last picture needs a first one\n"),
        (
            "ti2v", ("--image", "a.png", "--last-image", "b.png"),
            "error: --last-image: this Wan takes a first picture alone (leave it out)\n",
        ),
        ("ti2v", ("--image", "gone.png"), "error: --image: no such picture: gone.png\n"),
    ],
)  # fmt: skip
def test_what_the_command_line_gets_wrong_is_one_line(
    command: Command,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
    pictures: Path,
    model: str,
    options: tuple[str, ...],
    message: str,
) -> None:
    monkeypatch.chdir(pictures)
    folder = request.getfixturevalue({"tiny": "tiny_wan"}.get(model, model))
    size = ("--num-frames", 9, "--height", 32, "--width", 32) if model == "tiny" else SIZE
    prompt = "a fast red circle moving left on a gray background" if model == "tiny" else PROMPT
    done = command("sample", "--model", folder, "--prompt", prompt, *size, *options, "--output", "o")
    assert (done.code, done.err) == (2, message)
    assert not Path("o").exists()


def test_from_first_to_last(command: Command, a14b: Path, pictures: Path, tmp_path: Path) -> None:
    both = ("--image", pictures / "a.png", "--last-image", pictures / "b.png")
    done = command("sample", "--model", a14b, "--prompt", PROMPT, *SIZE, *both, "--output", tmp_path / "o")
    assert done.code == 0, done.err
    [clip] = clips_of(tmp_path / "o")
    assert {"image", "last_image"} <= clip.keys()


def test_a_picture_covers_the_clip_and_loses_equal_parts(tmp_path: Path) -> None:
    pixels = np.zeros((64, 256, 3), np.uint8)
    pixels[:, 64:192] = 255  # the middle half, which is what a clip of 1 : 2 sees
    Image.fromarray(pixels).save(tmp_path / "a.png")
    seen = read_picture(tmp_path / "a.png", CLIP, where="")
    assert seen.shape == (3, 32, 64)
    assert torch.equal(seen, torch.ones(3, 32, 64))


def test_a_name_stays_in_its_folder(tmp_path: Path) -> None:
    assert find_picture("b/../a.png", tmp_path, where="") == tmp_path.resolve() / "a.png"
    for name in ("../a.png", "/etc/passwd", "b/../../a.png"):
        with pytest.raises(UserError, match="lies outside the folder of the list"):
            find_picture(name, tmp_path, where="here")
