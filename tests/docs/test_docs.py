"""docs/: links lead somewhere, and each download it names is the one the error names."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import get_args

import pytest

from rats_video.assets import ASSETS, HUB, PICKLED, download
from rats_video.config.load import load_config
from rats_video.datasets.shapes.render import ATTRIBUTES
from rats_video.distillation.settings import DistillConfig
from rats_video.methods.custom import CustomMethodConfig
from rats_video.methods.kinds import MethodConfig

DOCS = Path(__file__).parents[2] / "docs"


@pytest.mark.parametrize("page", sorted(DOCS.glob("*.md")), ids=lambda page: page.stem)
def test_links_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)#]+)\)", page.read_text())
    assert [link for link in links if not link.startswith("http") and not (DOCS / link).exists()] == []


def test_downloads_and_configurations_are_the_ones_that_ship() -> None:
    text = "".join((DOCS / name).read_text() for name in ("models.md", "rewards.md", "evaluation.md"))
    downloads = set(re.findall(r"(hf download .*?)(?:`|  #|$)", text, re.MULTILINE))
    sizes = {name: download(name, f"models/{name.rpartition('/')[2]}").split(": ") for name in HUB}
    assert downloads == {command for _, command in sizes.values()}
    for size, command in sizes.values():
        assert f"{command}  # {size}" in text or f"| {size.removesuffix(' GB')} | `{command}` |" in text
    named = set(re.findall(r"^\| `(\w+)` \| .* \| `hf download", text, re.MULTILINE))
    real = {path.stem for path in (DOCS.parent / "configs" / "distill").glob("*.yaml") if path.stem[0] != "_"}
    assert named == {
        name for name in real if not name.startswith("tiny") and "-" not in name
    }  # a rival is named with its base


def test_each_method_has_a_section_a_configuration_and_its_cost() -> None:
    text = (DOCS / "methods.md").read_text()
    sections = set(re.findall(r"^## (\w+)$", text, re.MULTILINE))
    costs = re.findall(r"^\| `(\w+)` \|.*?\| (\d+) \|", text, re.MULTILINE)
    assert sections == {kind for kind, _ in costs}
    union, _ = get_args(MethodConfig)
    for method in set(get_args(union)) - {CustomMethodConfig}:  # a user's own has neither
        (kind,) = get_args(method.model_fields["kind"].annotation)
        cfg = load_config(DistillConfig, "tiny" if kind == "rats" else f"tiny-{kind}", group="distill")
        assert isinstance(cfg.method, method)
        defaults = method.model_validate({"kind": kind} | ({"gate": cfg.method.gate} if kind == "rats" else {}))
        assert defaults.evaluations(4, student=12, teacher=48, guided=2) == int(dict(costs)[kind])


def test_conversions_are_the_ones_that_errors_name() -> None:
    text = (DOCS / "rewards.md").read_text() + (DOCS / "evaluation.md").read_text()
    steps = re.findall(r"^curl -LO (\S+)\nrats-video rewards convert (\S+) models/(\S+)$", text, re.MULTILINE)
    assert steps == [(url, url.rpartition("/")[2], folder) for folder, url in PICKLED.items()]


def test_the_embedded_model_is_described_as_it_was_measured() -> None:
    text = (DOCS / "embedded_model.md").read_text(encoding="utf-8")
    metrics = json.loads((ASSETS / "tiny-wan" / "training.json").read_text())["metrics"]
    for kind in ("50_steps", "4_steps", "first_frame_given"):
        cells = [f"{metrics[f'{name}_{kind}']:.3f}" for name in (*ATTRIBUTES, "adherence")]
        assert f"| {' | '.join(cells)} |" in text
    for reward in ("shapes-reward", "shapes-reward-heldout"):
        metrics = json.loads((ASSETS / reward / "training.json").read_text())["metrics"]
        cells = [f"{metrics['auc_' + name]:.2f}" for name in ATTRIBUTES]
        assert f"| `{reward}` | {' | '.join(cells)} |" in text
