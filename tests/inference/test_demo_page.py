"""The demo page, in a real browser; and its server, asked for what it should not do."""

from __future__ import annotations

import importlib.util
import json
import os
import socket
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from playwright.sync_api import Page, expect

from rats_video.assets import ASSETS
from rats_video.backbones.wan import WanBackbone
from rats_video.commands.demo import load_studio
from rats_video.config.load import load_config, write_resolved
from rats_video.datasets.shapes.render import parse_prompt, render
from rats_video.distillation.settings import DistillConfig
from rats_video.inference.demo import MAX_PICTURE, MAX_PROMPT, MAX_SEED, DemoClip, DemoModels, DemoRequest, Role
from rats_video.inference.demo_page import QUEUE, build_page, launch_page
from rats_video.inference.sampler import SamplerSpec
from rats_video.inference.student import StudentCard, save_student
from rats_video.inference.video import read_mp4, write_png
from rats_video.rewards.word import WordReward
from rats_video.seeds import seeded
from rats_video.types import ClipSpec

PROMPT = "a slow blue square moving up on a white background"
EXAMPLES = (PROMPT, "a red circle")


@dataclass(frozen=True)
class Watched(DemoModels):
    """A studio that notes what it makes, and waits while `open` is not set."""

    made: list[tuple[str, DemoRequest]] = field(default_factory=list)
    open: threading.Event = field(default_factory=threading.Event)

    def make(self, role: Role, wish: DemoRequest, advance: Callable[[], None]) -> DemoClip:
        self.made.append((role, wish))
        assert self.open.wait(60)
        return super().make(role, wish, advance)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def served(studio: DemoModels) -> Iterator[str]:
    page, port = build_page(studio, EXAMPLES, name="<i>mine</i>", teacher=True), free_port()
    launch_page(page, port, takes_pictures=studio.takes_pictures)
    yield f"http://127.0.0.1:{port}"
    page.close(verbose=False)


@pytest.fixture(scope="module")
def studio(loaded: WanBackbone, clip: ClipSpec, reward_folders: tuple[Path, Path]) -> Watched:
    reward = WordReward.load(reward_folders[0])
    return Watched(loaded, loaded, clip, 3.0, (4, 10), SamplerSpec(3, 3.0, 2.0), reward)


