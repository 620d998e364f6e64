"""What every page that we write needs: text of strangers as text, and our own code named by its digest."""

from __future__ import annotations

import base64
import hashlib
from html import escape

from rats_video.errors import printable


def as_text(text: str) -> str:
    """Text of strangers, as text."""
    return escape(printable(text))


def policy_source(code: str) -> str:
    """The source of a Content-Security-Policy that lets this script or style in, and no other."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(code.encode()).digest()).decode()}'"
