"""Hooks of `mkdocs build`: reference pages from the code, pages of linked source files, formulas without scripts.

Nothing that a browser loads comes from another host.
"""

from __future__ import annotations

import html
import json
import re
from pathlib import Path
from typing import Any

import cli_reference
import config_reference
from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[2]
OUTSIDE = re.compile(
    r"(\]\()((?:\.\./)+[\w./-]+)(\))"
)  # a link that may leave docs/ for another file of the repository
API = {
    "api": "What `import rats_video` offers",
    "types": "What the parts hand to one another: clips, batches, scores, and the protocols of models and rewards",
    "errors": "A user's mistake, and a training that was stopped",
    "config": "Configurations: YAML, `extends`, `--set`, error messages",
    "diffusion": "Noise levels, Euler rollout, guidance",
    "backbones": "Model families",
    "rewards": "Rewards",
    "methods": "RATS and the methods it is compared with",
    "training": "The engine: loop, update, checkpoints, faults, guard",
    "distillation": "A run's settings, and what is built from them",
    "inference": "Samplers, students, MP4",
    "evaluation": "Scores, statistics, tables",
    "export": "Forms of export",
}


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Add what is made from the code."""
    made = {f"reference/config/{name}": text for name, text in config_reference.pages().items()}
    made["reference/cli.md"] = cli_reference.page()
    for name, text in API.items():
        made[f"reference/api/{name}.md"] = f"# rats_video.{name}\n\n{text}.\n\n::: rats_video.{name}\n"
    for name, text in made.items():
        files.append(File.generated(config, name, content=text))
    linked = {path for file in files.documentation_pages() for path in _outside(file)}
    for path in sorted(linked.union(*map(_inside, linked))):
        files.append(File.generated(config, _source_page(path), content=_shown(path)))
    return files


def on_page_markdown(markdown: str, *, page: Page, **_: Any) -> str:
    """Lead links to other files of the repository to their pages."""
    here = page.file.src_uri

    def lead(match: re.Match[str]) -> str:
        path = _target(here, match[2])
        return match[0] if path is None else f"{match[1]}{_relative(here, _source_page(path))}{match[3]}"

    return OUTSIDE.sub(lead, markdown)


def on_page_content(text: str, **_: Any) -> str:
    r"""Draw `\(...\)` and `\[...\]` as MathML, which browsers show by themselves."""

    def draw(match: re.Match[str]) -> str:
        return convert(html.unescape(match[2])[2:-2], display="block" if match[1] == "div" else "inline")

    return re.sub(r'<(div|span) class="arithmatex">(.*?)</\1>', draw, text, flags=re.DOTALL)


def _outside(file: File) -> list[Path]:
    found = (_target(file.src_uri, match[2]) for match in OUTSIDE.finditer(file.content_string))
    return [path for path in found if path is not None]


def _target(page: str, link: str) -> Path | None:
    """The file or folder of the repository that a link of a page leads to; None if it stays within docs/."""
    path = (ROOT / "docs" / page).parent.joinpath(link).resolve()
    is_outside = path.is_relative_to(ROOT) and not path.is_relative_to(ROOT / "docs") and path.exists()
    return path.relative_to(ROOT) if is_outside else None


def _inside(path: Path) -> list[Path]:
    """The text files of a linked folder."""
    endings = {".py", ".yaml", ".md", ".txt", ".sbatch", ".ipynb"}
    folder = ROOT / path
    return [each.relative_to(ROOT) for each in folder.iterdir() if each.suffix in endings] if folder.is_dir() else []


def _source_page(path: Path) -> str:
    return f"source/{path}/index.md" if (ROOT / path).is_dir() else f"source/{path}.md"


def _shown(path: Path) -> str:
    if (ROOT / path).is_dir():
        here = _source_page(path)
        names = (f"- [{each.name}]({_relative(here, _source_page(each))})\n" for each in sorted(_inside(path)))
        return f"# {path}/\n\n{''.join(names)}"
    text = (ROOT / path).read_text(encoding="utf-8")
    if path.suffix == ".md":
        return text if text.startswith("# ") else f"# {path.name}\n\n{text}"
    if path.suffix == ".ipynb":
        code = (cell["source"] for cell in json.loads(text)["cells"] if cell["cell_type"] == "code")
        shown = "\n\n".join("".join(lines) for lines in code)
        return f"# {path}\n\nIts code; Jupyter and GitHub show the clips.\n\n````py\n{shown}\n````\n"
    return f"# {path}\n\n````{path.suffix.lstrip('.') or 'text'}\n{text}\n````\n"


def _relative(page: str, other: str) -> str:
    return "../" * page.count("/") + other