@pytest.fixture(scope="module")
def url(studio: Watched, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_ANALYTICS_ENABLED", "False")
        patch.setenv("GRADIO_TEMP_DIR", str(tmp_path_factory.mktemp("gradio")))
        with served(studio) as found:
            yield found


@pytest.fixture(autouse=True)
def fresh(studio: Watched) -> None:
    studio.made.clear()
    studio.open.set()


# --------------------------------------------------------------------------------------------------- in the browser


@pytest.fixture
def page(watched: Callable[..., Any], url: str) -> Iterator[Page]:
    """The page, loaded; it must not ask anybody else for anything, nor complain."""
    with watched(url, "data:", "blob:") as page:
        expect(page.get_by_role("button", name="Generate")).to_be_visible(timeout=60_000)
        yield page


def facts(page: Page, role: str) -> dict[str, str]:
    rows = page.locator(f"#{role}-card dl div").all()
    return {row.locator("dt").inner_text(): row.locator("dd").inner_text() for row in rows}


def plays(page: Page, role: str) -> bool:
    """Whether the clip has its pixels and its time goes on."""
    video = page.locator(f"#{role}-card video")
    page.wait_for_function("video => video.readyState >= 3", arg=video.element_handle())
    before = video.evaluate("video => video.currentTime")
    page.wait_for_function(
        "([video, before]) => video.currentTime != before", arg=[video.element_handle(), before], timeout=10_000
    )
    return bool(video.evaluate("video => video.videoWidth == 32 && !video.paused && !video.error"))


def test_prompt_slider_and_both_clips(page: Page, studio: Watched) -> None:
    expect(page.locator("#heading")).to_contain_text("<i>mine</i>: a few-step student, trained for 4, 10 network calls")
    page.get_by_label("Prompt").fill("a red circle")
    slider = page.get_by_role("slider")
    assert (slider.get_attribute("min"), slider.get_attribute("max")) == ("3", "10")
    slider.focus()
    page.keyboard.press("ArrowRight")
    page.get_by_label("Seed", exact=True).fill("7")
    page.get_by_role("button", name="Generate").click()
    expect(page.locator("#teacher-card video")).to_be_visible(timeout=60_000)
    assert studio.made == [(role, DemoRequest("a red circle", 5, 7)) for role in ("student", "teacher")]
    assert plays(page, "student")
    assert plays(page, "teacher")
    for role, calls in (("student", "5"), ("teacher", "6")):
        shown = facts(page, role)
        assert list(shown) == ["seconds", "network calls", "reward"]
        assert shown["network calls"] == calls
        assert float(shown["seconds"].removesuffix(" s")) > 0
        assert float(shown["reward"]) < 0
    expect(page.locator("#status")).to_contain_text("5 calls instead of 6")

    # A square clip is square, with no bars beside it.
    page.set_viewport_size({"width": 1280, "height": 700})
    box = page.locator("#student-card video").bounding_box()
    assert box is not None
    assert box["width"] == pytest.approx(box["height"], abs=1)
    assert 0.5 * 700 < box["height"] <= 0.6 * 700 + 1

    # At a phone's width everything is there, and nothing needs scrolling sideways.
    page.set_viewport_size({"width": 390, "height": 844})
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    boxes = [page.locator(f"#{role}-card video").bounding_box() for role in ("student", "teacher")]
    assert boxes[0] is not None
    assert boxes[1] is not None
    assert boxes[1]["y"] > boxes[0]["y"] + boxes[0]["height"]  # below each other
    assert boxes[0]["width"] > 300

    assert boxes[0]["y"] + boxes[0]["height"] < 844  # the student's on the first screen

    # What cannot be drawn is said, as text; the clips of another prompt go.
    bad = "a <img src=x onerror=alert(1)> zebra"
    page.get_by_label("Prompt").fill(bad)
    page.keyboard.press("Enter")
    alert = page.get_by_role("alert").filter(has_text="this model does not know")
    expect(alert).to_contain_text(f"in '{bad}'")
    expect(alert).to_be_in_viewport()
    assert alert.locator("img").count() == 0
    page.get_by_label("Prompt").fill("   ")
    page.get_by_role("button", name="Generate").click()
    expect(page.get_by_role("alert").filter(has_text="the prompt is empty")).to_be_visible()
    assert len(studio.made) == 2
    expect(page.locator("#student-card video")).to_be_hidden()


def test_keyboard_alone(page: Page, studio: Watched) -> None:
    def tab_to(what: str, **options: Any) -> None:
        for _ in range(20):
            if page.get_by_role(what, **options).evaluate("element => element == document.activeElement"):  # type: ignore[arg-type]
                return
            page.keyboard.press("Tab")
        pytest.fail(f"the keyboard does not reach {what} {options}")

    page.get_by_label("Prompt").focus()
    tab_to("button", name=EXAMPLES[1])
    page.keyboard.press("Enter")
    expect(page.get_by_label("Prompt")).to_have_value(EXAMPLES[1])
    tab_to("slider")
    page.keyboard.press("ArrowLeft")
    tab_to("checkbox", name="A new seed each time")
    page.keyboard.press("Space")
    tab_to("checkbox", name="Teacher beside student")
    page.keyboard.press("Space")
    page.get_by_label("Prompt").focus()
    page.keyboard.press("Enter")
    expect(page.locator("#student-card video")).to_be_visible(timeout=60_000)
    expect(page.locator("#teacher-card")).not_to_be_visible()
    ((role, wish),) = studio.made
    assert (role, wish.prompt, wish.nfe) == ("student", EXAMPLES[1], 3)
    expect(page.get_by_label("Seed", exact=True)).to_have_value(str(wish.seed))  # to be had again
    tab_to("button", name="Generate")


def test_a_clip_starts_from_a_picture(
    watched: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GRADIO_ANALYTICS_ENABLED", "False")
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "gradio"))
    studio = Watched(**vars(load_studio(None, torch.device("cpu"))[0]))
    studio.open.set()
    picture = render([parse_prompt(PROMPT)], studio.clip, seeded(3))[0, 0]
    write_png(picture, tmp_path / "first.png")
    (tmp_path / "no.png").write_text("no picture")
    (tmp_path / "large.png").write_bytes(bytes(MAX_PICTURE + 1))
    with served(studio) as url, watched(url, "data:", "blob:") as page:
        chooser = page.locator("#picture input")
        expect(chooser).to_be_visible(timeout=60_000)
        page.get_by_label("Teacher beside student").uncheck()
        for name, message in (("no.png", "the picture: damaged"), ("large.png", "more than 8 MiB")):
            chooser.set_input_files(tmp_path / name)
            page.get_by_role("button", name="Generate").click()
            expect(page.get_by_role("alert").filter(has_text=message)).to_be_visible(timeout=60_000)
        assert studio.made == []
        chooser.set_input_files(tmp_path / "first.png")
        expect(page.get_by_alt_text("The clip starts from this picture")).to_be_visible()
        page.get_by_role("button", name="Generate").click()
        expect(page.locator("#student-card video")).to_be_visible(timeout=60_000)
        ((role, wish),) = studio.made
        assert (role, wish.picture) == ("student", (tmp_path / "first.png").read_bytes())
        page.get_by_role("button", name="Remove").click()
        expect(page.get_by_alt_text("The clip starts from this picture")).to_be_hidden()

    def error(wish: DemoRequest) -> float:
        (tmp_path / "clip.mp4").write_bytes(studio.make("student", wish, lambda: None).mp4)
        return float((read_mp4(tmp_path / "clip.mp4")[0][0] - picture).square().mean())

    assert error(wish) < 0.004
    assert error(replace(wish, picture=None)) > 0.01


