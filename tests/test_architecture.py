"""The rules of architecture.md, read from the source: each checker is also shown a snippet that breaks its rule."""

from __future__ import annotations

import ast
import graphlib
import re
import tomllib
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SETUPTOOLS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]

# From the top down: a room imports from the groups below its own, never from a neighbour beside it.
LAYERS = (
    {"cli", "api"},  # for people, and for Python
    {"commands"},
    {"planning", "pretraining", "preparation", "rating", "reporting"},
    {"distillation", "export"},
    {"training"},
    {"evaluation"},
    {"inference"},
    {"methods"},
    {"backbones", "rewards", "datasets"},
    {"optim", "meta", "progress"},
    {"diffusion", "config"},
    {"assets"},
    {"hub"},
    {
        "arguments",
        "files",
        "hub_errors",
        "motion_path",
        "quiet",
        "reading",
        "runtime",
        "seeds",
        "timing",
        "user_code",
        "web",
    },  # small tools
    {"types", "errors", "configs", ""},  # configs is data; "" is rats_video/__init__.py
    {"condition", "sound"},
)
SEES_PROTOCOLS_ONLY = {"methods": {"backbones", "rewards"}}
EXCEPTIONS = {
    ("rats_video.methods.t2v_turbo", "rats_video.rewards.reward"),  # its settings hold a second reward
    ("rats_video", "rats_video.api"),  # offered to users, loaded when asked for; nothing of ours goes that way
}
HEAVY = {
    "av", "decord", "diffusers", "gradio", "matplotlib", "tensorboard", "torchao", "trackio", "transformers", "wandb",
    "xformers",
}  # fmt: skip
MAX_FILE_LINES = 300
MAX_IMPORTS = 20  # modules of ours that one module imports
MAX_FUNCTION_LINES = 60
MAX_STEP_LINES = 40

Tree = ast.Module


def source_files() -> dict[str, Path]:
    """Every module by its installed name."""
    mapping = sorted(SETUPTOOLS["package-dir"].items(), key=lambda item: len(item[0]))
    modules = {}
    for package, folder in mapping:
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = [package, *path.relative_to(ROOT / folder).with_suffix("").parts]
            modules[".".join(parts).removesuffix(".__init__")] = path
    return modules


FILES = source_files()


@cache
def parsed() -> dict[str, Tree]:
    """All of them: whoever runs other tests need not wait for that."""
    return {name: ast.parse(path.read_text(), str(path)) for name, path in FILES.items()}


def group(module: str) -> str:
    """`cli` of `rats_video.cli.app`."""
    return [*module.split("."), ""][1]


def imports(name: str, tree: Tree, known: set[str]) -> Iterator[str]:
    """The modules of ours that `name` imports, anywhere in it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(name.split(".")[: -node.level]) if node.level else ""
            origin = ".".join(filter(None, (base, node.module)))
            targets = [full if (full := f"{origin}.{alias.name}") in known else origin for alias in node.names]
        else:
            continue
        yield from (target for target in targets if target.split(".")[0] == "rats_video" and target != name)


def at_top_level(node: ast.AST) -> Iterator[ast.AST]:
    """What runs when the module is imported."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(child, ast.If) and ast.unparse(child.test).endswith("TYPE_CHECKING"):
            continue
        yield child
        yield from at_top_level(child)


def imported_libraries(nodes: Iterator[ast.AST]) -> set[str]:
    names = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module.split(".")[0])
    return names


# ------------------------------------------------------------------------------------- rules on one module


def only_imports_downward(name: str, tree: Tree) -> list[str]:
    rank = {each: index for index, layer in enumerate(LAYERS) for each in layer}
    here = group(name)
    assert here in rank, f"{name} belongs to no layer"
    return [
        f"{name} imports {target}"
        for target in imports(name, tree, set(FILES))
        if (
            ((there := group(target)) != here and rank.get(there, -1) <= rank[here])
            or there in SEES_PROTOCOLS_ONLY.get(here, ())
        )
        and (name, target) not in EXCEPTIONS
    ]


def no_heavy_import_at_top_level(name: str, tree: Tree) -> list[str]:
    banned = HEAVY | ({"torch", "numpy", "accelerate"} if group(name) == "cli" else set())
    return [f"{name} imports {library} at its top" for library in imported_libraries(at_top_level(tree)) & banned]


def no_long_function(name: str, tree: Tree) -> list[str]:
    """Counts from `def` to the end, without the docstring: explaining must cost nothing."""
    too_long = []
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = node.end_lineno - node.lineno + 1
            if ast.get_docstring(node) is not None:
                lines -= node.body[0].end_lineno - node.body[0].lineno + 1
            if lines >= (MAX_STEP_LINES if node.name == "rats_step" else MAX_FUNCTION_LINES):
                too_long.append(f"{name}.{node.name}: {lines} lines")
    return too_long


