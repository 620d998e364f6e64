"""Turns what pydantic found wrong into one line: which file or `--set`, which key, what is wrong, how to mend it."""

from __future__ import annotations

import difflib
import re
import reprlib
from collections.abc import Iterable, Sequence
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from rats_video.errors import UserError

KIND = "kind"  # the discriminator of every union of choices
Tree = dict[str, Any]
Layer = tuple[str, Tree]  # where it comes from, as an error line names it, and what it says
KeyPath = tuple[str | int, ...]

# Errors whose message already holds the value, or that have none to show.
_SELF_EVIDENT = {"extra_forbidden", "missing", "union_tag_invalid", "union_tag_not_found", "value_error"}
_LISTS = ("list_type", "tuple_type", "set_type", "frozen_set_type")
_GROUPS = ("dict_type", "model_type", "model_attributes_type")
_SENTENCES = {  # by pydantic's type of error; what is not here keeps its message
    **dict.fromkeys(("int_type", "int_parsing", "int_from_float"), "must be a whole number"),
    "int_parsing_size": "must be a whole number of fewer digits",
    **dict.fromkeys(("float_type", "float_parsing"), "must be a number"),
    **dict.fromkeys(("bool_type", "bool_parsing"), "must be true or false"),
    **dict.fromkeys(_LISTS, "must be a list"),
    **dict.fromkeys(_GROUPS, "must be a group of keys"),
    "string_type": "must be text",
    "none_required": "must be null",
    "literal_error": "must be {expected}",
    "string_pattern_mismatch": "must be a plain name (of the pattern {pattern})",
    "extra_forbidden": "unknown key",
    "missing": "required, but missing",
    "json_invalid": "is no JSON: {error}",
}
_BOUNDS = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}
_MOST_DESCRIBED = 100  # each is compared with all valid keys
_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 60


def explain(error: ValidationError, model: type[BaseModel], merged: Tree, layers: Sequence[Layer]) -> UserError:
    """The first mistake in full and the number of others.

    Args:
        error: what pydantic raised.
        model: the root it checked against.
        merged: the tree it checked.
        layers: what `merged` was made of, in order, to name the file or `--set` at fault.
    """
    # A misspelt key also leaves the right one missing: the misspelling is the line to show.
    details = sorted(error.errors(), key=lambda detail: detail["type"] not in {"extra_forbidden", "union_tag_invalid"})
    described = [(*_describe(detail, model, merged), _found(detail)) for detail in details[:_MOST_DESCRIBED]]
    first = described[0][0]
    # `int | Literal["auto"]` fails once a member: one mistake with alternatives, told where a member got furthest.
    mine = [each for each in described if first in (each[0][: len(first)], each[0])]
    path = max((each[0] for each in mine), key=len)
    _, whats, fixes, found = zip(*(each for each in mine if each[0] == path), strict=True)
    what = " or ".join(dict.fromkeys((whats[0], *(each.removeprefix("must be ") for each in whats[1:])))) + found[0]
    more = len({each[0] for each in described} - {each[0] for each in mine})
    fix = "; ".join(filter(None, (next(filter(None, fixes), ""), f"and {more} more" if more else "")))
    return UserError(what, where=_where(layers, path), fix=fix)


def refuse_truth_values(given: object, taken: object, layers: Sequence[Layer], path: KeyPath = ()) -> None:
    """Raise UserError where true or false was given and pydantic took it for the number 1 or 0."""
    if isinstance(given, bool) and isinstance(taken, int | float) and not isinstance(taken, bool):
        raise UserError(f"must be a number, got {str(given).lower()}", where=_where(layers, path))
    keys = given if isinstance(given, dict) else range(len(given)) if isinstance(given, list) else ()
    for key in keys:
        if isinstance(taken, BaseModel) and isinstance(key, str):
            below = getattr(taken, key, None)
        elif isinstance(taken, dict):
            below = taken.get(key)
        else:
            below = taken[key] if isinstance(taken, list | tuple) else None
        refuse_truth_values(given[key], below, layers, (*path, key))  # type: ignore[index]


def _where(layers: Sequence[Layer], path: KeyPath) -> str:
    """The file or `--set` that says it, and the dotted key."""
    dotted = ".".join(str(part) if re.fullmatch(r"[\w-]{1,60}", str(part)) else show(part) for part in path)
    label = _origin(layers, path)
    return label if not dotted or label == f"--set {dotted}" else f"{label}: {dotted}"


