"""The server of the rating page, for browsers of this machine: the page, clips under names that tell nothing, votes."""

from __future__ import annotations

import json
import re
import sys
import threading
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from pydantic import ValidationError

from rats_video.config.explain import first_mistake
from rats_video.config.fields import Config
from rats_video.errors import UserError, first_line
from rats_video.rating.page import rating_page
from rats_video.rating.raters import Progress, Raters
from rats_video.rating.record import Choice
from rats_video.rating.votes import Person
from rats_video.web import is_of_this_machine

HOST = "127.0.0.1"
MOST_BODY = 4096  # bytes
_CLIP = re.compile(r"/clip/([0-9a-f]{16})/([12])")
_HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "frame-ancestors 'none'; base-uri 'none'; form-action 'none'",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


class _Who(Config):
    person: Person


class _Ballot(_Who):
    trial: str
    choice: Choice


class RatingServer(ThreadingHTTPServer):
    """Serves a rating on this machine alone, in threads of its own, until `close`.

    Args:
        raters: who vote.
        port: to listen on; 0 for any.

    Raises:
        UserError: the port is taken.
    """

    daemon_threads = True
    allow_reuse_address = True  # of a server that was just ended

    def __init__(self, raters: Raters, port: int) -> None:
        self.raters, self.page = raters, rating_page().encode()
        try:
            super().__init__((HOST, port), _Handler)
        except OSError as error:
            raise UserError(f"cannot listen on port {port}", where="--port", fix="give another") from error
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        """The address of the page."""
        return f"http://{HOST}:{self.server_port}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing of a browser that hung up, as it does where a person goes on before a clip has come."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)

    def close(self) -> None:
        """Stop listening."""
        self.shutdown()
        self.server_close()


class _Handler(BaseHTTPRequestHandler):
    server: RatingServer
    timeout = 30  # seconds: whoever says nothing is not waited for

    def log_message(self, *_: object) -> None:
        """Say nothing: the terminal shows what the user needs."""

    def version_string(self) -> str:
        """Tell nothing of versions."""
        return "rats-video"

    def do_GET(self) -> None:
        """The page, or a clip of a trial that was handed out."""
        if not self._is_ours():
            self._refuse()
        elif self.path == "/":
            self._answer(200, "text/html; charset=utf-8", self.server.page)
        elif (clip := _CLIP.fullmatch(self.path)) and (path := self.server.raters.clip(clip[1], int(clip[2]) - 1)):
            try:
                self._answer(200, "image/png" if path.suffix == ".png" else "video/mp4", path.read_bytes())
            except OSError as error:
                self._say(500, {"error": f"cannot read a clip: {error.strerror}"})
        else:
            self._refuse()

    def do_POST(self) -> None:
        """Where a person stands, after a vote, an undo, or nothing."""
        actions = {"/next": self._next, "/vote": self._vote, "/undo": self._undo}
        length = self.headers.get("content-length", "")
        is_small = length.isdecimal() and int(length) <= MOST_BODY
        is_json = self.headers.get("content-type") == "application/json"  # no form of another site can say so
        if not (self._is_ours() and self.path in actions and is_small and is_json):
            self._refuse()
            return
        try:
            progress = actions[self.path](self.rfile.read(int(length)))
            self._say(200, _shown(progress, has_sound=self.server.raters.has_sound))
        except ValidationError as error:
            self._say(400, {"error": first_mistake(error)})
        except KeyError:
            self._say(409, {"error": "this rating has no such pair: load the page again"})
        except OSError as error:
            self._say(507, {"error": f"the vote was not saved: {error.strerror or first_line(error)}"})

    def _next(self, body: bytes) -> Progress:
        return self.server.raters.progress(_Who.model_validate_json(body).person)

    def _vote(self, body: bytes) -> Progress:
        ballot = _Ballot.model_validate_json(body)
        return self.server.raters.vote(ballot.person, ballot.trial, ballot.choice)

    def _undo(self, body: bytes) -> Progress:
        return self.server.raters.undo(_Who.model_validate_json(body).person)

    def _is_ours(self) -> bool:
        """True for a request of our own page: under a name of this machine, and from no other site."""
        host, origin = self.headers.get("host", ""), self.headers.get("origin")
        return is_of_this_machine(host, origin) and self.headers.get("sec-fetch-site", "none") in {
            "same-origin",
            "none",
        }

    def _refuse(self) -> None:
        self._answer(404, "text/plain", b"not served\n")

    def _say(self, code: int, content: Mapping[str, Any]) -> None:
        self._answer(code, "application/json", json.dumps(content).encode())

    def _answer(self, code: int, kind: str, body: bytes) -> None:
        self.send_response(code)
        for name, value in {**_HEADERS, "Content-Type": kind, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)


def _shown(progress: Progress, *, has_sound: bool) -> dict[str, Any]:
    """What the page may know: no arm, no file, not whether it is a check."""
    trial = progress.trial
    shown = None if trial is None else {"name": trial.name, "prompt": trial.pair.prompt}
    return {"trial": shown, "done": progress.done, "total": progress.total, "sound": has_sound}
