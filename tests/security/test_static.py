"""What the package's source may never echo: calls that unpickle, fetch, or run what a file holds."""

from __future__ import annotations

import ast
import functools
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
FILES = [
    path for folder in ("rats_video", "cli", "datasets", "configs") for path in sorted((ROOT / folder).rglob("*.py"))
]
PICKLES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
RUNS = {"eval", "exec", "compile", "__import__", "os.system", "os.popen", "runpy.run_path"}


@functools.cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


@functools.cache
def called(node: ast.Call) -> str:
    return ast.unparse(node.func)


def calls(tree: ast.Module) -> Iterator[ast.Call]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.Call))


def said(node: ast.Call, name: str) -> str | None:
    """A keyword's value as written; `?` where some are given as `**`."""
    given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
    return given.get(name, "?" if None in given else None)


def unpickles(tree: ast.Module) -> list[str]:
    found = [
        f"{called(node)} without weights_only"
        for node in calls(tree)
        if called(node) in {"torch.load", "load"} and said(node, "weights_only") != "True"
    ]
    for node in ast.walk(tree):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        found += [f"imports {name}" for name in names if name.split(".")[0] in PICKLES]
    return found + [called(node) for node in calls(tree) if said(node, "allow_pickle") not in {None, "?", "False"}]


def runs_text(tree: ast.Module) -> list[str]:
    found = [called(node) for node in calls(tree) if called(node) in RUNS]
    found += [called(node) for node in calls(tree) if said(node, "shell") not in {None, "?", "False"}]
    return found + [called(node) for node in calls(tree) if said(node, "trust_remote_code") not in {None, "?", "False"}]


def loads_any_yaml(tree: ast.Module) -> list[str]:
    unsafe = {"load", "load_all", "unsafe_load", "full_load", "Loader", "UnsafeLoader", "FullLoader", "CLoader"}
    return [
        ast.unparse(node)
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and node.attr in unsafe and ast.unparse(node.value) == "yaml"
    ]


def fetches(tree: ast.Module) -> list[str]:
    """`from_pretrained` of the hub's libraries, which fetch, or unpickle where they find no safetensors."""
    ours = {"cls", "family", "Self", "WanBackbone", "PipelineBackbone", "Backbone"}
    return [
        f"{called(node)}, line {node.lineno}"
        for node in calls(tree)
        if called(node).endswith(".from_pretrained")
        and called(node).rpartition(".")[0] not in ours
        and not (node.args and ast.unparse(node.args[0]) == "None")
        and said(node, "local_files_only") != "True"
    ]


Rule = Callable[[ast.Module], list[str]]
RULES: list[Rule] = [unpickles, runs_text, loads_any_yaml, fetches]
BREAKS: list[tuple[Rule, str]] = [
    (unpickles, "torch.load(path)"),
    (unpickles, "torch.load(path, weights_only=False)"),
    (unpickles, "torch.load(path, weights_only=flag)"),
    (unpickles, "import pickle"),
    (unpickles, "def f():\n    from dill import loads"),
    (unpickles, "np.load(path, allow_pickle=True)"),
    (runs_text, "eval(text)"),
    (runs_text, "def f():\n    exec(text)"),
    (runs_text, "subprocess.run(line, shell=True)"),
    (runs_text, "os.system(line)"),
    (runs_text, "AutoModel.from_pretrained(folder, trust_remote_code=True)"),
    (loads_any_yaml, "yaml.load(text, Loader)"),
    (loads_any_yaml, "yaml.unsafe_load(text)"),
    (loads_any_yaml, "class L(yaml.FullLoader): pass"),
    (fetches, "AutoTokenizer.from_pretrained(folder)"),
    (fetches, "kind.from_pretrained(folder, use_safetensors=True)"),
]
KEEPS: list[tuple[Rule, str]] = [
    (unpickles, "torch.load(path, weights_only=True)"),
    (runs_text, "model.eval()"),
    (runs_text, "re.compile(text)"),
    (runs_text, "AutoTokenizer.from_pretrained(folder, trust_remote_code=False)"),
    (loads_any_yaml, "yaml.safe_load(text)"),
    (fetches, "kind.from_pretrained(folder, local_files_only=True)"),
    (fetches, "kind.from_pretrained(None, config=config, state_dict=weights)"),
    (fetches, "cls.from_pretrained(folder)"),
]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_rule(rule: Rule) -> None:
    assert len(FILES) > 100
    broken = {path.relative_to(ROOT).as_posix(): found for path in FILES if (found := rule(parsed(path)))}
    # It turns published pickles into safetensors, reading tensors only, and names the error of a refusal.
    assert broken.pop("rats_video/rewards/convert.py", ["imports pickle"]) == ["imports pickle"]
    # What worker processes hand back to the process that started them, as multiprocessing itself would.
    assert broken.pop("datasets/video/isolated_worker.py", ["imports pickle"]) == ["imports pickle"]
    assert broken == {}


@pytest.mark.parametrize(("rule", "source"), BREAKS)
def test_rule_sees_a_breach(rule: Rule, source: str) -> None:
    assert len(rule(ast.parse(source))) == 1


@pytest.mark.parametrize(("rule", "source"), KEEPS)
def test_rule_lets_good_code_be(rule: Rule, source: str) -> None:
    assert rule(ast.parse(source)) == []


def test_only_named_code_of_the_user_is_imported_by_name() -> None:
    found = {
        path.name
        for path in FILES
        for node in calls(parsed(path))
        if called(node).endswith(("import_module", "exec_module"))
        and not (node.args and isinstance(node.args[0], ast.Constant))  # a library, named in the code
    }
    assert found == {"user_code.py"}
