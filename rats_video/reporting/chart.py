"""Line charts as inline SVG: colours by class, so that the page's style decides; text as text; deterministic."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from xml.etree.ElementTree import Element

from rats_video.reporting.markup import DASH, details, short, table, tag

_WIDTH, _HEIGHT = 400.0, 240.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 48.0, 10.0, 8.0, 36.0
_MOST_POINTS = 300  # of a line: more than a chart has pixels to show
_MOST_VALUES = 12  # rows of the table behind a chart


@dataclass(frozen=True)
class Series:
    """One line.

    Args:
        label: for the legend; lines of one label share an entry, and those without have none.
        x: places, rising.
        y: values there; one that is not finite leaves a gap.
        look: style classes: a colour ("s0" to "s7", "teacher", "base", "r0" to "r7"), also "dashed", "faint".
        error: half-widths of bars; not finite if unknown.
        markers: draw a point at each value.
        shift: pixels to the right, so that bars at the same place do not hide one another.
    """

    label: str
    x: Sequence[float]
    y: Sequence[float]
    look: str
    error: Sequence[float] | None = None
    markers: bool = False
    shift: float = 0.0


@dataclass(frozen=True)
class Chart:
    """The content of a chart.

    Args:
        title: above the chart.
        xlabel: below the horizontal axis.
        lines: drawn in this order.
        levels: horizontal lines: label, value, half-width of the band around it (0 for none), look.
        marks: vertical lines: place, text, look.
        log_x: logarithmic places.
        log_y: logarithmic values; those of 0 and below are skipped.
        span: range of values to show at least.
        note: below the chart.
        ticks: of the places; chosen if empty.
        legend: show one even for a single line.
    """

    title: str
    xlabel: str
    lines: Sequence[Series]
    levels: Sequence[tuple[str, float, float, str]] = ()
    marks: Sequence[tuple[float, str, str]] = ()
    log_x: bool = False
    log_y: bool = False
    span: tuple[float, float] | None = None
    note: str = ""
    ticks: Sequence[float] = ()
    legend: bool = False


def draw(chart: Chart) -> Element | None:
    """The chart as a `figure` with legend and values; None if there is nothing to show."""
    lines = [line for line in (_shown(line, chart) for line in chart.lines) if line.x]
    if not lines:
        return None
    across, upright = _scales(chart, lines)
    parts: list[Element] = [_grid(across, upright, chart)]
    for _, value, half, look in chart.levels:
        y, (top, bottom) = upright.at(value), (upright.at(value + half), upright.at(value - half))
        parts += [tag("rect", x=_LEFT, y=top, width=across.end - _LEFT, height=bottom - top, class_=f"band {look}")]
        parts += [tag("path", d=f"M{_LEFT} {_px(y)}H{_px(across.end)}", class_=f"line dashed {look}")]
    parts += [
        tag("path", d=f"M{_px(across.at(x))} {_TOP}V{_HEIGHT - _BOTTOM}", class_=f"mark {look}")
        for x, _, look in chart.marks
    ]
    parts += [part for line in lines for part in _draw_line(line, across, upright)]
    svg = tag(
        "svg", *parts, viewBox=f"0 0 {_WIDTH:g} {_HEIGHT:g}", role="img", aria_label=_described(chart, lines),
        class_="chart",
    )  # fmt: skip
    return tag(
        "figure",
        tag("figcaption", tag("h4", chart.title), _legend(chart, lines)),
        svg,
        *(tag("p", text, class_="note") for text in (chart.note, *(text for _, text, _ in chart.marks)) if text),
        details("Values", _values(chart, lines)),
        class_="plot",
    )


# ----------------------------------------------------------------------------------------------------------- scales


@dataclass(frozen=True)
class _Scale:
    """Values to pixels."""

    low: float
    high: float
    start: float
    end: float
    is_log: bool
    ticks: Sequence[float]

    def at(self, value: float) -> float:
        low, high, value = (math.log(v) if self.is_log else v for v in (self.low, self.high, value))
        share = (value - low) / (high - low)
        return self.start + share * (self.end - self.start)


def _scales(chart: Chart, lines: Sequence[Series]) -> tuple[_Scale, _Scale]:
    xs = [x for line in lines for x in line.x]
    ys = [y for line in lines if "faint" not in line.look.split() for y in line.y]  # spikes would flatten the rest
    ys = ys or [y for line in lines for y in line.y]
    for line in lines:
        ys += [
            y + sign * e for y, e in zip(line.y, line.error or (), strict=False) if math.isfinite(e) for sign in (-1, 1)
        ]
    ys += [value + sign * half for _, value, half, _ in chart.levels for sign in (-1, 1)]
    ys += chart.span or ()
    low, high = _room(min(ys), max(ys), is_log=chart.log_y, exact=chart.span is not None)
    upright = _Scale(low, high, _HEIGHT - _BOTTOM, _TOP, chart.log_y, _ticks(low, high, is_log=chart.log_y))
    left, right = min(xs), max(xs)
    if chart.log_x:
        left, right = left / 1.15, right * 1.15
    elif left == right:
        left, right = left - 0.5, right + 0.5
    ticks = chart.ticks or [tick for tick in _ticks(left, right, is_log=False) if tick % 1 == 0]
    return _Scale(left, right, _LEFT, _WIDTH - _RIGHT, chart.log_x, ticks), upright


def _room(low: float, high: float, *, is_log: bool, exact: bool) -> tuple[float, float]:
    """Some space around the values."""
    if is_log:
        return low / 1.2, high * 1.2
    if low == high:
        spread = abs(low) * 0.1 or 0.5
        return low - spread, high + spread
    spread = 0.02 if exact else 0.06
    return low - spread * (high - low), high + spread * (high - low)


def _ticks(low: float, high: float, *, is_log: bool) -> list[float]:
    """Some five round numbers from `low` to `high`."""
    if is_log:
        powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        for steps in ((1,), (1, 3), (1, 2, 5)):
            ticks = [step * 10.0**power for power in powers for step in steps if low <= step * 10.0**power <= high]
            if len(ticks) >= 3:
                return ticks[:: math.ceil(len(ticks) / 7)]
        return ticks or [low, high]
    raw = (high - low) / 4
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(nice * power for nice in (1, 2, 5, 10) if nice * power >= raw * 0.99)
    first = math.ceil(low / step)
    return [index * step for index in range(first, math.floor(high / step) + 1)]


# ---------------------------------------------------------------------------------------------------------- drawing


def _shown(line: Series, chart: Chart) -> Series:
    """The line without points that cannot be drawn, and with no more than can be told apart."""
    errors = line.error or [math.nan] * len(line.x)
    kept = [
        (x, y, error)
        for x, y, error in zip(line.x, line.y, errors, strict=True)
        if math.isfinite(x) and abs(y) < 1e300 and (y > 0 or not chart.log_y) and (x > 0 or not chart.log_x)
    ]
    size = math.ceil(len(kept) / _MOST_POINTS) if kept else 1
    groups = [kept[start : start + size] for start in range(0, len(kept), size)]
    xs = [group[-1][0] for group in groups]
    ys = [math.fsum(y for _, y, _ in group) / len(group) for group in groups]
    return replace(line, x=xs, y=ys, error=[group[-1][2] for group in groups] if line.error else None)


def _draw_line(line: Series, across: _Scale, upright: _Scale) -> list[Element]:
    places = [
        (across.at(x) + line.shift, min(max(upright.at(y), _TOP), _HEIGHT - _BOTTOM))
        for x, y in zip(line.x, line.y, strict=True)
    ]
    path = "M" + "L".join(f"{_px(x)} {_px(y)}" for x, y in places)
    values = {"data_x": " ".join(map(short, line.x)), "data_y": " ".join(map(short, line.y)), "data_label": line.label}
    drawn = [tag("path", d=path, class_=f"line {line.look}", **(values if line.label else {}))]
    for (x, _), y, error in zip(places, line.y, line.error or (), strict=False):
        if math.isfinite(error):
            d = f"M{_px(x)} {_px(upright.at(y - error))}V{_px(upright.at(y + error))}"
            drawn.append(tag("path", d=d, class_=f"bar {line.look}"))
    if line.markers or len(places) == 1:
        drawn += [tag("circle", cx=_px(x), cy=_px(y), r=3.2, class_=f"dot {line.look}") for x, y in places]
    return drawn


def _grid(across: _Scale, upright: _Scale, chart: Chart) -> Element:
    bottom = _HEIGHT - _BOTTOM
    parts = []
    for value in upright.ticks:
        y = _px(upright.at(value))
        parts += [tag("path", d=f"M{_LEFT} {y}H{_WIDTH - _RIGHT}")]
        parts += [tag("text", short(value), x=_LEFT - 6, y=y, dy="0.32em", text_anchor="end")]
    for value in across.ticks:
        x = _px(across.at(value))
        parts += [tag("path", d=f"M{x} {bottom}v4", class_="tick")]
        parts += [tag("text", short(value), x=x, y=bottom + 16, text_anchor="middle")]
    middle = (_LEFT + _WIDTH - _RIGHT) / 2
    parts += [tag("path", d=f"M{_LEFT} {bottom}H{_WIDTH - _RIGHT}", class_="axis")]
    parts += [tag("text", chart.xlabel, x=middle, y=_HEIGHT - 4, text_anchor="middle", class_="label")]
    return tag("g", *parts, class_="grid", aria_hidden="true")


def _legend(chart: Chart, lines: Sequence[Series]) -> Element | None:
    looks = {line.label: line.look for line in lines if line.label}
    looks |= {label: f"dashed {look}" for label, _, _, look in chart.levels}
    if len(looks) < 2 and not chart.legend:
        return None
    keys = [tag("li", tag("span", class_=f"key {look}", aria_hidden="true"), label) for label, look in looks.items()]
    return tag("ul", *keys, class_="legend")


def _described(chart: Chart, lines: Sequence[Series]) -> str:
    """The chart in words."""

    def end(line: Series, index: int) -> str:
        return f"{short(line.y[index])} at {short(line.x[index])}"

    ends = [f"{line.label} from {end(line, 0)} to {end(line, -1)}" for line in lines if line.label]
    return f"{chart.title} by {chart.xlabel}: {'; '.join(ends[:6])}"


def _values(chart: Chart, lines: Sequence[Series]) -> Element:
    """A few rows of the chart's values."""
    named = [line for line in lines if line.label]
    found = sorted({x for line in named for x in line.x})
    places = found[:: max(1, math.ceil(len(found) / _MOST_VALUES))]
    places += found[-1:] if found and places[-1] != found[-1] else []
    columns = [dict(zip(line.x, line.y, strict=True)) for line in named]
    rows = [[short(x), *(short(column[x]) if x in column else DASH for column in columns)] for x in places]
    return table([chart.xlabel, *(line.label for line in named)], rows, label=f"Values of {chart.title}")


def _px(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")