def few_imports(name: str, tree: Tree) -> list[str]:
    found = set(imports(name, tree, set(FILES)))
    return [f"{name} imports {len(found)} of our modules"] if len(found) > MAX_IMPORTS else []


def no_global(name: str, tree: Tree) -> list[str]:
    return [f"{name}:{node.lineno}" for node in ast.walk(tree) if isinstance(node, ast.Global)]


def no_rebound_forward(name: str, tree: Tree) -> list[str]:
    found = []
    for node in ast.walk(tree):
        stored = isinstance(node, ast.Attribute) and node.attr == "forward" and isinstance(node.ctx, ast.Store)
        by_setattr = isinstance(node, ast.Call) and re.match(r"setattr\(.*, 'forward',", ast.unparse(node))
        if stored or by_setattr:
            found.append(f"{name}:{node.lineno}")
    return found


def no_broad_except(name: str, tree: Tree) -> list[str]:
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ExceptHandler):
            caught = node.type.elts if isinstance(node.type, ast.Tuple) else [node.type]
            if any(kind is None or ast.unparse(kind) in {"Exception", "BaseException"} for kind in caught):
                found.append(f"{name}:{node.lineno}")
    return found


Rule = Callable[[str, Tree], list[str]]
BREAKS: list[tuple[Rule, str, str]] = [
    (only_imports_downward, "rats_video.config.load", "from rats_video.cli import app"),
    (only_imports_downward, "rats_video.rewards.a", "def f():\n    import rats_video.backbones.wan"),
    (only_imports_downward, "rats_video.training.loop", "from rats_video.commands import run_distill"),
    (only_imports_downward, "rats_video.methods.rats", "from rats_video.backbones.wan import Wan"),
    (only_imports_downward, "rats_video.methods.rats", "from rats_video import rewards"),
    (only_imports_downward, "rats_video.diffusion.flow", "from ..config import load"),
    (only_imports_downward, "rats_video.types", "from rats_video.errors import UserError"),
    (no_heavy_import_at_top_level, "rats_video.backbones.wan", "from diffusers import X"),
    (
        no_heavy_import_at_top_level,
        "rats_video.backbones.wan",
        "try:\n    import av.video\nexcept ImportError:\n    pass",
    ),
    (no_heavy_import_at_top_level, "rats_video.cli.run", "class A:\n    import torch.nn as nn"),
    (no_long_function, "rats_video.a", "def f():\n" + "    x = 1\n" * MAX_FUNCTION_LINES),
    (no_long_function, "rats_video.a", "class A:\n  async def f():\n" + "    x = 1\n" * MAX_FUNCTION_LINES),
    (no_long_function, "rats_video.methods.rats", "def rats_step():\n" + "    x = 1\n" * MAX_STEP_LINES),
    (few_imports, "rats_video.cli.a", "".join(f"import rats_video.m{i}\n" for i in range(MAX_IMPORTS + 1))),
    (no_global, "rats_video.a", "def f():\n    global x\n    x = 1"),
    (no_rebound_forward, "rats_video.a", "module.forward = f"),
    (no_rebound_forward, "rats_video.a", "a, self.net.forward = f, g"),
    (no_rebound_forward, "rats_video.a", "setattr(module, 'forward', f)"),
    (no_broad_except, "rats_video.a", "try:\n    f()\nexcept:\n    pass"),
    (no_broad_except, "rats_video.a", "try:\n    f()\nexcept (OSError, Exception) as error:\n    pass"),
]
KEEPS: list[tuple[Rule, str, str]] = [
    (only_imports_downward, "rats_video.cli.run", "def f():\n    from rats_video.commands import run_all"),
    (only_imports_downward, "rats_video.evaluation.sweep", "from rats_video.inference.sampler import sample"),
    (only_imports_downward, "rats_video.methods.rats", "import torch\nfrom rats_video.types import Reward"),
    (no_heavy_import_at_top_level, "rats_video.cli.run", "def f():\n    import torch"),
    (no_heavy_import_at_top_level, "rats_video.a", "if TYPE_CHECKING:\n    import diffusers\nimport torch"),
    (
        few_imports,
        "rats_video.cli.a",
        "".join(f"from rats_video.m{i % 20} import n{i}\n" for i in range(MAX_IMPORTS + 9)),
    ),
    (no_long_function, "rats_video.a", 'def f():\n    """\n' + "x\n" * 99 + '    """\n'),
    (no_rebound_forward, "rats_video.a", "y = module.forward(x)"),
    (no_broad_except, "rats_video.a", "try:\n    f()\nexcept (OSError, ValueError):\n    pass"),
]
RULES = list(dict.fromkeys(rule for rule, _, _ in BREAKS))


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_rule(rule: Rule) -> None:
    assert [broken for name, tree in parsed().items() for broken in rule(name, tree)] == []


