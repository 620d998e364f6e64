"""docs/: links lead somewhere, and what pages say of configurations and downloads is so."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import get_args

import pytest

from rats_video.assets import ASSETS, HUB, PICKLED, download
from rats_video.config.load import load_config
from rats_video.datasets.shapes.render import ATTRIBUTES
from rats_video.distillation.resume import changed_keys
from rats_video.distillation.settings import DistillConfig
from rats_video.methods.custom import CustomMethodConfig
from rats_video.methods.kinds import MethodConfig

DOCS = Path(__file__).parents[2] / "docs"
PAGES = [*sorted(DOCS.rglob("*.md")), DOCS.parent / "README.md"]


MADE = DOCS / "reference"  # most of it when the site is built, which checks these links itself


@pytest.mark.parametrize("page", sorted(DOCS.rglob("*.md")), ids=lambda page: str(page.relative_to(DOCS)))
def test_links_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text())
    paths = {link: (page.parent / link).resolve() for link in links if not link.startswith("http")}
    assert [link for link, path in paths.items() if not path.exists() and not path.is_relative_to(MADE)] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(DOCS.parent)))
def test_tables_are_whole(page: Path) -> None:
    """A blank line would end a table: what follows is shown as text, with its bars."""
    lines = page.read_text(encoding="utf-8").splitlines()
    rows = [place for place, line in enumerate(lines) if line.startswith("|") and not lines[place - 1].startswith("|")]
    assert [lines[place] for place in rows if not re.fullmatch(r"\|[ :|-]+\|", lines[place + 1])] == []


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


def test_each_method_has_a_page_a_configuration_and_its_cost() -> None:
    text = (DOCS / "methods.md").read_text()
    costs = re.findall(r"^\| \[`(\w+)`\]\(methods/\1.md\) \|.*?\| ([\d.]+) \|", text, re.MULTILINE)
    assert {path.stem for path in (DOCS / "methods").glob("*.md")} == {kind for kind, _ in costs}
    union, _ = get_args(MethodConfig)
    for method in set(get_args(union)) - {CustomMethodConfig}:  # a user's own has neither
        (kind,) = get_args(method.model_fields["kind"].annotation)
        cfg = load_config(DistillConfig, "tiny" if kind == "rats" else f"tiny-{kind}", group="distill")
        assert isinstance(cfg.method, method)
        page = (DOCS / "methods" / f"{kind}.md").read_text()
        assert "$$" in page
        assert f"reference/config/methods.md#{method.__name__}" in page
        defaults = method.model_validate({"kind": kind} | ({"gate": cfg.method.gate} if kind == "rats" else {}))
        assert defaults.evaluations(4, student=12, teacher=48, guided=2) == float(dict(costs)[kind])


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


def test_family_pages_quote_their_configurations() -> None:
    quoted = {}
    for page in (DOCS / "models").glob("*.md"):
        for name, *cells in re.findall(
            r"^\| \[`(\w+)`\].*?\| (.*?) \| (.*?) \| (.*?) \| (.*?) \|$", page.read_text(), re.MULTILINE
        ):
            quoted[name] = cells
    named = {path.stem for path in (DOCS.parent / "configs" / "distill").glob("[!_]*.yaml")}
    real = {name for name in named if not name.startswith("tiny") and "-" not in name}  # `wan21_1b-dmd2`: a method
    assert set(quoted) == real
    for name, cells in quoted.items():
        cfg = load_config(DistillConfig, name, group="distill")
        scales = [cfg.teacher.guidance_scale, cfg.teacher.guidance_scale_2]
        guidance = ", ".join(f"{scale:g}" for scale in scales if scale is not None)
        clip = cfg.clip
        size = f"{clip.num_frames} x {clip.height} x {clip.width}"
        assert cells == [size, f"{clip.fps:g}", f"{cfg.shift:g}", guidance], name


def test_settings_that_save_memory_go_on_with_resume_as_the_page_says() -> None:
    text = (DOCS / "troubleshooting.md").read_text()
    rows = re.findall(r"^\| `([\w.]+=\w+)` \| .* \| (yes|no) \|$", text, re.MULTILINE)
    assert len(rows) == 12
    for setting, answer in rows:
        # Block offload is for a LoRA student, which no resumed run may become; shared weights ask the teacher together.
        base = ["teacher.asked=1", *(["student.weights.kind=lora"] if setting == "compute.offload=block" else [])]
        before, after = (
            load_config(DistillConfig, "tiny", group="distill", overrides=overrides)
            for overrides in (base, [*base, setting])
        )
        assert (changed_keys(before, after) == []) == (answer == "yes"), setting


def test_tutorial_shows_the_reward_that_ships_as_an_example() -> None:
    example = (DOCS.parent / "examples" / "redness.py").read_text()
    assert example[example.index("class Redness") :] in (DOCS / "tutorials" / "own_reward.md").read_text()


NEEDS = {
    "teacher.guidance_end": "tiny-ema",
    "teacher.guidance_fade_steps": "tiny-ema",
    "student.weights.dtype": "wan21_1b",
}


def test_settings_that_mend_are_ones_that_there_are() -> None:
    text = (DOCS / "troubleshooting.md").read_text()
    settings = set(re.findall(r"`((?:\w+\.)+\w+=[^`]+)`", text))
    assert len(settings) > 25
    for setting in settings:
        config = NEEDS.get(setting.partition("=")[0], "tiny")
        load_config(DistillConfig, config, group="distill", overrides=["teacher.asked=1", setting])
    terms = re.findall(r"`((?:motion|colour): {.*})`", text)
    assert [term.partition(":")[0] for term in terms] == ["motion", "colour"]
    for term in terms:
        changes = [f"reward={{kind: sum, terms: {{words: {{reward: {{kind: word, path: shapes-reward}}}}, {term}}}}}"]
        load_config(DistillConfig, "tiny", group="distill", overrides=changes)
