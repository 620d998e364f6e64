"""The result table: one typed row an arm, kept as JSON, shown as Markdown."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from rats_video.config.explain import first_mistake
from rats_video.errors import UserError
from rats_video.files import replacing

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from rats_video.evaluation.stats import Estimate

TEACHER = "teacher"
METRIC_TITLES: dict[str, str] = {
    "reward": "trained reward",
    "heldout_reward": "held-out reward",
    "imitated_reward": "imitated reward",
    "adherence": "adherence",
    "on_path": "on the path",
    "smoothness": "smoothness",
    "motion_smoothness": "motion smoothness",
    "dynamic_degree": "dynamic degree",
    "fvd": "FVD",
    "kvd": "KVD x 1000",
    "fid": "FID",
    "kid": "KID x 1000",
    "diversity_share": "diversity / teacher's",
    "pixel_diversity_share": "diversity of pixels / teacher's",
    "first_frame_psnr": "first frame, dB",
    "picture_likeness": "likeness to the picture",
    "dynamic_degree_share": "dynamic degree / teacher's",
    "displacement": "displacement / the prompt's",
    "loudness": "loudness, LUFS",
    "clipped_sound": "clipped samples",
    "loudness_difference": "loudness - teacher's, LU",
    "clipped_sound_difference": "clipped samples - teacher's",
    "silence_difference": "silence - teacher's",
    "av_align": "AV-Align",
}
_HEADLINE = 4  # metrics that fit a page
BESIDE = (
    "fvd", "kvd", "fid", "kid", "diversity_share", "pixel_diversity_share", "flicker", "motion_smoothness",
    "dynamic_degree", "saturation", "first_frame_psnr", "picture_likeness", "dynamic_degree_share", "displacement",
    "av_align", "loudness_difference", "clipped_sound_difference", "silence_difference",
)  # fmt: skip
"""Metrics of a second table: no reward, and nothing that a reward is trained for."""
Direction = Literal["higher", "lower", "near teacher"]
_DIRECTIONS: dict[str, Direction] = {
    **dict.fromkeys(("fvd", "kvd", "fid", "kid"), "lower"),
    **dict.fromkeys(
        (
            "diversity", "diversity_share", "pixel_diversity", "pixel_diversity_share", "dynamic_degree", "saturation",
            "contrast", "clipped", "picture_likeness", "dynamic_degree_share", "displacement", "loudness",
            "clipped_sound", "silence", "loudness_difference", "clipped_sound_difference", "silence_difference",
        ),
        "near teacher",
    ),
}  # fmt: skip
_MARKS: dict[Direction, str] = {"higher": "", "lower": " ↓", "near teacher": " ≈"}
DIRECTIONS_NOTE = "Best in bold: the highest; where marked ↓ the lowest, where marked ≈ the nearest to the teacher's."


def _unknown_to_inf(value: object) -> object:
    """Read null as infinity, which JSON lacks: an unknown interval (one prompt) is stored as null."""
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


class Latency(BaseModel):
    """The time and memory of one clip on its own: medians of wall seconds, and the peak of device memory.

    Attributes:
        seconds: from prompt to pixels.
        text: the share of encoding the prompt, and with guidance the empty prompt.
        denoiser: the share of all network evaluations.
        decode: the share of latents to pixels.
        peak_bytes: allocated on the GPU, weights included; None on a CPU, where only a process of its own could tell.
        repeats: clips behind the medians, after one to warm up.
        load_average: of the machine over the last minute; far above the job's own share, the seconds mean little.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    seconds: float = Field(ge=0)
    text: float = Field(ge=0)
    denoiser: float = Field(ge=0)
    decode: float = Field(ge=0)
    peak_bytes: int | None = None
    repeats: int = Field(ge=1)
    load_average: float = Field(ge=0)