@pytest.mark.parametrize(("rule", "name", "source"), BREAKS)
def test_rule_sees_a_breach(rule: Rule, name: str, source: str) -> None:
    assert len(rule(name, ast.parse(source))) == 1


@pytest.mark.parametrize(("rule", "name", "source"), KEEPS)
def test_rule_lets_good_code_be(rule: Rule, name: str, source: str) -> None:
    assert rule(name, ast.parse(source)) == []


# ------------------------------------------------------------------------------------- rules on the whole


def find_cycle(edges: dict[str, set[str]]) -> list[str]:
    try:
        graphlib.TopologicalSorter(edges).prepare()
    except graphlib.CycleError as error:
        return list(error.args[1])
    return []


def module_edges(trees: dict[str, Tree]) -> dict[str, set[str]]:
    return {
        name: {target for target in imports(name, tree, set(trees)) if (name, target) not in EXCEPTIONS}
        for name, tree in trees.items()
    }


def group_edges(trees: dict[str, Tree]) -> dict[str, set[str]]:
    edges: dict[str, set[str]] = {}
    for name, targets in module_edges(trees).items():
        edges.setdefault(group(name), set()).update({group(target) for target in targets} - {group(name)})
    return edges


@pytest.mark.parametrize("edges", [module_edges, group_edges])
def test_no_import_cycle(edges: Callable[[dict[str, Tree]], dict[str, set[str]]]) -> None:
    assert find_cycle(edges(parsed())) == []


def test_cycles_are_seen() -> None:
    sources = {
        "rats_video.training.a": "from rats_video.methods import b",
        "rats_video.methods.b": "def f():\n    import rats_video.training.a",
        "rats_video.methods.c": "import rats_video.training.d",
        "rats_video.training.d": "",
    }
    trees = {name: ast.parse(source) for name, source in sources.items()}
    assert set(find_cycle(module_edges(trees))) == {"rats_video.training.a", "rats_video.methods.b"}
    del trees["rats_video.methods.b"]  # no module imports itself by a detour now, but the two packages still do
    assert find_cycle(module_edges(trees)) == []
    assert set(find_cycle(group_edges(trees))) == {"training", "methods"}


def long_files(files: dict[str, str]) -> list[str]:
    return [name for name, text in files.items() if len(text.splitlines()) > MAX_FILE_LINES]


def test_files_are_short() -> None:
    assert long_files({"a": "x\n" * MAX_FILE_LINES, "b": "x\n" * (MAX_FILE_LINES + 1)}) == ["b"]
    assert long_files({name: path.read_text() for name, path in FILES.items()}) == []


def importing_inits(files: dict[Path, Tree]) -> list[str]:
    return [
        str(path)
        for path, tree in files.items()
        if path.name == "__init__.py" and "rats_video" in imported_libraries(at_top_level(tree))
    ]


def test_init_files_import_nothing() -> None:
    assert importing_inits({Path("a/__init__.py"): ast.parse("from rats_video.b import c")}) == ["a/__init__.py"]
    assert importing_inits({Path("a/__init__.py"): ast.parse("def f():\n    import rats_video.b")}) == []
    assert importing_inits({FILES[name]: tree for name, tree in parsed().items()}) == []


def packages_on_disk(root: Path, mapping: dict[str, str]) -> set[str]:
    """Packages by the folders that hold Python, so that one without an `__init__.py` is found too."""
    return {
        ".".join([package, *path.parent.relative_to(root / folder).parts])
        for package, folder in mapping.items()
        for path in (root / folder).rglob("*.py")
    }


def test_every_package_is_listed_and_has_an_init(tmp_path: Path) -> None:
    (tmp_path / "src" / "sub").mkdir(parents=True)
    (tmp_path / "src" / "a.py").touch()
    (tmp_path / "src" / "sub" / "b.py").touch()
    assert packages_on_disk(tmp_path, {"top": "src"}) == {"top", "top.sub"}

    assert packages_on_disk(ROOT, SETUPTOOLS["package-dir"]) == set(SETUPTOOLS["packages"])
    assert set(SETUPTOOLS["packages"]) <= {name for name, path in FILES.items() if path.name == "__init__.py"}


def test_the_step_fits_one_screen() -> None:
    if "rats_video.methods.rats" not in parsed():
        pytest.skip("rats_video/methods/rats.py is not written yet")
    names = [node.name for node in ast.walk(parsed()["rats_video.methods.rats"]) if isinstance(node, ast.FunctionDef)]
    assert "rats_step" in names  # under this name its length is checked above
