"""The same prompt and noise through several samplers, side by side, each under a label of what it cost."""

from __future__ import annotations

import math
import unicodedata
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from rats_video.inference.panel import SEPARATOR, Panel

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from PIL.ImageDraw import ImageDraw
    from PIL.ImageFont import FreeTypeFont, ImageFont
    from torch import Tensor

_BACKGROUND = (15, 18, 23)
_LABEL_BAR = (27, 32, 40)
_TITLE_INK = (245, 247, 250)
_STATS_INK = (184, 194, 207)
_PROMPT_INK = (214, 220, 228)

_MIN_TEXT = 11  # pixels: smaller is unreadable on a README page, so text wraps or is cut instead
_MIN_NUMBER = 6
_OVERSAMPLE = 4  # small text drawn large and averaged down keeps the font's own letter spacing
_ELLIPSIS = "…"
# Pillow's bundled font draws a box for anything outside ASCII and these.
_DRAWABLE = frozenset("©«°±´·»‘’“”…‹›™")  # noqa: RUF001
_LOOKALIKES = str.maketrans({"–": "-", "—": "-", "−": "-", "×": "x", "→": ">", "\n": " ", "\t": " "})  # noqa: RUF001


@dataclass(frozen=True)
class _Layout:
    """Every length in pixels, and the text already fitted to it."""

    scale: int
    panel: tuple[int, int]  # height, width after upscaling
    gap: int
    pad: int
    prompt_bar: int
    title_size: int
    stats_size: int
    stats: tuple[tuple[str, ...], ...]  # lines, a panel

    @property
    def title_pitch(self) -> int:
        """Height of the title's line."""
        return round(self.title_size * 1.3)

    @property
    def stats_pitch(self) -> int:
        """Height of a line of stats."""
        return round(self.stats_size * 1.4)

    @property
    def label_bar(self) -> int:
        """Height of the bar above each panel: the same for all, so that the clips line up."""
        return self.title_pitch + self.stats_pitch * max(map(len, self.stats)) + 2 * self.pad

    def left(self, index: int) -> int:
        """The first column of a panel."""
        return self.gap + index * (self.panel[1] + self.gap)

    @property
    def top(self) -> int:
        """The first row of every panel's pixels."""
        return self.prompt_bar + self.label_bar

    def canvas(self, count: int) -> tuple[int, int]:
        """Height and width of the whole, rounded up to even as video needs."""
        height, width = self.top + self.panel[0] + self.gap, self.left(count)
        return height + height % 2, width + width % 2


def compose_comparison(panels: Sequence[Panel], *, prompt: str, min_height: int = 256) -> Tensor:
    """Lay clips side by side under their labels, with the prompt across the top.

    Small clips are enlarged by a whole factor without smoothing, so a pixel shown is a pixel the model drew.

    Args:
        panels: one or more clips of the same shape.
        prompt: the text all of them were given; cut with an ellipsis where it does not fit.
        min_height: clips lower than this are enlarged until they reach it, in pixels.

    Returns:
        `[T, 3, H', W']` in [0, 1], float32 on the CPU; `H'` and `W'` are even.

    Raises:
        ValueError: there is no panel, or the clips differ in shape or are not `[T, 3, H, W]`.
    """
    if not panels:
        raise ValueError("a comparison needs at least one panel")
    shapes = {tuple(panel.frames.shape) for panel in panels}
    shape = shapes.pop()
    if shapes or len(shape) != 4 or shape[1] != 3 or 0 in shape:
        raise ValueError(f"panels must share one shape [T, 3, H, W], got {[list(p.frames.shape) for p in panels]}")
    layout = _plan(panels, height=shape[2], width=shape[3], min_height=min_height)
    # The labels never change: draw them once, repeat them over time, and lay the clips in.
    canvas = _draw_labels(panels, prompt, layout).expand(shape[0], -1, -1, -1).clone()
    height, width = layout.panel
    for index, panel in enumerate(panels):
        frames = panel.frames.detach().to("cpu", torch.float32)
        enlarged = frames.repeat_interleave(layout.scale, dim=2).repeat_interleave(layout.scale, dim=3)
        left = layout.left(index)
        canvas[:, :, layout.top : layout.top + height, left : left + width] = enlarged
    return canvas


def panel_boxes(panels: Sequence[Panel], *, min_height: int = 256) -> list[tuple[int, int, int, int]]:
    """The place of each clip in `compose_comparison`: left, top, width and height in pixels."""
    height, width = panels[0].frames.shape[2:]
    layout = _plan(panels, height=height, width=width, min_height=min_height)
    return [(layout.left(index), layout.top, layout.panel[1], layout.panel[0]) for index in range(len(panels))]


