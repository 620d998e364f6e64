"""Ten thousand hostile configurations: each is taken, and reads back as itself once written, or gets one line."""

# ruff: noqa: E501  # the hostile values are tables

from __future__ import annotations

import pickle
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from rats_video.config import load
from rats_video.config.load import dump_config, load_config
from rats_video.datasets.video.settings import PrepareConfig
from rats_video.distillation.settings import DistillConfig
from rats_video.errors import CONTROLS, UserError
from rats_video.pretraining.finetune import FinetuneConfig
from rats_video.pretraining.latent_pool import LatentRewardTrainConfig
from rats_video.pretraining.preference import PreferenceTrainConfig
from rats_video.pretraining.reward import RewardTrainConfig
from rats_video.pretraining.teacher import TeacherTrainConfig
from rats_video.pretraining.vae import VaeConfig

NUM_TEXTS, NUM_TREES, NUM_OVERRIDES = 800, 8_700, 500
CASES = 10  # of an example
CPU_SECONDS = 10.0  # of one configuration; a thousand times what it takes
PACKAGED: list[tuple[type[BaseModel], str, str]] = [
    (DistillConfig, "distill", "tiny"),
    (DistillConfig, "distill", "tiny-ema"),
    (DistillConfig, "distill", "wan22_a14b"),
    (VaeConfig, "vae", "tiny"),
    (TeacherTrainConfig, "teacher", "tiny"),
    (RewardTrainConfig, "reward", "tiny"),
    (LatentRewardTrainConfig, "latent_reward", "tiny"),
    (PrepareConfig, "prepare", "tiny"),
    (FinetuneConfig, "finetune", "tiny"),
    (PreferenceTrainConfig, "preference", "tiny"),
]
TREES = [(model, load_config(model, name, group=group).model_dump(mode="json")) for model, group, name in PACKAGED]
SUM_OF_CUSTOM = {
    "kind": "sum",
    "terms": {"a": {"reward": {"kind": "custom", "target": "os:system", "options": {"x": [1, {"y": None}]}}}},
}
TREES.append(
    (DistillConfig, TREES[0][1] | {"reward": SUM_OF_CUSTOM, "prompts": {"kind": "file", "train": "a", "heldout": "b"}})
)