def _describe(detail: ErrorDetails, model: type[BaseModel], merged: Tree) -> tuple[KeyPath, str, str]:
    """The key's path, what is wrong with it, and a fix."""
    path, annotation, field = _locate(detail["loc"], model, merged)
    what, found = _sentence(detail), detail.get("input")
    if detail["type"] == "extra_forbidden":
        _, annotation, _ = _locate(detail["loc"][:-1], model, merged)
    keys = [key for holder in _models(annotation) for key in holder.model_fields]
    kinds = [kind for member in _models(annotation) for kind in _kinds(member)]
    fix = ""
    match detail["type"]:
        case "extra_forbidden":
            fix = nearest(path[-1], keys) or f"valid keys: {', '.join(keys)}"
        case "union_tag_invalid" | "union_tag_not_found" as error:
            kind = detail["ctx"]["tag"] if error == "union_tag_invalid" else ""
            what = f"unknown kind {show(kind)}" if kind else _SENTENCES["missing"]
            path, fix = (*path, KIND), nearest(kind, kinds) or f"choose from {', '.join(kinds)}"
        case error if error in _GROUPS and keys:
            fix = f"like {{{KIND}: {kinds[0]}}}" if kinds else f"valid keys: {', '.join(keys)}"
        case error if error in _LISTS and _is_scalar(found):
            fix = f"like [{_SHORT.repr(found)}]"
        case "string_type" if _is_scalar(found):
            fix = "quotes keep a value text"
        case "literal_error":
            fix = nearest(found, re.findall(r"'([^']*)'", detail["ctx"]["expected"]))
        case _:
            bounds = [
                f"{sign} {rule}"
                for each in (field.metadata if field else [])
                for name, sign in _BOUNDS.items()
                if (rule := getattr(each, name, None)) is not None
            ]
            fix = f"allowed: {' and '.join(bounds)}" if len(bounds) > 1 else ""
    return path, what, fix


def first_mistake(error: ValidationError) -> str:
    """The first mistake in values that no config holds: its key, if it has one, what is wrong, and what was found."""
    detail = error.errors()[0]
    key = ".".join(map(str, detail["loc"]))
    return f"{key}: {_sentence(detail)}{_found(detail)}" if key else _sentence(detail) + _found(detail)


def _sentence(detail: ErrorDetails) -> str:
    """What is wrong, as one clause."""
    if detail["type"] in _SENTENCES:
        return _SENTENCES[detail["type"]].format_map(detail.get("ctx", {}))
    message = " ".join(detail["msg"].split()).removeprefix("Value error, ").partition(" after validation, not")[0]
    message = re.sub(r"^\w+ should ", "must ", message)
    return message.replace("greater than or equal to", "at least").replace("less than or equal to", "at most")


def _found(detail: ErrorDetails) -> str:
    """What was found, as a clause to add, in YAML's words where Python's differ; empty where it is said already."""
    if detail["type"] in _SELF_EVIDENT | {"json_invalid"}:
        return ""
    found = detail["input"]
    return f", got {'null' if found is None else str(found).lower() if isinstance(found, bool) else show(found)}"


def _is_scalar(value: object) -> bool:
    return isinstance(value, str | int | float) and not isinstance(value, bool)


def _locate(loc: Iterable[str | int], model: type[BaseModel], merged: Tree) -> tuple[KeyPath, Any, FieldInfo | None]:
    """The dotted path behind a pydantic location, which also names union members, with its annotation and field."""
    path: list[str | int] = []
    annotation: Any = model
    field: FieldInfo | None = None
    node: Any = merged
    for part in loc:
        members = _models(annotation)
        chosen = next((each for each in members if part in {*_kinds(each), each.__name__}), None)
        if chosen and len(members) > 1:
            annotation = chosen
            continue
        field = next((each.model_fields[str(part)] for each in members if part in each.model_fields), None)
        known = part in node if isinstance(node, dict) else isinstance(node, list) and isinstance(part, int)
        if field or known:  # else the label of a member of a plain union
            path.append(part)
            annotation = field.annotation if field else annotation
            node = node[part] if _says(node, (part,)) else None  # a missing tuple item has an index, no value
    return tuple(path), annotation, field


def _models(annotation: Any) -> list[type[BaseModel]]:
    """Every model an annotation mentions, whatever unions, lists and `Annotated` it is wrapped in."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in get_args(annotation) for model in _models(part)]


def _kinds(model: type[BaseModel]) -> tuple[str, ...]:
    return get_args(model.model_fields[KIND].annotation) if KIND in model.model_fields else ()


def _origin(layers: Sequence[Layer], path: KeyPath) -> str:
    """The last layer that says the longest part of `path`."""
    for length in range(len(path), 0, -1):
        for label, tree in reversed(layers):
            if _says(tree, path[:length]):
                return label
    return next(label for label, _ in reversed(layers) if not label.startswith("--set"))


def _says(node: Any, path: KeyPath) -> bool:
    for part in path:
        if isinstance(node, list) and isinstance(part, int) and part < len(node):
            node = node[part]
        elif isinstance(node, dict) and (key := part if part in node else str(part)) in node:
            node = node[key]
        else:
            return False
    return True


def nearest(word: object, choices: Iterable[str]) -> str:
    """A hint at the choice that looks most like `word`, or nothing."""
    near = nearest_of(word, choices)
    return f"did you mean {near!r}?" if near else ""


def nearest_of(word: object, choices: Iterable[str]) -> str:
    """The choice that looks most like `word`, or nothing."""
    return next(iter(difflib.get_close_matches(str(word), choices, 1)), "")


def show(value: object) -> str:
    """A value as a short Python literal on one line."""
    try:
        return _SHORT.repr(value)
    except ValueError:  # an integer of thousands of digits has no repr
        return "a number too long to show"
