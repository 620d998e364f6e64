"""The result table: one typed row an arm, kept as JSON, shown as Markdown."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from rats_video.errors import UserError
from rats_video.files import replacing

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from rats_video.evaluation.stats import Estimate

METRIC_TITLES: dict[str, str] = {
    "reward": "trained reward",
    "heldout_reward": "held-out reward",
    "imitated_reward": "imitated reward",
    "adherence": "adherence",
    "on_path": "on the path",
    "smoothness": "smoothness",
    "motion_smoothness": "motion smoothness",
    "dynamic_degree": "dynamic degree",
}
_HEADLINE = 4  # metrics that fit a page


def _unknown_to_inf(value: object) -> object:
    """JSON has no infinity: an interval that is unknown (one prompt) is stored as null."""
    return math.inf if value is None else value


class MetricValue(BaseModel):
    """One metric of one arm: its mean over prompts and the half-width of the 95% interval (infinite if unknown)."""

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="null")

    mean: float = Field(allow_inf_nan=False)
    ci95: Annotated[float, BeforeValidator(_unknown_to_inf), Field(ge=0)]

    @classmethod
    def of(cls, estimate: Estimate) -> MetricValue:
        """The table's view of an estimate."""
        return cls(mean=estimate.mean, ci95=estimate.ci95)


class ArmRow(BaseModel):
    """One arm of a comparison.

    `arm` names it ("teacher", "base", "student"); `num_steps` solver steps cost `nfe` network evaluations a clip;
    `seconds_per_clip` is wall time; `metrics` keeps its order, which is the order of the columns.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    arm: str
    num_steps: int = Field(ge=1)
    nfe: int = Field(ge=1)
    num_clips: int = Field(ge=1)
    seconds_per_clip: float = Field(ge=0, allow_inf_nan=False)
    metrics: dict[str, MetricValue]


class _Table(BaseModel):
    """The JSON document."""

    model_config = ConfigDict(extra="forbid")

    rows: list[ArmRow]


def write_rows(rows: Sequence[ArmRow], path: Path) -> None:
    """Write `{"rows": [...]}` to `path`, complete or not at all; missing parent folders are made.

    Raises:
        UserError: the file cannot be written.
    """
    with replacing(path, "table") as partial:
        partial.write_text(_Table(rows=list(rows)).model_dump_json(indent=2) + "\n", encoding="utf-8")


def read_rows(path: Path) -> list[ArmRow]:
    """Read what `write_rows` wrote.

    Raises:
        UserError: the file is missing, is not JSON or does not fit the schema.
    """
    fix = "give a file that `rats-video evaluate` wrote"
    try:
        return _Table.model_validate_json(path.read_bytes()).rows
    except OSError as error:
        raise UserError(f"cannot read the table: {error.strerror or error}", where=str(path), fix=fix) from error
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        what = f"{place}: {first['msg']}" if place else first["msg"]
        raise UserError(what, where=str(path), fix=fix) from error


def metric_title(name: str) -> str:
    """A metric's name for people: known ones by `METRIC_TITLES`, others with blanks for underscores."""
    return METRIC_TITLES.get(name, name.replace("_", " "))


def headline(row: ArmRow) -> ArmRow:
    """The row with only the first four metrics of `METRIC_TITLES` that it has, for a table that fits a page."""
    names = [name for name in METRIC_TITLES if name in row.metrics][:_HEADLINE]
    return row.model_copy(update={"metrics": {name: row.metrics[name] for name in names}})


def markdown_table(rows: Sequence[ArmRow]) -> str:
    """The rows as an aligned Markdown table, without a final newline; the best mean of each metric is bold.

    Columns: arm, steps, NFE, s/clip, then the metrics in order of first appearance, as `mean ± 95% half-width`. A
    metric that an arm lacks reads "-". Higher is better for every metric.
    """
    names = list(dict.fromkeys(name for row in rows for name in row.metrics))
    best = {name: max(row.metrics[name].mean for row in rows if name in row.metrics) for name in names}
    table = [["arm", "steps", "NFE", "s/clip", *(metric_title(name) for name in names)]]
    for row in rows:
        cells = [row.arm, str(row.num_steps), str(row.nfe), f"{row.seconds_per_clip:.2f}"]
        cells += [_metric_cell(row.metrics.get(name), best[name]) for name in names]
        table.append(cells)
    return "\n".join(aligned(table))


def aligned(table: Sequence[Sequence[str]], *, num_texts: int = 1) -> list[str]:
    """Rows of cells, the titles first, as lines of Markdown: columns after the first `num_texts` align right."""
    table = [[cell.replace("|", "\\|") for cell in cells] for cells in table]
    widths = [max(3, *map(len, column)) for column in zip(*table, strict=True)]
    rules = ["-" * width if i < num_texts else "-" * (width - 1) + ":" for i, width in enumerate(widths)]
    return [_line(cells, widths, num_texts) for cells in (table[0], rules, *table[1:])]


def _metric_cell(value: MetricValue | None, best: float) -> str:
    """E.g. "0.812 ± 0.013", in bold if it is the best."""
    if value is None:
        return "-"
    interval = f"{value.ci95:.3f}" if math.isfinite(value.ci95) else "n/a"
    text = f"{value.mean:z.3f} ± {interval}"
    return f"**{text}**" if value.mean == best else text


def _line(cells: Sequence[str], widths: Sequence[int], num_texts: int) -> str:
    """One table line."""
    fill = [
        cell.ljust(width) if i < num_texts else cell.rjust(width)
        for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
    ]
    return "| " + " | ".join(fill) + " |"