def fuzz(count: int, cases: st.SearchStrategy[Any], check: Callable[[Any], None]) -> None:
    """Check so many cases, the same ones each time; fewer is a failure.

    An example of Hypothesis is several: its own work on each takes longer than a check.
    """
    seen = 0

    @settings(
        max_examples=-(-count // CASES),
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.tuples(*[cases] * CASES))
    def each(several: tuple[Any, ...]) -> None:
        nonlocal seen
        for case in several:
            seen += 1
            with in_time(case):
                check(case)

    each()
    assert seen >= count


@contextmanager
def in_time(case: object) -> Iterator[None]:
    """Fail when the processor works longer on a case than it ever should; waiting for it does not count."""

    def stop(*_: object) -> None:
        raise AssertionError(f"hangs on {case!r:.500}")

    before = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, CPU_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


def taken(model: type[BaseModel], path: Path, *overrides: str) -> BaseModel | None:
    """The configuration, or None if it got its line."""
    try:
        return load_config(model, str(path), group="distill", overrides=overrides)
    except UserError as error:
        line = str(error)
        assert line.strip()
        assert "\n" not in line
        assert not CONTROLS.search(line)
        assert len(line) < 10_000, line[:500]
        return None


def test_there_are_ten_thousand() -> None:
    assert NUM_TEXTS + NUM_TREES + NUM_OVERRIDES >= 10_000


# ------------------------------------------------------------------------------------------------------------- values

HUGE = 10**400
HOSTILE: list[Any] = [
    None, True, False, 0, 1, -1, 2, 3.5, -0.0, 1e-320, 1e308, float("nan"), float("inf"), -float("inf"), 2**31 - 1, 2**31,
    2**63, -(2**63), HUGE, "", " ", ".", "..", "/", "/dev/zero", "/dev/stdin", "/proc/self/mem", "~", "~nobody-here/x",
    "../../../etc/passwd", "a" * 5_000, "tiny-wan", "\x00", "\x1b[2J", "\u202egnp", "\ud800", "line\nline", "1e5", "nan",
    "0x10", "true", "null", "!!python/object:os.system", "${HOME}", "{{x}}", "%s%n", "os:system", "a.b.c:d", "a:b:c", ":",
    [], [[]], [None], [0] * 1_000, ["a"] * 1_000, list(range(200)), {}, {"kind": None}, {"kind": []}, {"kind": {"kind": "x"}},
    {"kind": "custom"}, {"kind": "sum", "terms": {}}, {"kind": "lora"}, {"kind": "file", "train": 1}, {"kind": "ema"},
    {1: 2}, {None: 1}, {True: 1}, {1.5: 1}, {"": 1}, {"\x1b": 1}, {"a" * 5_000: 1}, {f"k{i}": i for i in range(500)},
    {"__class__": "os"}, {"model_config": {}}, {"extends": "tiny"},
    SUM_OF_CUSTOM, {"kind": "custom", "target": "subprocess:Popen", "options": {"args": ["true"]}},
]  # fmt: skip


def paths(node: Any, above: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every key of a tree, and every item of its lists."""
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, below in items:
        yield (*above, key)
        yield from paths(below, (*above, key))


ALL_PATHS = [(model, pickle.dumps(tree), st.sampled_from(list(paths(tree)))) for model, tree in TREES]
number_of_deeds = st.integers(1, 3)
all_paths = st.sampled_from(range(len(ALL_PATHS)))
scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
values = st.sampled_from(HOSTILE) | st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(scalars, inner, max_size=3), max_leaves=4
)
deeds = st.sampled_from(["set", "set", "set", "drop", "rename", "add"])


@st.composite
def trees(draw: st.DrawFn) -> tuple[type[BaseModel], Any]:
    """A packaged configuration with one to three of its keys changed, left out, misspelt or joined by others."""
    model, pickled, keys = ALL_PATHS[draw(all_paths)]
    tree = pickle.loads(pickled)
    for _ in range(draw(number_of_deeds)):
        *above, key = draw(keys)
        node: Any = tree
        for part in above:
            node = node[part] if isinstance(node, dict) and part in node else None
        if not isinstance(node, dict):  # an earlier deed has taken it away
            continue
        match draw(deeds):
            case "set":
                node[key] = draw(values)
            case "drop":
                node.pop(key, None)
            case "rename":
                node[draw(scalars)] = node.pop(key, None)
            case "add":
                node[draw(scalars)] = draw(values)
    return model, tree


def test_values(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What YAML would have read is given straight to the loader: PyYAML takes most of the time."""
    file = tmp_path / "hostile.yaml"
    file.touch()
    read = load._read_mapping
    given_: dict[str, Any] = {}
    written: set[str] = set()
    survivors = 0
    monkeypatch.setattr(
        load, "_read_mapping",
        lambda path, label, asked_by: dict(given_["tree"]) if path == file else read(path, label, asked_by),
    )  # fmt: skip

    def check(case: tuple[type[BaseModel], Any]) -> None:
        nonlocal survivors
        model, given_["tree"] = case
        config = taken(model, file)
        if config is not None:
            survivors += 1
            if repr(config) in written:  # PyYAML takes most of the time here, too
                return
            written.add(repr(config))
            assert model.model_validate(load._parse_yaml(dump_config(config), "")) == config

    fuzz(NUM_TREES, trees(), check)
    assert survivors > 500  # or the mutations were too coarse to get anywhere


# --------------------------------------------------------------------------------------------------------------- text

BOMBS = [
    "a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]", "&a [*a]", "<<: *x", "<<: {a: 1}", "<<: [1, 2]", "a: {<<: {b: 1}}",
    "!!python/object/apply:os.system ['true']", "a: !!python/name:os.system", "a: !!binary aGk=", "a: !<x> 1", "!!set {a}",
    "%YAML 9.9\n---\na: 1", "%TAG ! tag:x,2000:\n---\na: !b 1", "---\n---\n", "--- a\n... b\n--- c", "? a\n? b", "? [a]\n: 1",
    "? {a: 1}\n: 1", "[" * 5_000, "{a: " * 5_000, "- " * 5_000, "? " * 3_000, "a:\n " * 3_000, "a: " + "9" * 100_000,
    "seed: 0x" + "f" * 100_000, "seed: " + "1:" * 50_000 + "1", "seed: " + "1:" * 5_000 + "1.5", "seed: 0b", "seed: 0x_",
    "seed: 0o8", "seed: 1e999999999", "seed: -.inf", "seed: .nan", "seed: ._", "seed: =", "seed: 2024-99-99", "a: |\n" + "x" * 200_000,
    "a: 1\na: 2", "1: a\n0x1: b", "~: 1", "true: 1", ".nan: 1\n.NaN: 2", "\ufeffseed: 1", "seed: 1\x00", "seed: \x1b[2J", '"\\e[2J": 1',
    'model: "\\u202e\\ud800\\0"', "a: 'x", 'a: "x', 'a: "\\q"', "\ta: 1", "a:\n\t- 1", "a: @", "a: `", "a: %", "a: *", "a: &", "a: !",
    "extends: hostile.yaml", "extends: ./hostile.yaml", "extends: [./hostile.yaml, ./hostile.yaml]", "extends: /dev/zero.yaml",
    "extends: /dev/stdin", "extends: ./pipe.yaml", "extends: /proc/self/environ", "extends: ./zero.yaml", "extends: ./folder.yaml",
    "extends: ../../../../etc/passwd", "extends: ''", "extends: ' '", "extends: {a: b}", "extends: [[x]]", "extends: null",
    "extends: tiny\nseed: 1", "extends: [tiny, tiny]", "extends: 'a\\0b.yaml'", 'extends: "\\0.yaml"', "extends: " + "a/" * 3_000 + "b.yaml",
    "extends: ~nobody/x.yaml", "extends: ./wide0.yaml", "extends: ./long0.yaml", "\n".join(f"k{i}: 1" for i in range(8_000)),
    "\n".join(f"{'k' * 500}{i}: 1" for i in range(400)), "teacher: {" + ", ".join(f"k{i}: 1" for i in range(2_000)) + "}", "",
    "#" * 200_000, "# only this", "\r\n\r\n", "seed: 1\r", "x" * 300_000,
]  # fmt: skip
SNIPPETS = ["&a ", "*a", "!!int ", "!x ", "<<: ", "? ", "- ", "[", "]", "{", "}", "'", '"', "|\n", ">\n", "---\n", "%", "\t", "\n", ": ", "# ",
            "\x00", "\x1b", "\u2028", "\ufeff", "9" * 5_000, "extends: ./hostile.yaml\n", ".nan", "-.inf", "0x", "~", "kind: "]  # fmt: skip
SHORT_TEXT = yaml.safe_dump(
    {key: value for key, value in TREES[0][1].items() if key in {"model", "reward", "method", "teacher", "training"}}
)


@st.composite
def mutated(draw: st.DrawFn) -> bytes:
    """A sound configuration with pieces cut out, said twice, or replaced by what YAML gives a meaning to."""
    text = draw(st.sampled_from([SHORT_TEXT, "extends: tiny\n", "extends: [tiny, tiny-ema]\nmodel: x\n"]))
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(text)))
        end = min(len(text), start + draw(st.integers(0, 12)))
        piece = draw(st.sampled_from([*SNIPPETS, text[start:end] * 2]) | st.text(max_size=4))
        text = text[:start] + piece + text[end:]
    data = text.encode("utf-8", "surrogatepass")
    return data[: draw(st.integers(0, len(data)))] if draw(st.booleans()) else data


