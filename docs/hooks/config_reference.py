"""Pages of the configuration reference, made from the settings: each key's type, bounds, default and meaning."""

from __future__ import annotations

import inspect
import json
import types
from collections import deque
from collections.abc import Iterator
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt, MinLen
from markdown_table import table
from pydantic import AfterValidator, JsonValue
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from rats_video.commands.compare_config import CompareConfig
from rats_video.config.fields import Below, Config
from rats_video.datasets.video.settings import PrepareConfig
from rats_video.distillation.settings import DistillConfig
from rats_video.methods.base import BaseMethodConfig
from rats_video.pretraining.finetune import FinetuneConfig
from rats_video.pretraining.latent_pool import LatentRewardTrainConfig
from rats_video.pretraining.paths import PathTrainConfig
from rats_video.pretraining.preference import PreferenceTrainConfig
from rats_video.pretraining.reward import RewardTrainConfig
from rats_video.pretraining.teacher import TeacherTrainConfig
from rats_video.pretraining.vae import VaeConfig
from rats_video.rewards.base import RewardKindConfig

ROOTS: dict[str, tuple[str, str, type[Config]]] = {  # page: its title, its group of packaged configurations, the root
    "distill": ("distill and run", "distill", DistillConfig),
    "compare": ("compare", "compare", CompareConfig),
    "prepare": ("prepare", "prepare", PrepareConfig),
    "finetune": ("train teacher --data", "finetune", FinetuneConfig),
    "train-preference": ("train reward --data", "preference", PreferenceTrainConfig),
    "train-latent-reward": ("train reward --latent", "latent_reward", LatentRewardTrainConfig),
    "train-reward": ("train reward", "reward", RewardTrainConfig),
    "train-teacher": ("train teacher", "teacher", TeacherTrainConfig),
    "train-paths": ("train paths", "paths", PathTrainConfig),
    "train-vae": ("train vae", "vae", VaeConfig),
}
SHARED: dict[str, tuple[str, type[Config]]] = {
    "methods": ("method", BaseMethodConfig),
    "rewards": ("reward", RewardKindConfig),
}
"""Pages of kinds that stand below several keys."""
NAMES = {
    int: "whole number", float: "number", str: "text", bool: "`true` or `false`", type(None): "`null`",
    JsonValue: "any YAML",
}  # fmt: skip
Places = dict[type[Config], tuple[str, str]]
"""Class of settings: its page, and the shortest keys that lead to it."""


def pages() -> dict[str, str]:
    """Every page's Markdown by its file name."""
    places = find_settings()
    made = {}
    for page in (*ROOTS, *SHARED):
        here = {cls: path for cls, (where, path) in places.items() if where == page}
        if page in ROOTS:  # what lies under a root's key stands after that key
            keys = ["", *ROOTS[page][2].model_fields]
            here = dict(sorted(here.items(), key=lambda item: keys.index(item[1].split(".")[0])))
        made[f"{page}.md"] = _head(page) + "".join(_section(cls, path, page, places) for cls, path in here.items())
    return made


def find_settings() -> Places:
    """Every class of settings below the roots."""
    found: Places = {}
    for root_page, (_, _, root) in ROOTS.items():
        queue = deque([(root, root_page, "")])
        while queue:
            cls, page, path = queue.popleft()
            if cls in found:
                continue
            for shared, (key, base) in SHARED.items():
                if issubclass(cls, base):
                    page, path = shared, key
            found[cls] = (page, path)
            for key, field in cls.model_fields.items():
                queue.extend((held, page, f"{path}.{key}".lstrip(".")) for held in _classes(field.annotation))
    return found


def meaning(cls: type[Config], key: str) -> str:
    """A key's own description, a parent's, or that of the settings it holds; empty if there is none."""
    fields = [each.model_fields[key] for each in cls.__mro__ if key in getattr(each, "model_fields", {})]
    held = list(dict.fromkeys(map(_summary, _classes(fields[0].annotation))))
    return next(filter(None, (field.description for field in fields)), held[0] if len(held) == 1 else "")


