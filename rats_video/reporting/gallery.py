"""The gallery: clips of teacher, base model and every student from the same prompt and noise, played together."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from xml.etree.ElementTree import Element

from torch import Tensor

from rats_video.errors import UserError, warn
from rats_video.evaluation.compare_result import BASE
from rats_video.evaluation.tables import METRIC_TITLES, TEACHER, metric_title
from rats_video.inference.audio import read_sound
from rats_video.inference.panel import GIVEN
from rats_video.inference.video import read_mp4
from rats_video.reporting.clips import WebClip, crop, encode_clip
from rats_video.reporting.markup import cut, details, short, tag
from rats_video.reporting.sources import ComparisonClip, PanelBox, Run
from rats_video.reporting.training import colors
from rats_video.sound import Sound

REWARD, STUDENT, GAP = "reward", "student", "gap"
_PAUSE = "M5 3h4v14H5zM12 3h4v14h-4z"
_SPEAKER = "M2 7v6h4l5 5V2L6 7zM13 6.5v1.7a2 2 0 0 1 0 3.6v1.7a3.6 3.6 0 0 0 0-7z"
_NOISE = ("model", "clip", "shift", "embedded_guidance", "evaluation")
"""The settings that, with prompt, place and seed, decide teacher's and base model's clips."""


@dataclass(frozen=True)
class GalleryClip:
    """One clip of a card, or its problem; facts are its metrics."""

    title: str
    look: str
    cost: str
    clip: WebClip | None
    problem: str
    facts: Mapping[str, float]


@dataclass
class PromptGroup:
    """A prompt from one noise: its cells, and its values to sort by."""

    prompt: str
    cells: list[GalleryClip] = field(default_factory=list)
    keys: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Gallery:
    """The cards that are shown, and the number of all."""

    cards: Sequence[PromptGroup]
    total: int
    note: str

    @property
    def clips(self) -> list[WebClip]:
        """The clips of all cards."""
        return [cell.clip for card in self.cards for cell in card.cells if cell.clip is not None]


def make_gallery(alone: Sequence[Run], arms: Sequence[Run], most: int) -> Gallery:
    """Encode the clips of at most `most` prompts; runs that share prompt, noise and teacher share a card.

    Args:
        alone: runs whose clips were scored by their own rewards.
        arms: runs of comparisons, whose clips were scored by one reward.
        most: cards.
    """
    runs = [*alone, *arms]
    cards: dict[object, PromptGroup] = {}
    keys = {_key(run, clip) for run in runs for clip in run.clips}
    looks = colors(runs)
    for run in runs:
        for clip in run.clips:
            key = _key(run, clip)
            if key not in cards and len(cards) == most:
                continue
            card = cards.setdefault(key, PromptGroup(clip.prompt))
            suffix = f" of {run.name}" if len(runs) > 1 else ""
            card.keys |= _sort_keys(clip, suffix)
            _add_cells(card, run, clip, looks[run.group], alone=len(runs) == 1)
    if len(keys) > len(cards):
        warn(f"the gallery shows {len(cards)} of {len(keys)} prompts: give more by --max-clips")
    rewards = {json.dumps(run.config.get("reward"), sort_keys=True, default=str) for run in alone if run.clips}
    note = "The runs were trained on different rewards: each gap is by its own run's." if len(rewards) > 1 else ""
    return Gallery(list(cards.values()), len(keys), note)


def gallery_section(gallery: Gallery) -> list[Element]:
    """Toolbar and cards."""
    names = list(dict.fromkeys(name for card in gallery.cards for name in card.keys))
    fps = max((clip.fps for clip in gallery.clips), default=8.0)
    many = max((len(card.cells) for card in gallery.cards), default=0) > 3
    seconds = max((clip.num_frames / clip.fps for clip in gallery.clips), default=0.0)
    shown = tag(
        "ol",
        *(_card(card, names) for card in gallery.cards),
        class_="gallery wide" if many else "gallery",
        data_fps=fps,
        data_seconds=seconds,
    )
    return [
        _toolbar(names, max(1, round(seconds * fps))),
        *([tag("p", gallery.note, class_="note")] if gallery.note else []),
        shown,
        tag("p", "No prompt holds this text.", class_="empty", hidden=""),
    ]


# ----------------------------------------------------------------------------------------------------------- content


def _key(run: Run, clip: ComparisonClip) -> object:
    noise = json.dumps([run.config.get(key) for key in _NOISE], sort_keys=True, default=str)
    known = clip.seed is not None and "model" in run.config
    return (clip.place, clip.prompt, clip.seed, noise) if known else (run.name, clip.place)


def _add_cells(card: PromptGroup, run: Run, clip: ComparisonClip, look: str, *, alone: bool) -> None:
    frames: Tensor | None = None
    fps, problem = 0.0, ""
    try:
        frames, fps = read_mp4(clip.path)
    except UserError as error:
        problem = error.what
        warn(problem, where=str(clip.path))
    taken = {(cell.title, cell.cost) for cell in card.cells}
    whole = PanelBox(title=" | ".join(clip.metrics.get(REWARD, {})) or "comparison", box=(0, 0, 0, 0))
    for panel in clip.panels or [whole]:
        is_student = panel.title not in {GIVEN, TEACHER, BASE}
        title = panel.title if alone or not is_student else run.name
        if not is_student and (panel.title, _cost(panel)) in taken:
            continue
        part = frames if frames is None or panel is whole else crop(frames, panel.box)
        trouble = problem or ("" if part is not None else "its place in the picture is not inside it")
        encoded = None if part is None else encode_clip(part, fps, _sound(clip, panel))
        facts = {name: values[panel.title] for name, values in clip.metrics.items() if panel.title in values}
        if panel.title != TEACHER and REWARD in facts and TEACHER in clip.metrics[REWARD]:
            facts = {REWARD: facts[REWARD], GAP: facts[REWARD] - clip.metrics[REWARD][TEACHER], **facts}
        card.cells.append(
            GalleryClip(title, look if is_student else panel.title, _cost(panel), encoded, trouble, facts)
        )
    card.cells.sort(key=lambda cell: {GIVEN: 0, TEACHER: 1, BASE: 2}.get(cell.look, 3))


def _sound(clip: ComparisonClip, panel: PanelBox) -> Sound | None:
    """The sound of a panel; None, with a warning, where it cannot be read."""
    if panel.track is None:
        return None
    try:
        return read_sound(clip.path, panel.track - 1)
    except UserError as error:
        warn(error.what, where=str(clip.path))
        return None


def _cost(panel: PanelBox) -> str:
    parts = [
        f"{panel.num_steps} steps" if panel.num_steps is not None else "",
        f"{panel.nfe} NFE" if panel.nfe is not None else "",
    ]
    return " · ".join(filter(None, parts))


def _sort_keys(clip: ComparisonClip, suffix: str) -> dict[str, float]:
    """Gap first, then the student's metrics, then the teacher's reward."""
    reward = clip.metrics.get(REWARD, {})
    keys = {}
    if STUDENT in reward and TEACHER in reward:
        keys[f"gap{suffix}"] = reward[STUDENT] - reward[TEACHER]
    for name in dict.fromkeys((*METRIC_TITLES, *clip.metrics)):
        if STUDENT in clip.metrics.get(name, {}):
            keys[f"{metric_title(name)}{suffix}"] = clip.metrics[name][STUDENT]
    return keys | ({f"the teacher's reward{suffix}": reward[TEACHER]} if TEACHER in reward else {})


# ------------------------------------------------------------------------------------------------------------ markup


def _toolbar(names: Sequence[str], num_frames: int) -> Element:
    sorts = [tag("option", "order of the prompts", value="place"), tag("option", "prompt, A to Z", value="prompt")]
    for index, name in enumerate(names):
        sorts += [tag("option", f"{name}, highest first", value=f"-{index}")]
        sorts += [tag("option", f"{name}, lowest first", value=f"+{index}")]
    speeds = [
        tag("option", f"{speed}×", value=speed, selected="" if speed == "1" else None)  # noqa: RUF001
        for speed in ("0.25", "0.5", "1", "2")
    ]
    hint = "words of a prompt  ( / )"
    transport = [
        _button("play", "Play", "Play or pause all (Space)", _icon("M5 3v14l12-7z", "go"), _icon(_PAUSE, "halt")),
        _button("back", "A frame back", "A frame back (←)", _icon("M14 3v14L5 10zM3 3h2v14H3z")),
        _button("forward", "A frame on", "A frame on (→)", _icon("M6 3v14l9-7zM15 3h2v14h-2z")),
        tag(
            "input", type="range", id="scrub", min="0", max=f"{num_frames - 1}", value="0", step="1",
            aria_label="Frame of all clips",
        ),
        tag("output", f"1 / {num_frames}", id="frame", for_="scrub"),
    ]  # fmt: skip
    choices = [
        tag("label", "Speed ", tag("select", *speeds, id="speed")),
        tag("label", tag("input", type="checkbox", id="loop", checked=""), " Loop"),
        tag("label", "Sort by ", tag("select", *sorts, id="sort")),
        tag("label", "Filter ", tag("input", type="search", id="filter", placeholder=hint, autocomplete="off")),
        tag("output", "", id="count", aria_live="polite"),
    ]
    groups = [tag("div", *transport, class_="group transport"), tag("div", *choices, class_="group")]
    return tag("div", *groups, class_="toolbar", role="group", aria_label="All clips together", hidden="")


def _button(name: str, label: str, title: str, *icons: Element) -> Element:
    return tag("button", *icons, type="button", id=name, aria_label=label, title=title)


def _icon(path: str, name: str | None = None) -> Element:
    """An icon as a path: fonts lack these characters."""
    return tag("svg", tag("path", d=path), viewBox="0 0 20 20", aria_hidden="true", class_=name)


def _card(card: PromptGroup, names: Sequence[str]) -> Element:
    keys = {f"data_k{names.index(name)}": value for name, value in card.keys.items()}
    prompt = cut(card.prompt) or "(the empty prompt)"
    return tag(
        "li", tag("h3", prompt), tag("div", *(_cell(cell, prompt) for cell in card.cells), class_="cells"),
        class_="card", **keys,
    )  # fmt: skip


def _cell(cell: GalleryClip, prompt: str) -> Element:
    clip = cell.clip
    if clip is None:
        picture = tag("p", f"This clip cannot be shown: {cell.problem}", class_="problem")
    else:
        picture = tag(
            "video", src=clip.video, poster=clip.poster, width=clip.width, height=clip.height, muted="", playsinline="",
            controls="", preload="none", aria_label=f"{cell.title}: {cut(prompt, 200)}",
            data_seconds=clip.num_frames / clip.fps,
        )  # fmt: skip
    facts = list(cell.facts.items())
    label = f"Sound of {cell.title}"
    switch = tag(
        "button", _icon(_SPEAKER), " Sound", type="button", class_="sound", aria_label=label, aria_pressed="false",
        title=f"{label}, or silence", hidden="",
    )  # fmt: skip
    first = [(name, value) for name, value in facts if name in {REWARD, GAP}]
    rest = [(name, value) for name, value in facts if name not in {REWARD, GAP}]
    return tag(
        "figure",
        picture,
        switch if clip is not None and clip.has_sound else None,
        tag(
            "figcaption",
            tag("div", tag("span", class_=f"key {cell.look}", aria_hidden="true"), tag("b", cell.title)),
            tag("div", cell.cost) if cell.cost else None,
            _facts(first) if first else None,
            details("measures", _facts(rest)) if rest else None,
        ),
    )


def _facts(facts: Sequence[tuple[str, float]]) -> Element:
    def shown(name: str, value: float) -> str:
        return f"{value:+.3f}" if name == GAP else f"{value:z.3f}" if abs(value) < 1000 else short(value)

    def look(name: str, value: float) -> str | None:
        return None if name != GAP else "ahead" if value > 0 else "behind"

    pairs = [
        tag(
            "div",
            tag("dt", name if name in {REWARD, GAP} else metric_title(name)),
            tag("dd", shown(name, value), class_=look(name, value)),
        )
        for name, value in facts
    ]
    return tag("dl", *pairs)
