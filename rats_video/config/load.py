"""Configs in YAML: found by name or path, merged through `extends`, changed by `--set`, checked by pydantic.

Whatever is wrong ends as one `UserError` line that names the file or `--set`, the dotted key, and the way out.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from functools import reduce
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from rats_video.config.explain import KIND, Layer, Tree, explain, nearest, refuse_truth_values, show
from rats_video.config.fields import Config
from rats_video.errors import UserError
from rats_video.files import replacing
from rats_video.reading import read_text

ModelT = TypeVar("ModelT", bound=BaseModel)
_MAX_DEPTH = 32
_MOST_YAML = 2**18  # bytes: a second's work for a parser in Python
_MOST_FILES = 64  # that one config may be made of
_MOST_NAMES = 30  # that an error lists
KEY = re.compile(rf"[\w-]+(?:\.[\w-]+){{0,{_MAX_DEPTH - 1}}}")
"""A dotted key of a configuration."""
_OVERRIDE = re.compile(rf"(?P<key>{KEY.pattern})=(?P<value>.*)", re.DOTALL)


def load_config(model: type[ModelT], name_or_path: str, *, group: str, overrides: Sequence[str] = ()) -> ModelT:
    """Read a config and check it against `model`.

    A later layer wins: defaults that are models, files from the most distant `extends` down, then `overrides`. Mappings
    merge key by key, lists are replaced (`--set rewards.0.weight=2` reaches into one), and a mapping whose `kind`
    changes starts afresh: the old kind's keys mean nothing to the new one.

    Args:
        model: root of the config, with `extra="forbid"`.
        name_or_path: a packaged name ("tiny"), or a path: it has a separator or ends in .yaml or .yml.
        group: folder of the packaged configs: distill, vae, teacher, reward or latent_reward.
        overrides: `a.b=value` each, the value in YAML.

    Raises:
        UserError: for anything the user can mend.
    """
    layers = [("default", _defaults(model)), *_file_layers(name_or_path, group)]
    changes = [_parse_override(text) for text in overrides]
    # Joined before they meet the files, so that `gate.kind` keeps its new siblings in whichever order they are given.
    merged: Tree = reduce(_merge, (*(tree for _, tree in layers), _joined(changes)))
    try:
        config = model.model_validate(merged)
    except ValidationError as error:
        raise explain(error, model, merged, [*layers, *changes]) from None
    refuse_truth_values(merged, config, [*layers, *changes])
    return config


def read_tree(path: Path) -> Tree:
    """A config file's own content, checked against no model, without the configs that it extends.

    Raises:
        UserError: it cannot be read, or holds no YAML mapping.
    """
    return _read_mapping(path, str(path), asked_by="")


def dump_config(config: BaseModel) -> str:
    """YAML of every value, defaults included; loads back to an equal config."""
    return yaml.dump(config.model_dump(mode="json"), Dumper=_Dumper, sort_keys=False, width=120)


def write_resolved(config: BaseModel, path: Path) -> None:
    """Write `dump_config` in one step: a reader sees the old file or the new one, never half of one."""
    with replacing(path, "config") as partial:
        partial.write_text(dump_config(config), encoding="utf-8")


def check_extension(path: Path, parent: str) -> None:
    """Raise UserError if `write_extension` could write no config that loads."""
    if path.suffix not in {".yaml", ".yml"}:
        raise UserError("a config's name ends in .yaml or .yml", where=str(path))
    if _is_path(parent) and Path(parent).resolve() == path.resolve():
        raise UserError("would extend itself", where=str(path), fix="give another name")


def write_extension(path: Path, parent: str, overrides: Sequence[str], changes: Tree, remarks: Sequence[str]) -> None:
    """Write a config that extends `parent`, a packaged name or a path, by overrides as of `--set`, then `changes`.

    Raises:
        UserError: it cannot be written.
    """
    extends = {"extends": str(Path(parent).resolve()) if _is_path(parent) else parent}
    tree = _merge(extends | _joined([_parse_override(text) for text in overrides]), changes)
    comments = "".join(f"{f'# {remark}'.rstrip()}\n" for remark in remarks)
    with replacing(path, "config") as partial:
        partial.write_text(comments + yaml.dump(tree, Dumper=_Dumper, sort_keys=False, width=120), encoding="utf-8")


class _Dumper(yaml.SafeDumper):
    """Writes shared values twice: `_Loader` takes no aliases."""

    def ignore_aliases(self, data: object) -> bool:  # noqa: ARG002
        return True


class _Loader(yaml.SafeLoader):
    """Plain trees only. No aliases, tags or deep nesting means no bombs and no cycles; a repeated key is a slip."""

    # A date would only surprise: 2024-01-01 stays text.
    yaml_implicit_resolvers = {  # noqa: RUF012
        first: [rule for rule in rules if rule[0] != "tag:yaml.org,2002:timestamp"]
        for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        event = self.peek_event()  # type: ignore[no-untyped-call]
        if isinstance(event, yaml.AliasEvent):
            raise _refusal("aliases (*name) are not allowed", event)
        if getattr(event, "tag", None):
            raise _refusal(f"tag {event.tag} is not allowed", event)
        if self.depth == _MAX_DEPTH:
            raise _refusal("nested too deeply", event)
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:  # noqa: FBT001, FBT002
        seen: set[str] = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                raise _refusal(f"key {key.value!r} is given twice", key)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def _refusal(problem: str, at: Any) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=at.start_mark)


def _parse_yaml(text: str, where: str) -> object:
    try:
        return _Loader(text).get_single_data()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f", line {mark.line + 1}" if mark and not where.startswith("--set") else ""
        raise UserError(f"not valid YAML: {error.problem or error.context}", where=f"{where}{line}") from None
    except yaml.reader.ReaderError as error:
        raise UserError(f"not valid YAML: character {error.position + 1} is not text", where=where) from None
    except (ValueError, OverflowError):  # a number Python refuses to build: thousands of digits, or an empty 0x_
        raise UserError("a number that cannot be read", where=where) from None


def _file_layers(
    name_or_path: str,
    group: str,
    child: Path | None = None,
    chain: tuple[str, ...] = (),
    opened: list[str] | None = None,
) -> list[Layer]:
    """The file's ancestors, most distant first, then the file.

    Args:
        name_or_path: as `load_config` takes it.
        group: folder of the packaged configs.
        child: the file that extends it.
        chain: labels of the files that lead here.
        opened: labels of all files read so far; two parents a file are 2^n files.
    """
    opened = [] if opened is None else opened
    packaged = Path(str(resources.files("rats_video.configs"))) / group
    by_path = _is_path(name_or_path)
    folder = (child.parent if child else Path()) if by_path else packaged
    path = Path(os.path.normpath(folder / (name_or_path if by_path else f"{name_or_path}.yaml")))
    label = f"configs/{group}/{path.name}" if path.parent == packaged else str(path)

    tree = _read_mapping(path, label, asked_by=f"{chain[-1]}: extends" if chain else "")
    opened.append(label)
    if len(opened) > _MOST_FILES:
        raise UserError(f"is made of more than {_MOST_FILES} files", where=opened[0])
    if label in chain:
        raise UserError(f"extends itself: {' -> '.join((*chain, label))}", where=chain[0])
    parents = tree.pop("extends", [])
    parents = [parents] if isinstance(parents, str) else parents
    if not isinstance(parents, list) or not all(isinstance(parent, str) for parent in parents):
        raise UserError(f"must be a name or a list of names, got {show(parents)}", where=f"{label}: extends")
    above = [layer for parent in parents for layer in _file_layers(parent, group, path, (*chain, label), opened)]
    return [*above, (label, tree)]


def _is_path(name_or_path: str) -> bool:
    return name_or_path.endswith((".yaml", ".yml")) or "/" in name_or_path or os.sep in name_or_path


def _joined(changes: Sequence[Layer]) -> Tree:
    return reduce(_merge, (tree for _, tree in changes), {})


def _read_mapping(path: Path, label: str, asked_by: str) -> Tree:
    try:
        text = read_text(path, _MOST_YAML)
    except FileNotFoundError:
        # _name.yaml is there to be extended
        names = sorted(other.stem for other in path.parent.glob("*.y*ml") if other.stem[0] != "_")
        fix = f"{nearest(path.stem, names)} available: {', '.join(names[:_MOST_NAMES]) or 'none'}".lstrip()
        raise UserError(f"no config {label!r}", where=asked_by, fix=fix) from None
    except UnicodeDecodeError as error:
        raise UserError(f"not UTF-8 text at byte {error.start}", where=label, fix="save it as UTF-8") from None
    except OSError as error:
        raise UserError(f"cannot be read: {error.strerror}", where=label) from None
    except ValueError:  # a zero byte in the path
        raise UserError(f"not a path: {show(str(path))}", where=asked_by) from None
    tree = _parse_yaml(text, label)
    if tree is None:  # only comments: every key keeps its default
        return {}
    if not isinstance(tree, dict):
        raise UserError(f"must hold `key: value` lines, got {show(tree)}", where=label)
    return tree


def as_overrides(settings: Mapping[str, Any]) -> list[str]:
    """Dotted keys and their values, as `KEY=VALUE`; raises UserError for anything else."""
    fix = 'as {"training.steps": 100}'
    if not isinstance(settings, Mapping):
        raise UserError(f"must be keys and values, got {settings!r}", where="settings", fix=fix)
    for key in settings:
        if not isinstance(key, str) or not KEY.fullmatch(key):
            raise UserError(f"{key!r} is not a key", where="settings", fix=fix)
    return [f"{key}={json.dumps(value, default=str)}" for key, value in settings.items()]


def _parse_override(text: str) -> Layer:
    match = _OVERRIDE.fullmatch(text)
    if not match:
        raise UserError(f"{show(text)} is not KEY=VALUE", where="--set", fix="like --set seed=1")
    where = f"--set {match['key']}"
    tree: Any = _parse_yaml(match["value"], where)
    for part in reversed(match["key"].split(".")):
        tree = {part: tree}
    return where, tree


def _defaults(model: type[BaseModel]) -> Tree:
    """Defaults that are models, so that one key of such a default can be set without repeating the others."""
    found: Tree = {}
    for name, field in model.model_fields.items():
        default = None if field.default_factory_takes_validated_data else field.get_default(call_default_factory=True)
        if isinstance(default, BaseModel):
            found[name] = default.model_dump()
        elif isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            found |= {name: below} if (below := _defaults(field.annotation)) else {}
    return found


def _merge(base: Any, over: Any) -> Any:
    if isinstance(base, list) and isinstance(over, dict):
        items = {str(index): item for index, item in enumerate(base)}
        return list(_merge(items, over).values()) if over.keys() <= items.keys() else over
    if not isinstance(base, dict) or not isinstance(over, dict):
        return over
    if KIND in base and KIND in over and base[KIND] != over[KIND]:
        return over
    return base | {key: _merge(base[key], value) if key in base else value for key, value in over.items()}


ConfigT = TypeVar("ConfigT", bound=Config)


def load_seeded(
    model: type[ConfigT], config: str, *, group: str, overrides: Sequence[str], seed: int | None
) -> ConfigT:
    """The configuration a command was given; `--seed` is its last override."""
    extra = [] if seed is None else [f"seed={seed}"]
    return load_config(model, config, group=group, overrides=[*overrides, *extra])