def _classes(annotation: Any) -> Iterator[type[Config]]:
    if inspect.isclass(annotation) and issubclass(annotation, Config):
        yield annotation
    for part in get_args(annotation):
        yield from _classes(part)


def _head(page: str) -> str:
    if page in SHARED:
        return f"# Kinds of {SHARED[page][0]}\n\nThe keys of `{SHARED[page][0]}` depend on its `kind`.\n\n"
    title, group, root = ROOTS[page]
    return (
        f"# {title}\n\n{_text(root)}\n\n[How configurations work](index.md); packaged ones:"
        f" [configs/{group}](../../../configs/{group}).\n\n"
    )


def _kind(cls: type[Config]) -> str:
    """The one kind that a class stands for."""
    kinds = get_args(cls.model_fields["kind"].annotation) if "kind" in cls.model_fields else ()
    return str(kinds[0]) if len(kinds) == 1 else ""


def _section(cls: type[Config], path: str, page: str, places: Places) -> str:
    kind = _kind(cls)
    rows = [
        (f"`{key}`", _type_of(field.annotation, field.metadata, page, places), _default(field), meaning(cls, key))
        for key, field in cls.model_fields.items()
        if key != "kind" or not kind
    ]
    title = (
        f"`{kind}`" if _is_shared(page, path) else (f"`{path}`" if path else "Keys") + (f", `{kind}`" if kind else "")
    )
    body = table(["key", "type", "default", "meaning"], rows) if rows else "No further keys."
    return f"## {title} {{#{cls.__name__}}}\n\n" + (f"{_text(cls)}\n\n" if path else "") + f"{body}\n\n"


def _text(cls: type[Config]) -> str:
    return inspect.cleandoc(cls.__doc__ or "").removeprefix("Root of ")


def _summary(cls: type[Config]) -> str:
    return _text(cls).split("\n")[0]


def _is_shared(page: str, path: str) -> bool:
    return page in SHARED and path == SHARED[page][0]


def _type_of(annotation: Any, metadata: list[Any], page: str, places: Places) -> str:
    origin, parts = get_origin(annotation), get_args(annotation)

    def of(part: Any) -> str:
        return _type_of(part, [], page, places)

    if origin is Annotated:
        return _type_of(parts[0], [*parts[1:], *metadata], page, places)
    if inspect.isclass(annotation) and issubclass(annotation, Config):
        return _link(annotation, page, places)
    if origin in {Union, types.UnionType}:
        named = " or ".join(dict.fromkeys(map(of, parts)))
    elif origin is Literal:
        named = " or ".join(f"`{value}`" for value in parts)
    elif origin is tuple:
        named = f"list of: {of(parts[0])}" if parts[-1] is ... else f"list of {len(parts)}: {of(parts[0])}"
    elif origin is dict:
        named = f"by name: {of(parts[1])}"
    else:
        named = NAMES[annotation]
    return ", ".join([named, *_bounds(metadata)])


def _link(cls: type[Config], page: str, places: Places) -> str:
    there, path = places[cls]
    if _is_shared(there, path):
        return f"a [{path}]({'' if there == page else f'{there}.md'}{'#' if there == page else ''})"
    return f"[{_kind(cls) or 'keys'}]({'' if there == page else f'{there}.md'}#{cls.__name__})"


def _bounds(metadata: list[Any]) -> Iterator[str]:
    for each in metadata:
        match each:
            case Ge():
                yield f"{each.ge} or more"
            case Gt():
                yield f"above {each.gt}"
            case Le():
                yield f"at most {each.le}"
            case Lt():
                yield f"below {each.lt}"
            case MinLen(1):
                yield "not empty"
            case FieldInfo():
                yield from _bounds(each.metadata)
            case AfterValidator(func=Below(limit)) if limit < 2**31:
                yield f"below {limit:,}"


def _default(field: FieldInfo) -> str:
    value = field.get_default(call_default_factory=True)
    if value is PydanticUndefined:
        return "required"
    if isinstance(value, Config):
        return f"`{{kind: {kind}}}`" if (kind := _kind(type(value))) else "as there"
    return f"`{json.dumps(value, ensure_ascii=False)}`"
