"""The pages that we write: strangers' text is escaped, and only our own script runs, known by its digest."""

from __future__ import annotations

import base64
import hashlib
from html import escape

from rats_video.errors import printable

COLORS = """
:root { color-scheme: light dark; --line: #8884; --dim: #64748b; }
@media (prefers-color-scheme: dark) { :root { --dim: #94a3b8; } }
"""


def small_page(title: str, css: str, body: str, script: str, media: str) -> str:
    """A page in one file that loads nothing but its media, from the sources that the policy `media` names."""
    return f"""<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
  content="default-src 'none'; {media}; style-src 'unsafe-inline'; script-src {policy_source(script)}">
<title>{title}</title>
<style>{css}</style>
{body}
<script>{script}</script>
</html>
"""


def is_of_this_machine(host: str, origin: str | None) -> bool:
    """True for a request under a name of this machine, and from no other site.

    Args:
        host: its header; a site could reach us under a name of its own.
        origin: its header, where the browser sends one.
    """
    return host.partition(":")[0] in {"127.0.0.1", "localhost"} and origin in {None, f"http://{host}"}


def as_text(text: str) -> str:
    """A stranger's text, escaped."""
    return escape(printable(text))


def policy_source(code: str) -> str:
    """The source of a Content-Security-Policy that lets this script or style in, and no other."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(code.encode()).digest()).decode()}'"
