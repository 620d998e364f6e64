"""Markdown tables whose cells may hold anything."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence


def table(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table; a bar in a cell is none of its own, in code neither, where a backslash would show."""
    lines = [titles, ["---"] * len(titles), *([_cell(cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(text: str) -> str:
    code = re.sub(r"`([^`]*\|[^`]*)`", r"<code>\1</code>", text)
    return code.replace("|", "&#124;")
