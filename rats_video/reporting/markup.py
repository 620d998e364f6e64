"""HTML and SVG as trees: text and attributes are escaped when a tree is written, and nowhere else."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from xml.etree.ElementTree import Element, tostring

from rats_video.errors import printable

Child = Element | str | None
DASH = "–"  # noqa: RUF001
MOST_SHOWN = 2000  # characters of one value


def tag(name: str, /, *children: Child, **attributes: str | float | None) -> Element:
    """An element; children and attributes that are None are skipped.

    Args:
        name: of the element.
        children: elements, and text as people read it.
        attributes: `class_` is class, `data_x` is data-x; a number is written short.
    """
    element = Element(name)
    for key, value in attributes.items():
        if value is not None:
            text = value if isinstance(value, str) else short(value)
            element.set(key.rstrip("_").replace("_", "-"), printable(text))
    last: Element | None = None
    for child in children:
        if isinstance(child, Element):
            element.append(child)
            last = child
        elif child is not None and last is None:
            element.text = (element.text or "") + printable(child)
        elif child is not None and last is not None:
            last.tail = (last.tail or "") + printable(child)
    return element


def write_html(root: Element) -> str:
    """The tree as HTML."""
    return "<!DOCTYPE html>\n" + tostring(root, encoding="unicode", method="html") + "\n"


def table(head: Sequence[Child], rows: Iterable[Sequence[Child]], *, label: str, class_: str | None = None) -> Element:
    """A table that scrolls sideways in a box of its own, also by keyboard; the first cell of a row is its heading.

    Cells are text, or `td` elements as they are.
    """
    body = [tag("tr", *(_cell(cell, "th" if index == 0 else "td") for index, cell in enumerate(row))) for row in rows]
    titles = [cell if _is_cell(cell) else tag("th", cell, scope="col") for cell in head]
    return tag(
        "div",
        tag("table", tag("thead", tag("tr", *titles)), tag("tbody", *body), class_=class_),
        class_="scroll", role="region", aria_label=label, tabindex="0",
    )  # fmt: skip


def details(summary: str, *children: Child) -> Element:
    """Content that is folded away until asked for."""
    return tag("details", tag("summary", summary), *children)


def unknown(why: str) -> Element:
    """A dash for an unknown value, with the reason."""
    return tag("td", tag("span", DASH, title=why, aria_label=f"unknown: {why}", role="img"))


def short(value: float) -> str:
    """A number in four digits, e.g. "0.1234", "12340", "1.2e-05"."""
    if not math.isfinite(value):
        return DASH
    text = f"{value:.4g}"
    return f"{value:.0f}" if "e+" in text and abs(value) < 1e15 else "0" if text == "-0" else text


def cut(text: str, most: int = MOST_SHOWN) -> str:
    """The text, cut to `most` characters."""
    return text if len(text) <= most else text[:most] + "…"


def _is_cell(child: Child) -> bool:
    return isinstance(child, Element) and child.tag in {"td", "th"}


def _cell(child: Child, name: str) -> Element:
    if isinstance(child, Element) and child.tag in {"td", "th"}:
        return child
    return tag(name, child, scope="row" if name == "th" else None)
