"""Reads the sources of a report: run folders and comparisons of methods, each file on its own and none trusted."""

from __future__ import annotations

import errno
import math
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, Field

from rats_video.config.load import read_tree
from rats_video.errors import UserError, first_line, warn
from rats_video.evaluation.compare_result import CompareResult, read_compare_result
from rats_video.evaluation.tables import ArmRow, read_rows
from rats_video.reading import MOST_TEXT, check_plain_file, read_json
from rats_video.training.metrics import read_metrics
from rats_video.training.run_folder import RunFolder, read_sessions

COMPARED, ARMS = "compare.json", "arms"
_MOST_ARMS = 100
Scores = dict[str, list[float | None]]
T = TypeVar("T")


class GuardRow(BaseModel):
    """One evaluation of the guard, as `guard.json` holds it."""

    step: int
    scores: Scores
    drift: float | None = None
    alarms: list[str] = []


class GuardRecord(BaseModel):
    """The content of `guard.json`."""

    best: int | None = None
    teacher: Scores = {}
    looks: list[GuardRow] = []


class PanelBox(BaseModel):
    """One panel of a comparison's picture; box: left, top, width, height in pixels; track: of its sound, from 1."""

    title: str
    num_steps: int | None = None
    nfe: int | None = None
    seconds: float | None = None
    box: tuple[int, int, int, int] = Field()
    track: int | None = Field(None, ge=1)


@dataclass(frozen=True)
class ComparisonClip:
    """One file of a run's comparison.

    Args:
        path: the mp4.
        place: in the list of prompts; with the seed it decides the noise.
        prompt: of all panels.
        seed: of the noise.
        metrics: by name, then by panel.
        panels: place of each; empty if unknown.
    """

    path: Path
    place: int
    prompt: str
    seed: int | None
    metrics: Mapping[str, Mapping[str, float]]
    panels: Sequence[PanelBox]


@dataclass(frozen=True)
class Run:
    """A run folder's content, as far as it is there.

    Args:
        name: for people, unique in the report.
        group: runs of one group share a colour and an entry in the legend.
        path: the folder, as given.
        rows: the training log; values that are no numbers are NaN.
        table: of `evaluate`.
        guard: its record.
        clips: of the comparison.
        config: as resolved.
        sessions: their environments.
        plan: the expected time and memory.
        lacks: missing or unreadable parts, each with the command that makes it, if there is one.
    """

    name: str
    group: str
    path: Path
    rows: Sequence[Mapping[str, float]] = ()
    table: Sequence[ArmRow] = ()
    guard: GuardRecord | None = None
    clips: Sequence[ComparisonClip] = ()
    config: Mapping[str, Any] = field(default_factory=dict)
    sessions: Sequence[Mapping[str, Any]] = ()
    plan: Mapping[str, Any] = field(default_factory=dict)
    lacks: Sequence[tuple[str, str]] = ()


@dataclass(frozen=True)
class CompareFolder:
    """A `compare` folder: its table and its arms' runs."""

    name: str
    path: Path
    compared: CompareResult
    arms: Sequence[Run]


def read_sources(paths: Sequence[Path]) -> tuple[list[Run], list[CompareFolder]]:
    """Read run folders and comparisons of methods.

    A missing or damaged part is listed in `lacks`; a damaged one also warns.

    Raises:
        UserError: a folder is neither, or holds links that lead out of it.
    """
    runs, methods = [], []
    for path, name in zip(paths, _names(paths), strict=True):
        RunFolder(path).check_entries()
        if (path / COMPARED).is_file():
            methods.append(_read_methods(path, name))
        elif RunFolder(path).config.is_file() or RunFolder(path).metrics.is_file():
            runs.append(read_run(path, name))
        else:
            raise UserError(
                "holds neither a run nor a comparison of methods", where=str(path),
                fix="give the folder of a `rats-video distill`, `run` or `compare`",
            )  # fmt: skip
    return runs, methods


def read_run(path: Path, name: str) -> Run:
    """Read a run folder; its own name is its group."""
    folder, lacks = RunFolder(path), list[tuple[str, str]]()
    evaluation, comparison = folder.evaluation / "evaluation.json", folder.comparison / "index.json"
    training = ("distill", "--config", str(folder.config), "--output", str(path))
    config = _part(lacks, folder.config, read_tree, "configuration") or {}
    run = Run(
        name, name, path, config=config, lacks=lacks,
        rows=_part(lacks, folder.metrics, _read_log, "training log", *training) or [],
        table=_part(lacks, evaluation, read_rows, "evaluation", "evaluate", str(path)) or [],
        clips=_part(lacks, comparison, _read_clips, "comparison clips", "export", "comparison", str(path)) or [],
        sessions=_part(lacks, folder.environment, read_sessions, "environment") or [],
    )  # fmt: skip
    if folder.guard.exists() or config.get("guard") is not None:
        run = replace(run, guard=_part(lacks, folder.guard, _read_guard, "record of the guard"))
    if folder.plan.exists() or method_kind(run) == "rats":  # whose step `plan` counts
        how = ("plan", "--config", str(folder.config), "--json", str(folder.plan))
        run = replace(run, plan=_part(lacks, folder.plan, _read_object, "plan", *how) or {})
    return run


