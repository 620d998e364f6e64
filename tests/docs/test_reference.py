"""What the site makes of the code, and that the commands in docs/ are ones that there are."""

from __future__ import annotations

import re
import shlex
from importlib import resources
from pathlib import Path

import cli_reference
import config_reference
import pytest

from rats_video.config.load import load_config

DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture(scope="module")
def pages() -> dict[str, str]:
    return config_reference.pages()


def test_every_key_has_a_meaning() -> None:
    settings = config_reference.find_settings()
    assert len(settings) > 80
    keys = [(cls, key) for cls in settings for key in cls.model_fields if key != "kind"]
    assert [f"{cls.__name__}.{key}" for cls, key in keys if not config_reference.meaning(cls, key)] == []


def test_key_is_shown_with_type_bounds_default_and_meaning(pages: dict[str, str]) -> None:
    def row(page: str, key: str) -> str:
        return next(line for line in pages[page].splitlines() if line.startswith(f"| `{key}` |"))

    assert row("methods.md", "tau") == (
        "| `tau` | number, above 0 | `0.15` | reward difference that moves the weight from 0.5 to 0.73 |"
    )
    assert row("distill.md", "num_frames").startswith("| `num_frames` | whole number, 1 or more, below 10,000 | `17` |")
    assert row("distill.md", "method").startswith("| `method` | a [method](methods.md) | required | what the student")
    assert row("distill.md", "optimizer").startswith("| `optimizer` | [keys](#OptimizerConfig) | required | AdamW with")
    assert " [full](#FullWeightsConfig) or [lora](#LoraConfig) | `{kind: full}` |" in row("distill.md", "weights")
    assert '| `dtype` | `float32` or `bfloat16` | `"float32"` |' in row("distill.md", "dtype")


def test_each_class_stands_once_and_each_link_finds_it(pages: dict[str, str]) -> None:
    places = {name: page for page, text in pages.items() for name in re.findall(r"{#(\w+)}", text)}
    assert len(places) == sum(text.count("{#") for text in pages.values()) == len(config_reference.find_settings())
    for page, text in pages.items():
        for target, name in re.findall(r"\]\(([\w-]+\.md)?#(\w+)\)", text):
            assert places[name] == (target or page)


def test_every_command_is_shown_with_its_options() -> None:
    page = cli_reference.page()
    sections = re.findall(r"^## (.*)$", page, re.MULTILINE)
    assert {"run", "distill", "export model", "train reward", "rewards check"} <= set(sections)
    assert "| `--nfe` |" in page.partition("## sample\n")[2].partition("\n## ")[0]
    assert "| `--device` | <code>auto&#124;cpu&#124;cuda&#124;cuda:N</code> | `auto` |" in page
    assert "| `--set` | `KEY=VALUE` |  | Change one config value, as training.steps=100. Repeatable. |" in page


def commands_in(page: Path) -> list[str]:
    """The command lines of a page's code blocks, without comments and with continued lines joined."""
    blocks = re.findall(r"^```\w*\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return [f"rats-video{rest}" for line in lines for rest in re.findall(r"(?:^|\| |&& )rats-video( .*)", line)]


PAGES = [page for page in sorted(DOCS.rglob("*.md")) if commands_in(page)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(DOCS)))
def test_commands_are_ones_that_there_are(page: Path) -> None:
    known = cli_reference.commands()
    for line in commands_in(page):
        _, *words = shlex.split(line.partition(" | ")[0], comments=True)
        if words in (["--version"], ["--install-completion"], ["--show-completion"]):
            continue
        name = next((" ".join(words[:n]) for n in (2, 1) if " ".join(words[:n]) in known), None)
        assert name is not None, line
        given = known[name].make_context(name, words[len(name.split()) :]).params  # refuses what it does not know
        check_configuration(name, given, line)


GROUPS = {"train paths": "paths", "train vae": "vae", "compare": "compare", "prepare": "prepare"}


def check_configuration(name: str, given: dict[str, object], line: str) -> None:
    group = GROUPS.get(name, "distill")
    if name in {"train teacher", "train reward"}:
        kinds = {"train teacher": ("teacher", "finetune"), "train reward": ("reward", "preference")}[name]
        group = "latent_reward" if given.get("latent") else kinds[given.get("data") is not None]
    config = given.get("config")
    if config is None or not (Path(str(resources.files("rats_video.configs"))) / group / f"{config}.yaml").is_file():
        assert config is None or str(config) == "NAME" or str(config).endswith(".yaml"), line
        return
    (root,) = (root for _, each, root in config_reference.ROOTS.values() if each == group)
    load_config(root, str(config), group=group, overrides=given.get("overrides") or [])
