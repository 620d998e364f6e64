"""Guards the demo's server: it answers this machine's browser, the routes of the page, and small requests."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from rats_video.web import is_of_this_machine

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

# Gradio brings some sixty more: uploads, files, proxies, an editor. What is not served needs no guarding.
_READ = re.compile(
    r"/|/config|/(gradio_api/)?theme\.css|/(assets|static|svelte)/[\w./-]+|/favicon\.ico|/robots\.txt"
    r"|/gradio_api/(app_id|startup-events|queue/data|heartbeat/\w{1,64})"
)
_WRITE = re.compile(r"/gradio_api/queue/join/?")
MAX_BODY = 2**16  # bytes of a request without a picture
_CONTENT = (  # eval: Gradio turns the templates of its HTML component into functions
    "default-src 'none'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data:; font-src 'self' data:; media-src data:; connect-src 'self'; base-uri 'self'; "
    "form-action 'none'; frame-ancestors 'none'"
)
_HEADERS = {
    "content-security-policy": _CONTENT,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
}


class PageGuard:
    """ASGI middleware: refuses all but the page's own requests, and tells the browser to load nothing from elsewhere.

    A Host that is not this machine is refused, so that no site can reach the page under a name of its own.

    Args:
        app: the page's server.
        max_body: bytes of a request.
    """

    def __init__(self, app: ASGIApp, max_body: int = MAX_BODY) -> None:
        self._app, self._max_body = app, max_body

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or answer that it is not served."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http" or not _is_ours(scope, self._max_body):
            from starlette.responses import PlainTextResponse

            await PlainTextResponse("not served\n", 404)(scope, receive, send)
            return

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                extra = [(name.encode(), value.encode()) for name, value in _HEADERS.items()]
                message = {**message, "headers": [*message["headers"], *extra]}
            await send(message)

        await self._app(scope, receive, with_headers)


def _is_ours(scope: Scope, max_body: int) -> bool:
    headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
    if not is_of_this_machine(headers.get("host", ""), headers.get("origin")):
        return False
    if scope["method"] in {"GET", "HEAD"}:
        return _READ.fullmatch(scope["path"]) is not None and ".." not in scope["path"]
    length = headers.get("content-length", "")
    return (
        scope["method"] == "POST"
        and _WRITE.fullmatch(scope["path"]) is not None
        and length.isdecimal()  # a body without its length could be endless
        and int(length) <= max_body
    )
