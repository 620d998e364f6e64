"""The whole page: one HTML file that loads nothing from elsewhere and runs nothing that came with the data."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import resources
from xml.etree.ElementTree import Element

import rats_video
from rats_video.reporting.costs import cost_table, environments, methods_cost, settings
from rats_video.reporting.gallery import Gallery, gallery_section
from rats_video.reporting.guarded import guard_charts, verdicts
from rats_video.reporting.markup import tag, write_html
from rats_video.reporting.overview import overview
from rats_video.reporting.results import method_arms, nfe_charts, results_table, run_arms, wins
from rats_video.reporting.sources import CompareFolder, Run
from rats_video.reporting.training import training_charts
from rats_video.web import policy_source


def make_page(runs: Sequence[Run], methods: Sequence[CompareFolder], gallery: Gallery) -> str:
    """The report as HTML; the same input gives the same text."""
    files = resources.files("rats_video.reporting")
    style, script = (files.joinpath(name).read_text(encoding="utf-8") for name in ("report.css", "report.js"))
    names = ", ".join([*(run.name for run in runs), *(each.name for each in methods)])
    sections = [*_sections(runs, methods, gallery)]
    links = [tag("a", title, href=f"#{name}") for name, title, _ in sections]
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=_policy(style, script)),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("meta", name="referrer", content="no-referrer"),
        tag("title", f"{names} · rats-video report"),
        tag("link", rel="icon", href="data:,"),
        _raw("style", style),
    )
    body = tag(
        "body",
        tag("a", "To the content", href="#content", class_="skip"),
        tag(
            "header",
            tag("p", "rats-video report", class_="brand"), tag("h1", names), tag("nav", *links, aria_label="Sections"),
        ),
        tag("main", *(_section(*each) for each in sections), id="content"),
        tag("footer", tag("p", _footer(gallery))),
        _raw("script", script),
    )  # fmt: skip
    return write_html(tag("html", head, body, lang="en"))


def _sections(
    runs: Sequence[Run], methods: Sequence[CompareFolder], gallery: Gallery
) -> list[tuple[str, str, Sequence[Element | None]]]:
    """Name, title and content of every section that has any."""
    found: list[tuple[str, str, Sequence[Element | None]]] = [("overview", "Overview", overview(runs, methods))]
    if gallery.cards:
        found.append(("clips", "Clips", gallery_section(gallery)))
    for index, each in enumerate(methods):
        arms = method_arms(each.compared)
        parts = [
            results_table(arms, label=f"Methods compared, {each.name}", count="seeds"),
            *nfe_charts(arms),
            wins(each),
        ]
        suffix = "" if len(methods) == 1 else f": {each.name}"
        found.append((f"methods-{index}", f"Methods{suffix}", [*parts, tag("h3", "Cost"), methods_cost(each)]))
        if any(arm.rows for arm in each.arms):
            found.append(
                (f"arms-{index}", f"Training of the methods{suffix}", training_charts(each.arms, by_cost=True))
            )
    if arms := run_arms(runs):
        found.append(
            (
                "results",
                "Results",
                [tag("p", _INTERVALS, class_="note"), results_table(arms, label="Results"), *nfe_charts(arms)],
            )
        )
    if any(run.rows for run in runs):
        found.append(("training", "Training", training_charts(runs)))
    if any(run.guard is not None for run in runs):
        found.append(("guard", "Guard", [verdicts(runs), tag("div", *guard_charts(runs), class_="charts")]))
    if runs:
        found.append(("cost", "Cost", [cost_table(runs)]))
        found.append(("settings", "Settings", settings(runs)))
    if (environment := environments(runs)) is not None:
        found.append(("environment", "Environment", [environment]))
    return found


_INTERVALS = (
    "Means over held-out prompts with 95% intervals; the best of each column is bold. Every arm had the same noise."
)


def _section(name: str, title: str, content: Sequence[Element | None]) -> Element:
    return tag("section", tag("h2", title, id=f"{name}-title"), *content, id=name, aria_labelledby=f"{name}-title")


def _raw(name: str, text: str) -> Element:
    """Our own style or script, written unescaped."""
    element = Element(name)
    element.text = text
    return element


def _policy(style: str, script: str) -> str:
    """A policy that allows this page's own style and script, and the pictures and clips inside it, alone."""
    return (
        f"default-src 'none'; script-src {policy_source(script)}; style-src {policy_source(style)}; "
        "img-src data:; media-src data:; base-uri 'none'; form-action 'none'"
    )


def _footer(gallery: Gallery) -> str:
    size = sum(clip.size for clip in gallery.clips) / 1e6
    clips = f"; {len(gallery.clips)} clips in VP9, {size:.1f} MB" if gallery.clips else ""
    return f"Made by rats-video {rats_video.__version__} from the files of the runs alone{clips}."