def _plan(panels: Sequence[Panel], *, height: int, width: int, min_height: int) -> _Layout:
    """Choose sizes for the panels' width, the same for all of them so that the labels line up."""
    scale = max(1, math.ceil(min_height / height))
    height, width = height * scale, width * scale
    title_size = min(max(round(width * 0.06), 16), 30)
    pad = max(8, title_size // 2)
    stats_size, stats = _fit_stats([panel.stats for panel in panels], width - 2 * pad, round(title_size * 0.8))
    return _Layout(
        scale=scale,
        panel=(height, width),
        gap=max(4, title_size // 4),
        pad=pad,
        prompt_bar=round(title_size * 2.2),
        title_size=title_size,
        stats_size=stats_size,
        stats=stats,
    )


def _fit_stats(texts: Sequence[str], width: int, size: int) -> tuple[int, tuple[tuple[str, ...], ...]]:
    """The font size and lines that fit `width` for every panel: one line if a readable size allows, else more."""
    parts = [text.split(SEPARATOR) for text in texts]
    most = max(map(len, parts))
    for per_line in (most, (most + 1) // 2, 1):  # one line, two balanced ones, a column
        lines = tuple(
            tuple(SEPARATOR.join(part[i : i + per_line]) for i in range(0, len(part), per_line)) for part in parts
        )
        # A cut number misleads, so a column may shrink below what is comfortable.
        for candidate in range(size, (_MIN_TEXT if per_line > 1 else _MIN_NUMBER) - 1, -1):
            if all(_length(line, candidate) <= width for panel in lines for line in panel):
                return candidate, lines
    return _MIN_NUMBER, lines


def _draw_labels(panels: Sequence[Panel], prompt: str, layout: _Layout) -> Tensor:
    """The canvas `[3, H', W']` without the clips."""
    import numpy as np
    from PIL import Image, ImageDraw

    height, width = layout.canvas(len(panels))
    header = Image.new("RGB", (width * _OVERSAMPLE, layout.top * _OVERSAMPLE), _BACKGROUND)
    draw = ImageDraw.Draw(header)
    room = width - 2 * (layout.gap + layout.pad)
    middle = layout.prompt_bar / 2
    size = round(layout.title_size * 0.9)
    _write(draw, (layout.gap + layout.pad, middle), prompt, room=room, size=size, ink=_PROMPT_INK)
    for index, panel in enumerate(panels):
        left, right = layout.left(index), layout.left(index) + layout.panel[1]
        box = (left, layout.prompt_bar, right - 1 / _OVERSAMPLE, layout.top)  # the last column is included
        draw.rectangle([edge * _OVERSAMPLE for edge in box], fill=_LABEL_BAR)
        room = layout.panel[1] - 2 * layout.pad
        left += layout.pad
        middle = layout.prompt_bar + layout.pad + layout.title_pitch / 2
        _write(draw, (left, middle), panel.title, room=room, size=layout.title_size, ink=_TITLE_INK, bold=True)
        middle += (layout.title_pitch + layout.stats_pitch) / 2
        for line in layout.stats[index]:
            _write(draw, (left, middle), line, room=room, size=layout.stats_size, ink=_STATS_INK)
            middle += layout.stats_pitch
    image = Image.new("RGB", (width, height), _BACKGROUND)
    image.paste(header.reduce(_OVERSAMPLE), (0, 0))
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255


def _write(
    draw: ImageDraw,
    left_middle: tuple[float, float],
    text: str,
    *,
    room: int,
    size: int,
    ink: tuple[int, int, int],
    bold: bool = False,
) -> None:
    """Draw one line of text, shrunk a little or cut to `room` pixels; all lengths before oversampling."""
    size, text = _fit(_drawable(text), room, size, bold=bold)
    draw.text(
        (left_middle[0] * _OVERSAMPLE, left_middle[1] * _OVERSAMPLE),
        text,
        fill=ink,
        font=_font(size),
        anchor="lm",
        stroke_width=_stroke(size) * _OVERSAMPLE if bold else 0,  # an outline stands in for a bold face
        stroke_fill=ink,
    )


def _fit(text: str, room: int, size: int, *, bold: bool) -> tuple[int, str]:
    """Shrink the text a little, then cut it with an ellipsis, until it is at most `room` pixels wide."""
    smallest = min(size, max(_MIN_TEXT, round(size * 0.8)))
    for candidate in range(size, smallest - 1, -1):
        if _length(text, candidate, bold=bold) <= room:
            return candidate, text
    return smallest, _cut(text, lambda beginning: _length(beginning, smallest, bold=bold) <= room)


def _cut(text: str, fits: Callable[[str], bool]) -> str:
    """The longest beginning of `text` that fits with an ellipsis after it; empty if not even that fits."""
    low, high = 0, len(text)
    while low < high:
        middle = (low + high + 1) // 2
        if fits(text[:middle].rstrip() + _ELLIPSIS):
            low = middle
        else:
            high = middle - 1
    cut = text[:low].rstrip() + _ELLIPSIS
    return cut if fits(cut) else ""


def _drawable(text: str) -> str:
    """`text` in the characters the font has: accents and typographic signs folded, the rest as question marks."""
    folded = unicodedata.normalize("NFC", text).translate(_LOOKALIKES)
    kept: list[str] = []
    for character in folded:
        if character in _DRAWABLE or " " <= character <= "~":
            kept.append(character)
            continue
        base = unicodedata.normalize("NFKD", character).encode("ascii", "ignore").decode()
        kept.append(base or "?")
    return " ".join("".join(kept).split())


def _font(size: int) -> FreeTypeFont | ImageFont:
    """Pillow's bundled font, oversampled: the same on every machine, no font file to ship."""
    from PIL import ImageFont

    return ImageFont.load_default(size=size * _OVERSAMPLE)


def _length(text: str, size: int, *, bold: bool = False) -> float:
    """Width of a line of text in pixels, before oversampling."""
    return _font(size).getlength(text) / _OVERSAMPLE + (2 * _stroke(size) if bold else 0)


def _stroke(size: int) -> float:
    """Outline width that makes the regular face look bold, in pixels."""
    return size / 40
