"""Compares two configurations key by key."""

from __future__ import annotations

from collections.abc import Iterator
from fnmatch import fnmatchcase
from typing import Any

from rats_video.config.explain import KIND


def pruned(tree: Any, path: str, free: set[str]) -> Any:
    """A tree of settings without the keys that match a pattern of `free`, all below `path`."""
    if not isinstance(tree, dict):
        return tree
    below = {key: f"{path}.{key}".removeprefix(".") for key in tree}
    return {
        key: pruned(value, below[key], free)
        for key, value in tree.items()
        if not any(fnmatchcase(below[key], pattern) for pattern in free)
    }


def differences(old: Any, new: Any, path: str, free: set[str]) -> Iterator[str]:
    """Dotted keys below `path` whose values differ, without those that match a pattern of `free`."""
    if old == new or any(fnmatchcase(path, pattern) for pattern in free):
        return
    if not isinstance(old, dict) or not isinstance(new, dict):
        yield path
    elif old.get(KIND) != new.get(KIND):  # another choice: its other keys mean something else
        yield f"{path}.{KIND}"
    elif old.keys() != new.keys():  # a sum of other terms
        yield path
    else:
        for key, value in new.items():
            yield from differences(old[key], value, f"{path}.{key}".removeprefix("."), free)