def method_kind(run: Run) -> str:
    """The method that trained it, or nothing if that is unknown."""
    method = run.config.get("method")
    kind = method.get("kind", "rats") if isinstance(method, dict) else ""
    return kind if isinstance(kind, str) else ""


def number(value: object) -> float:
    """A JSON number; NaN for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return math.nan
    try:
        return float(value)
    except OverflowError:
        return math.nan


def _names(paths: Sequence[Path]) -> list[str]:
    """The folders' own names, with as many parents as make them unique."""
    resolved = [path.resolve() for path in paths]
    if len(set(resolved)) < len(resolved):
        twice = next(path for path in paths if resolved.count(path.resolve()) > 1)
        raise UserError("is given twice", where=str(twice), fix="give each folder once")
    depth = 1
    while len({path.parts[-depth:] for path in resolved}) < len(resolved):
        depth += 1
    return ["/".join(path.parts[-depth:]) for path in resolved]


def _read_methods(path: Path, name: str) -> CompareFolder:
    check_size(path / COMPARED)
    compared = read_compare_result(path / COMPARED)
    known = list(dict.fromkeys(row.method for row in compared.rows))
    arms = [arm for arm in sorted(path.glob(f"{ARMS}/*")) if arm.is_dir() and _method(arm) in known]
    arms.sort(key=lambda arm: known.index(_method(arm)))  # a method has one colour everywhere
    if len(arms) > _MOST_ARMS:
        warn(f"only the first {_MOST_ARMS} of {len(arms)} arms are shown", where=str(path / ARMS))
    runs = [replace(read_run(arm, _title(arm)), group=_method(arm)) for arm in arms[:_MOST_ARMS]]
    return CompareFolder(name, path, compared, runs)


def _method(arm: Path) -> str:
    """The method whose student a folder `METHOD-seedN-DIGEST` holds."""
    return arm.name.rpartition("-seed")[0]


def _title(arm: Path) -> str:
    """E.g. "rats, seed 0"."""
    method, _, rest = arm.name.rpartition("-seed")
    return f"{method}, seed {rest.partition('-')[0]}"


# ----------------------------------------------------------------------------------------------------------- parts


def _part(lacks: list[tuple[str, str]], path: Path, read: Callable[[Path], T], what: str, *command: str) -> T | None:
    """Read a file; None, and a line in `lacks`, if it is missing or damaged."""
    how = shlex.join(["rats-video", *command]) if command else ""
    try:
        check_size(path)
        return read(path)
    except FileNotFoundError:
        lacks.append((f"no {what}", how))
    except (OSError, ValueError, UserError) as error:
        reason = error.what if isinstance(error, UserError) else getattr(error, "strerror", None) or first_line(error)
        warn(f"the {what} cannot be read: {reason}", where=str(path))
        lacks.append((f"the {what} cannot be read: {reason}", how))
    return None


def check_size(path: Path) -> None:
    """Raise OSError unless this is a plain file of a size that text has."""
    check_plain_file(path)
    if path.stat().st_size > MOST_TEXT:
        raise OSError(errno.EFBIG, f"it holds more than {MOST_TEXT} bytes", str(path))


def _read_log(path: Path) -> list[dict[str, float]]:
    """The rows by step; of a step that was logged twice, the last row."""
    rows = {row["step"]: row for row in read_metrics(path) if math.isfinite(number(row["step"]))}
    if not rows:
        raise ValueError("it holds no step")
    return [{key: number(value) for key, value in rows[step].items()} for step in sorted(rows)]


def _read_guard(path: Path) -> GuardRecord:
    return GuardRecord.model_validate(read_json(path))


def _read_object(path: Path) -> dict[str, Any]:
    found = read_json(path)
    if not isinstance(found, dict):
        raise ValueError("it is no JSON object")  # noqa: TRY004  # a mistake in a file, like the others
    return found


def _read_clips(path: Path) -> list[ComparisonClip]:
    found = read_json(path)
    if not isinstance(found, list) or not all(isinstance(row, dict) for row in found):
        raise ValueError("it is no list of JSON objects")
    return [_clip(path.parent, place, row) for place, row in enumerate(found)]


def _clip(folder: Path, place: int, row: Mapping[str, Any]) -> ComparisonClip:
    name, prompt, seed = row.get("file"), row.get("prompt"), row.get("seed")
    if not isinstance(name, str) or not isinstance(prompt, str) or Path(name).name != name or name in {"", ".", ".."}:
        raise ValueError(f"row {place + 1} names no file beside it, or no prompt")
    metrics = {key: _scores(value) for key, value in row.items() if isinstance(value, dict)}
    panels = [PanelBox.model_validate(panel) for panel in row.get("panels", [])]
    path = folder / name
    return ComparisonClip(path, place, prompt, seed if isinstance(seed, int) else None, metrics, panels)


def _scores(values: Mapping[str, Any]) -> dict[str, float]:
    return {key: value for key, found in values.items() if math.isfinite(value := number(found))}