# ------------------------------------------------------------------------------------------------------ its server


def ask(url: str, path: str, body: bytes | None = None, **headers: str) -> tuple[int, bytes]:
    request = urllib.request.Request(url + path, body, {"content-type": "application/json", **headers})
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


def function(url: str) -> int:
    """Which of the page's functions Generate is."""
    config = json.loads(ask(url, "/config")[1])
    return next(each["id"] for each in config["dependencies"] if len(each["inputs"]) == 6)


def generate(url: str, session: str, *data: object) -> str:
    """What the page's server answers to values that no browser needs to have checked; "" once it is in the queue."""
    body = json.dumps({"data": data, "fn_index": function(url), "session_hash": session}).encode()
    code, answer = ask(url, "/gradio_api/queue/join", body)
    return "" if code == 200 else answer.decode()


def events(url: str, session: str) -> list[dict[str, Any]]:
    _, stream = ask(url, f"/gradio_api/queue/data?session_hash={session}")
    return [json.loads(line[6:]) for line in stream.decode().splitlines() if line.startswith("data: ")]


GOOD = (PROMPT, 4, 0, False, False, "")


@pytest.mark.parametrize(
    ("at", "value"),
    [
        (0, "a red " * MAX_PROMPT), (0, "a red circle\0"), (0, 5), (0, None), (0, ["a red circle"]), (0, ""),
        (1, 999), (1, 2), (1, 4.5), (1, "4; rm"), (1, None), (1, [4]), (1, True), (1, 1e308),
        (2, -1), (2, MAX_SEED + 1), (2, "x"), (2, None), (2, {}), (5, "data:image/png;base64,AAAA"), (5, 7),
    ],
)  # fmt: skip
def test_server_keeps_its_own_bounds(
    url: str, studio: Watched, request: pytest.FixtureRequest, at: int, value: object
) -> None:
    session = f"s{abs(hash(request.node.name))}"
    data = [*GOOD[:at], value, *GOOD[at + 1 :]]
    assert generate(url, session, *data) == ""
    last = next(event for event in events(url, session) if event["msg"] == "process_completed")
    shown = [event for event in events_output(last) if "alert" in event]
    assert shown or not last["success"]
    assert "Traceback" not in json.dumps(last)
    assert studio.made == []


def events_output(event: dict[str, Any]) -> list[str]:
    return [str(part) for part in event["output"].get("data", [])]


def test_server_accepts_what_is_within_them(url: str, studio: Watched) -> None:
    assert generate(url, "good", *GOOD) == ""
    last = next(event for event in events(url, "good") if event["msg"] == "process_completed")
    assert last["success"]
    assert studio.made == [("student", DemoRequest(PROMPT, 4, 0))]


def test_one_at_a_time_and_a_bounded_queue(url: str, studio: Watched) -> None:
    studio.open.clear()
    answers = [generate(url, f"q{i}", *GOOD) for i in range(QUEUE + 3)]
    assert "full" in answers[-1].lower()
    assert answers.count("") in {QUEUE, QUEUE + 1}  # the first may have left the queue already
    assert len(studio.made) <= 1
    studio.open.set()
    for i, answer in enumerate(answers):
        if not answer:
            assert events(url, f"q{i}")[-1]["msg"] in {"process_completed", "close_stream"}
    assert len(studio.made) == answers.count("")


