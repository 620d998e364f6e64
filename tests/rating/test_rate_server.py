"""The rating page's server, asked for what it should not do."""

from __future__ import annotations

import http.client
import json
import socket
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from ratings import rating_of

from rats_video.errors import UserError
from rats_video.rating.raters import Raters
from rats_video.rating.record import Rating
from rats_video.rating.server import MOST_BODY, RatingServer
from rats_video.rating.votes import VOTES

Served = tuple[RatingServer, Rating, Path]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    rating, folder = rating_of(tmp_path_factory.mktemp("rating"), {"secret-arm": 0.2, "other-arm": 0.5})
    with closing(RatingServer(Raters(rating, folder), 0)) as server:
        yield server, rating, folder


def ask(server: RatingServer, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, bytes]:
    data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
    kind = {} if body is None else {"content-type": "application/json"}
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=10)
    with closing(connection):
        connection.request(method, path, data, kind | {name.replace("_", "-"): each for name, each in headers.items()})
        answer = connection.getresponse()
        return answer.status, answer.read()


def test_nothing_is_said_of_a_browser_that_hung_up(served: Served, capsys: pytest.CaptureFixture[str]) -> None:
    for error, said in ((BrokenPipeError(), False), (ConnectionResetError(), False), (ValueError("odd"), True)):
        try:
            raise error
        except type(error):
            served[0].handle_error(None, ("127.0.0.1", 1))
        assert bool(capsys.readouterr().err) == said


def state(answer: tuple[int, bytes]) -> Any:
    assert answer[0] == 200, answer
    return json.loads(answer[1])


def test_what_the_page_is_told_tells_nothing(served: Served) -> None:
    server, rating, folder = served
    assert server.server_address[0] == "127.0.0.1"
    code, page = ask(server, "GET", "/")
    assert code == 200
    shown = ask(server, "POST", "/next", {"person": "ann"})
    assert state(shown)["total"] == 8
    assert set(state(shown)["trial"]) == {"name", "prompt"}
    for text in (page, shown[1]):
        assert not any(word in text for word in (b"secret", b"other-arm", b"nfe4", b"checks", str(folder).encode()))
    trial = state(shown)["trial"]["name"]
    sides = [ask(server, "GET", f"/clip/{trial}/{side}")[1] for side in (1, 2)]
    pair = next(pair for pair in (*rating.pairs, *rating.checks) if pair.prompt == state(shown)["trial"]["prompt"])
    assert all(side[4:8] == b"ftyp" for side in sides)
    assert {bytes(side) for side in sides} & {(folder / file).read_bytes() for file in pair.key}


@pytest.mark.parametrize(
    "path",
    [
        "/rating.json", "/votes.jsonl", "/clips/one/000.mp4", "/clip/../rating.json", "/clip/%2e%2e/1", "//etc/passwd",
        "/../../../etc/passwd", "/clip/0123456789abcdef/1", "/clip/0123456789abcdef/3", "/?x", "/next", "file:///etc/passwd",
        "http://127.0.0.1/", "/favicon.ico",
    ],
)  # fmt: skip
def test_nothing_else_is_read(served: Served, path: str) -> None:
    assert ask(served[0], "GET", path) == (404, b"not served\n")


@pytest.mark.parametrize(
    "headers",
    [
        {"host": "evil.example"},
        {"host": "evil.example:80", "origin": "http://evil.example:80"},
        {"origin": "http://evil.example"},
        {"origin": "null"},
        {"sec_fetch_site": "cross-site"},
        {"sec_fetch_site": "same-site"},
        {"content_type": "text/plain"},
        {"content_type": "application/x-www-form-urlencoded"},
    ],
)
def test_other_sites_are_refused(served: Served, headers: dict[str, str]) -> None:
    server, _, folder = served
    before = (folder / VOTES).read_bytes() if (folder / VOTES).exists() else b""
    trial = state(ask(server, "POST", "/next", {"person": "ann"}))["trial"]["name"]
    ballot = {"person": "ann", "trial": trial, "choice": "left"}
    assert ask(server, "POST", "/vote", ballot, **headers)[0] == 404
    assert ((folder / VOTES).read_bytes() if (folder / VOTES).exists() else b"") == before
    if "content_type" not in headers:
        assert ask(server, "GET", "/", **headers)[0] == 404
        assert ask(server, "GET", f"/clip/{trial}/1", **headers)[0] == 404


def test_our_own_page_is_not(served: Served) -> None:
    server = served[0]
    for host in (f"127.0.0.1:{server.server_port}", "localhost:9000"):  # a tunnel has a port of its own
        headers = {"host": host, "origin": f"http://{host}", "sec_fetch_site": "same-origin"}
        assert ask(server, "POST", "/next", {"person": "ann"}, **headers)[0] == 200


@pytest.mark.parametrize(
    ("body", "code"),
    [
        ({"person": ""}, 400), ({"person": " ann"}, 400), ({"person": "a" * 41}, 400), ({"person": 5}, 400),
        ({"person": "ann\u202e"}, 400), ({"person": ["ann"]}, 400), ({}, 400), ({"person": "ann", "more": 1}, 400),
        (b"{", 400), (b"\xff", 400), (b"[" * MOST_BODY, 400), (b" " * (MOST_BODY + 1), 404),
    ],
)  # fmt: skip
def test_bodies_within_bounds(served: Served, body: Any, code: int) -> None:
    got, answer = ask(served[0], "POST", "/next", body)
    assert got == code
    assert b"Traceback" not in answer


def test_ballots_within_bounds(served: Served) -> None:
    server, _, folder = served
    trial = state(ask(server, "POST", "/next", {"person": "eve"}))["trial"]["name"]
    for choice in ("up", None, 1, ""):
        assert ask(server, "POST", "/vote", {"person": "eve", "trial": trial, "choice": choice})[0] == 400
    assert ask(server, "POST", "/vote", {"person": "eve", "trial": "x", "choice": "left"})[0] == 409
    assert ask(server, "POST", "/vote", {"person": "bob", "trial": trial, "choice": "left"})[0] == 409  # eve's own
    assert not (folder / VOTES).exists() or b"eve" not in (folder / VOTES).read_bytes()
    for method in ("PUT", "DELETE", "OPTIONS", "TRACE"):
        assert ask(server, method, "/vote", {"person": "eve"})[0] == 501


def test_who_says_nothing_holds_nobody_up(served: Served) -> None:
    server = served[0]
    with socket.create_connection(("127.0.0.1", server.server_port)) as silent:
        silent.sendall(b"POST /vote HTTP/1.1\r\nHost: localhost\r\n")
        assert ask(server, "GET", "/")[0] == 200


def test_a_port_that_is_taken(served: Served) -> None:
    server, rating, folder = served
    with pytest.raises(UserError, match=f"--port: cannot listen on port {server.server_port}"):
        RatingServer(Raters(rating, folder), server.server_port)