def folder_of_traps(folder: Path) -> None:
    """What a hostile `extends` may name: a device, a pipe that nobody writes to, a folder, wide and long ancestries."""
    import os

    os.mkfifo(folder / "pipe.yaml")
    (folder / "zero.yaml").symlink_to("/dev/zero")
    (folder / "folder.yaml").mkdir()
    for i in range(40):
        (folder / f"wide{i}.yaml").write_text(f"extends: [./wide{i + 1}.yaml, ./wide{i + 1}.yaml]")
    (folder / "wide40.yaml").write_text("extends: tiny")
    for i in range(1_500):
        (folder / f"long{i}.yaml").write_text(f"extends: ./long{i + 1}.yaml")
    (folder / "long1500.yaml").write_text("extends: tiny")


def test_texts(tmp_path: Path) -> None:
    folder_of_traps(tmp_path)
    file, loaded = tmp_path / "hostile.yaml", 0

    def check(data: bytes) -> None:
        nonlocal loaded
        file.write_bytes(data)
        config = taken(DistillConfig, file)
        if config is not None:
            loaded += 1
            file.write_text(dump_config(config))
            assert load_config(DistillConfig, str(file), group="distill") == config

    for bomb in BOMBS:
        with in_time(bomb):
            check(bomb.encode("utf-8", "surrogatepass"))
    fuzz(
        NUM_TEXTS - len(BOMBS),
        mutated() | st.binary(max_size=64) | st.text(max_size=64).map(lambda t: t.encode("utf-8", "replace")),
        check,
    )
    assert loaded >= 5  # small damage is mostly fatal


# -------------------------------------------------------------------------------------------------------------- --set

DOTTED = [".".join(map(str, path)) for path in paths(TREES[0][1])]


@st.composite
def overrides(draw: st.DrawFn) -> list[str]:
    """One to three `--set`, of keys that exist or not, to values that YAML may or may not read."""
    keys = (
        st.sampled_from(DOTTED)
        | st.text(max_size=12)
        | st.sampled_from(["", ".", "a.." * 9, "a." * 40 + "a", "training", "kind"])
    )
    texts = st.sampled_from([*BOMBS[:50], *(str(value) for value in HOSTILE if value is not HUGE)]) | st.text(
        max_size=12
    )
    each = st.tuples(keys, st.sampled_from(["=", "=", "=", "", "=="]), texts).map("".join)
    return draw(st.lists(each, min_size=1, max_size=3))


def test_overrides(tmp_path: Path) -> None:
    file = tmp_path / "base.yaml"
    file.write_text(SHORT_TEXT)

    def check(given_: list[str]) -> None:
        config = taken(DistillConfig, file, *given_)
        if config is not None:
            assert DistillConfig.model_validate(load._parse_yaml(dump_config(config), "")) == config

    fuzz(NUM_OVERRIDES, overrides(), check)