@pytest.mark.parametrize(
    ("path", "body", "headers"),
    [
        ("/gradio_api/file=/etc/passwd", None, {}),
        ("/file=/etc/passwd", None, {}),
        ("/assets/../../../../../../etc/passwd", None, {}),
        ("/static/%2e%2e/%2e%2e/%2e%2e/%2e%2e/%2e%2e/%2e%2e/etc/passwd", None, {}),
        ("/gradio_api/proxy=http://example.com", None, {}),
        ("/gradio_api/upload", b"--x\r\n", {"content-type": "multipart/form-data; boundary=x"}),
        ("/gradio_api/info", None, {}),
        ("/gradio_api/openapi.json", None, {}),
        ("/openapi.json", None, {}),
        ("/docs", None, {}),
        ("/monitoring", None, {}),
        ("/gradio_api/run/predict", b"{}", {}),
        ("/gradio_api/call/generate", b"{}", {}),
        ("/gradio_api/vibe-edit", b"{}", {}),
        ("/gradio_api/queue/join", b" " * 70_000, {}),
        ("/", None, {"host": "evil.example"}),
        ("/", None, {"origin": "http://evil.example"}),
        ("/gradio_api/queue/join", b"{}", {"origin": "http://evil.example"}),
        ("/gradio_api/queue/join", b"{}", {"origin": "null"}),
    ],
)
def test_nothing_else_is_served(url: str, path: str, body: bytes | None, headers: dict[str, str]) -> None:
    assert ask(url, path, body, **headers) == (404, b"not served\n")


def test_only_this_machine_is_listened_to(url: str) -> None:
    port = int(url.rpartition(":")[2])
    listening = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    assert [each[1] for each in listening if each[1].endswith(f":{port:04X}") and each[3] == "0A"] == [
        f"0100007F:{port:04X}"
    ]
    assert not any(f":{port:04X} " in line for line in Path("/proc/net/tcp6").read_text().splitlines())


# ----------------------------------------------------------------------------------------------------- the command


@pytest.fixture
def student(backbone: WanBackbone, tiny_wan: Path, tmp_path: Path) -> Path:
    size = {"num_frames": 5.0, "height": 32.0, "width": 32.0, "fps": 8.0}
    save_student(backbone, StudentCard(str(tiny_wan), (4,), 3.0, size, steps=1, seed=0), tmp_path / "student")
    return tmp_path / "student"


def test_ctrl_c_ends_it_with_one_line(
    command: Callable[..., Any], student: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    port, seen = free_port(), dict[str, Any]()
    for name in ("GRADIO_ANALYTICS_ENABLED", "GRADIO_TEMP_DIR"):
        monkeypatch.setenv(name, "")  # to be as before

    def visited() -> None:
        seen["folder"] = Path(os.environ["GRADIO_TEMP_DIR"])
        seen["page"] = ask(f"http://127.0.0.1:{port}", "/")
        raise KeyboardInterrupt

    monkeypatch.setattr("rats_video.commands.demo.signal.pause", visited)
    code, out, err = command("demo", student, "--port", port, "--device", "cpu")
    assert out == f"http://127.0.0.1:{port} (this machine only; Ctrl-C ends it)\n"
    assert (code, err.splitlines()[-1]) == (130, "the page is closed")
    assert seen["page"][0] == 200
    assert not seen["folder"].exists()
    with pytest.raises(urllib.error.URLError):
        ask(f"http://127.0.0.1:{port}", "/")


def test_port_that_is_taken_and_missing_gradio(
    command: Callable[..., Any], student: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        code, _, err = command("demo", student, "--port", port, "--device", "cpu")
    assert (code, err.splitlines()[-1]) == (2, f"error: --port: cannot listen on port {port} (give another)")
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    code, _, err = command("demo", student)
    assert (code, err) == (2, "error: the page needs gradio, which is not here (pip install 'rats-video[demo]')\n")


def test_embedded_student_has_its_reward_and_teacher() -> None:
    studio, examples = load_studio(None, torch.device("cpu"))
    assert isinstance(studio.reward, WordReward)
    assert (studio.trained, studio.teacher.nfe, studio.nfe_range) == ((2, 4), 100, (2, 8))
    assert all(studio.accept(prompt, 4, 0).prompt == prompt for prompt in examples)


def test_a_run_brings_its_settings(student: Path, config_file: Path) -> None:
    write_resolved(
        load_config(DistillConfig, str(config_file), group="distill"), student.parent / "config.resolved.yaml"
    )
    studio, examples = load_studio(student.parent, torch.device("cpu"))
    assert isinstance(studio.reward, WordReward)
    assert (studio.teacher.nfe, len(examples)) == (8, 4)
    given, _ = load_studio(student, torch.device("cpu"))  # by the path of what the run made
    assert isinstance(given.reward, WordReward)
    assert given.teacher.nfe == 8
    (student.parent / "config.resolved.yaml").unlink()
    alone, _ = load_studio(student, torch.device("cpu"))
    assert (alone.reward, alone.teacher.nfe) == (None, 100)


def test_embedded_student_by_its_path_is_the_same_student() -> None:
    studio, _ = load_studio(ASSETS / "tiny-wan-student", torch.device("cpu"))
    assert isinstance(studio.reward, WordReward)
    assert studio.teacher.nfe == 100