class ArmRow(BaseModel):
    """One arm of a comparison.

    `arm` names it ("teacher", "base", "student"); `num_steps` solver steps cost `nfe` network evaluations a clip;
    `seconds_per_clip` is wall time in batches; `metrics` keeps its order, which is the order of the columns; `latency`
    belongs to one clip alone, if it was measured.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    arm: str
    num_steps: int = Field(ge=1)
    nfe: int = Field(ge=1)
    num_clips: int = Field(ge=1)
    seconds_per_clip: float = Field(ge=0, allow_inf_nan=False)
    metrics: dict[str, MetricValue]
    latency: Latency | None = None


class _Table(BaseModel):
    """The JSON document; `notes` add in words the reference, the number of clips and what to doubt."""

    model_config = ConfigDict(extra="forbid")

    rows: list[ArmRow]
    notes: list[str] | None = None


def write_rows(rows: Sequence[ArmRow], path: Path, notes: Sequence[str] = ()) -> None:
    """Write `{"rows": [...], "notes": [...]}` to `path`, complete or not at all; missing parent folders are made.

    Values of None are skipped.

    Raises:
        UserError: the file cannot be written.
    """
    document = _Table(rows=list(rows), notes=list(notes) or None)
    with replacing(path, "table") as partial:
        partial.write_text(document.model_dump_json(indent=2, exclude_none=True) + "\n", encoding="utf-8")


def read_rows(path: Path) -> list[ArmRow]:
    """The rows that `write_rows` wrote; raises UserError as `read_table`."""
    return read_table(path)[0]


def read_table(path: Path) -> tuple[list[ArmRow], list[str]]:
    """The rows and notes that `write_rows` wrote.

    Raises:
        UserError: the file is missing, is not JSON or does not fit the schema.
    """
    fix = "give a file that `rats-video evaluate` wrote"
    try:
        table = _Table.model_validate_json(path.read_bytes())
    except OSError as error:
        raise UserError(f"cannot read the table: {error.strerror or error}", where=str(path), fix=fix) from error
    except ValidationError as error:
        raise UserError(first_mistake(error), where=str(path), fix=fix) from error
    return table.rows, table.notes or []


def better(name: str) -> Direction:
    """The direction in which a metric is better; "higher" unless it is known to be otherwise."""
    return _DIRECTIONS.get(name, "higher")


def best_mean(name: str, rows: Sequence[ArmRow]) -> float | None:
    """The best mean of a metric; None if it is to be near the teacher's and there is no teacher."""
    return best_of(name, [(row.arm == TEACHER, row.metrics[name].mean) for row in rows if name in row.metrics])


def best_of(name: str, means: Sequence[tuple[bool, float]]) -> float | None:
    """The best of `(is the teacher's, mean)` pairs of a metric, as `best_mean`."""
    if better(name) != "near teacher":
        return (max if better(name) == "higher" else min)((mean for _, mean in means), default=None)
    goal = next((mean for is_teacher, mean in means if is_teacher), None)
    others = [mean for is_teacher, mean in means if not is_teacher]
    return None if goal is None else min(others, key=lambda mean: abs(mean - goal), default=None)


def metric_title(name: str) -> str:
    """A metric's name for people: from `METRIC_TITLES`, or with spaces for underscores.

    It ends in ↓ if lower is better, in ≈ if near the teacher's is.
    """
    return METRIC_TITLES.get(name, name.replace("_", " ")) + _MARKS[better(name)]


def metric_heading(name: str) -> str:
    """The same with a capital."""
    title = metric_title(name)
    return title[:1].upper() + title[1:]


def headline(row: ArmRow) -> ArmRow:
    """The row with only the first four metrics of `METRIC_TITLES` that it has, for a table that fits a page."""
    return only(row, [name for name in METRIC_TITLES if name in row.metrics][:_HEADLINE])


def only(row: ArmRow, names: Sequence[str]) -> ArmRow:
    """The row with only these of its metrics."""
    return row.model_copy(update={"metrics": {name: row.metrics[name] for name in names if name in row.metrics}})


def markdown_table(rows: Sequence[ArmRow]) -> str:
    """The rows as an aligned Markdown table, without a final newline; the best mean of each metric is bold.

    Columns: arm, steps, NFE, s/clip, then the metrics in order of first appearance, as `mean ± 95% half-width`. A
    metric that an arm lacks reads "-". `better` decides what is best; titles mark metrics that are not better higher.
    """
    names = list(dict.fromkeys(name for row in rows for name in row.metrics))
    best = {name: best_mean(name, rows) for name in names}
    table = [["arm", "steps", "NFE", "s/clip", *(metric_title(name) for name in names)]]
    for row in rows:
        cells = [row.arm, str(row.num_steps), str(row.nfe), f"{row.seconds_per_clip:.2f}"]
        cells += [metric_cell(row.metrics.get(name), None if _is_goal(row, name) else best[name]) for name in names]
        table.append(cells)
    return "\n".join(aligned(table))


def aligned(table: Sequence[Sequence[str]], *, num_texts: int = 1) -> list[str]:
    """Rows of cells, the titles first, as lines of Markdown: columns after the first `num_texts` align right."""
    table = [[cell.replace("|", "\\|") for cell in cells] for cells in table]
    widths = [max(3, *map(len, column)) for column in zip(*table, strict=True)]
    rules = ["-" * width if i < num_texts else "-" * (width - 1) + ":" for i, width in enumerate(widths)]
    return [_line(cells, widths, num_texts) for cells in (table[0], rules, *table[1:])]


def _is_goal(row: ArmRow, name: str) -> bool:
    """True if the row holds the value that the others are to be near."""
    return row.arm == TEACHER and better(name) == "near teacher"


def metric_cell(value: MetricValue | None, best: float | None = None) -> str:
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
