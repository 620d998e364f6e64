"""A configuration's models on the hub, at the commit that a run keeps from its first start to its last resume."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from rats_video.assets import find_hub_id, pinned
from rats_video.config.fields import Config
from rats_video.config.load import read_tree
from rats_video.errors import warn
from rats_video.hub import newest_commit, parse_id

ConfigT = TypeVar("ConfigT", bound=Config)
_KEYS = ("model", "vae", "init", "student")  # of models, or of what holds such keys


def pin_models(cfg: ConfigT, resolved: Path | None = None) -> ConfigT:
    """The configuration with each of its models on the hub at a commit, downloaded.

    Args:
        cfg: as it was given.
        resolved: the configuration of the run that it goes on with, which may not be there; None for a new run.

    Raises:
        UserError: the hub does not give one of them.
    """
    earlier = read_tree(resolved) if resolved is not None and resolved.is_file() else {}
    return _pin(cfg, earlier, "")


def _pin(cfg: ConfigT, earlier: Mapping[str, Any], prefix: str) -> ConfigT:
    changes: dict[str, object] = {}
    for key in _KEYS:
        before = earlier.get(key)
        match getattr(cfg, key, None):
            case str() as given:
                changes[key] = _at_commit(given, before, where=f"{prefix}{key}")
            case Config() as below:
                changes[key] = _pin(below, before if isinstance(before, dict) else {}, f"{prefix}{key}.")
    return cfg.model_copy(update=changes)


def _at_commit(given: str, before: object, *, where: str) -> str:
    hub, kept = find_hub_id(given), parse_id(before) if isinstance(before, str) else None
    if hub is None or hub.is_pinned or kept is None or not kept.is_pinned or kept.repository != hub.repository:
        return pinned(given, where=where)
    now = None if hub.revision is None else newest_commit(hub)
    if now not in {None, kept.revision}:
        warn(f"{hub} is {now} by now; the run goes on with {kept.revision}, which it began with", where=where)
    return str(kept)
