"""docs/: links lead somewhere, and each download it names is the one the error names."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from rats_video.assets import HUB, PICKLED

DOCS = Path(__file__).parents[2] / "docs"


@pytest.mark.parametrize("page", sorted(DOCS.glob("*.md")), ids=lambda page: page.stem)
def test_links_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)#]+)\)", page.read_text())
    assert [link for link in links if not link.startswith("http") and not (DOCS / link).exists()] == []


def test_downloads_and_configurations_are_the_ones_that_ship() -> None:
    text = "".join((DOCS / name).read_text() for name in ("models.md", "rewards.md", "evaluation.md"))
    downloads = re.findall(r"hf download (\S+) --local-dir (\S+?)[`\s]", text)
    assert sorted(set(downloads)) == sorted((name, f"models/{name.rpartition('/')[2]}") for name in HUB)
    named = set(re.findall(r"^\| `(\w+)` \| .* \| `hf download", text, re.MULTILINE))
    presets = {path.stem for path in (DOCS.parent / "configs" / "distill").glob("*.yaml")}
    real = {name for name in presets if not name.startswith(("_", "tiny"))}
    assert named == real


def test_conversions_are_the_ones_that_errors_name() -> None:
    text = (DOCS / "rewards.md").read_text() + (DOCS / "evaluation.md").read_text()
    steps = re.findall(r"^curl -LO (\S+)\nrats-video rewards convert (\S+) models/(\S+)$", text, re.MULTILINE)
    assert steps == [(url, url.rpartition("/")[2], folder) for folder, url in PICKLED.items()]
