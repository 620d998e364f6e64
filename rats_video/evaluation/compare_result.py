"""The result of `compare`: a row for each method, NFE and seed, with the cost of training; kept as JSON."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from rats_video.errors import UserError, first_line
from rats_video.evaluation.tables import MetricValue
from rats_video.files import replacing

if TYPE_CHECKING:
    from pathlib import Path

BASE = "base"
"""The base model's rows, like the teacher's, have no seed and no cost: we do not train them."""


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="null")


class Cost(_Frozen):
    """The cost of a training.

    Attributes:
        updates: of the student.
        evaluations: network evaluations of all updates and clips; one with gradient counts three.
        seconds: wall time of all updates, on the machine and under the load of that time; a cached teacher rollout
            counts what it took to make.
        peak_bytes: of device memory; None if it is not counted (CPU).
    """

    updates: int = Field(ge=1)
    evaluations: float = Field(gt=0)
    seconds: float = Field(ge=0)
    peak_bytes: int | None = None


class ComparedRow(_Frozen):
    """One method at one NFE from one seed: means over clips with 95% intervals over prompts."""

    method: str
    nfe: int = Field(ge=1)
    num_steps: int = Field(ge=1)
    seed: int | None
    metrics: dict[str, MetricValue]
    cost: Cost | None


class MethodMean(_Frozen):
    """One method at one NFE over its seeds, with 95% intervals over prompts and seeds (`stats.crossed_ci95`).

    `num_seeds` is 0 for teacher and base, and their intervals are over prompts alone, as with one seed.
    """

    method: str
    nfe: int = Field(ge=1)
    num_steps: int = Field(ge=1)
    num_seeds: int = Field(ge=0)
    metrics: dict[str, MetricValue]


class CurvePoint(MethodMean):
    """A method's students during training; `cost` is their mean cost so far."""

    cost: Cost


class WinRate(_Frozen):
    """The share of a method's clips that score higher than another's on the same prompt and noise; a tie is half a win.

    `rate` is the mean over all seeds' clips, `ci95` its half-width over prompts and seeds, None if unknown. Of two
    methods, students of the same seed are compared.
    """

    method: str
    against: str
    nfe: int
    metric: str
    rate: float = Field(ge=0, le=1)
    ci95: float | None


class Difference(_Frozen):
    """By how much the clips of a method score higher than another's on the same prompt and noise.

    `mean` is over all seeds' clips, `ci95` its half-width over prompts and seeds, None if unknown. Of two methods,
    students of the same seed are compared.
    """

    method: str
    against: str
    nfe: int
    metric: str
    mean: float
    ci95: float | None


class CompareResult(_Frozen):
    """The whole comparison; `settings` holds its conditions: clips, budget, seeds, code, machine."""

    settings: dict[str, str | int | float | list[int] | list[str]]
    rows: list[ComparedRow]
    means: list[MethodMean] = []
    curve: list[CurvePoint] = []
    wins: list[WinRate] = []
    differences: list[Difference] = []

    def rates(self, metric: str, nfe: int) -> tuple[list[str], dict[str, list[MetricValue | None]]]:
        """The opponents, and each method's win rates against them by a metric at an NFE; None if there is none."""
        found = {
            (win.method, win.against): MetricValue(mean=win.rate, ci95=win.ci95)
            for win in self.wins
            if (win.metric, win.nfe) == (metric, nfe)
        }
        opponents = list(dict.fromkeys(against for _, against in found))
        methods = dict.fromkeys(method for method, _ in found)
        return opponents, {method: [found.get((method, name)) for name in opponents] for method in methods}

    def mean_of(self, method: str, nfe: int | None = None) -> MethodMean | None:
        """A method's mean at an NFE, or its first; None if it is missing."""
        return next((each for each in self.means if each.method == method and nfe in {None, each.nfe}), None)


def write_compare_result(compared: CompareResult, path: Path) -> None:
    """Write it as JSON, complete or not at all; raises UserError if the file cannot be written."""
    with replacing(path, "comparison of methods") as partial:
        partial.write_text(compared.model_dump_json(indent=1) + "\n", encoding="utf-8")


def read_compare_result(path: Path) -> CompareResult:
    """Read a file of `write_compare_result`; raises UserError if it is missing or something else."""
    fix = "give a compare.json that `rats-video compare` wrote"
    try:
        return CompareResult.model_validate_json(path.read_bytes())
    except OSError as error:
        raise UserError(f"cannot be read: {error.strerror or error}", where=str(path), fix=fix) from error
    except ValidationError as error:
        raise UserError(f"is no comparison: {first_line(error)}", where=str(path), fix=fix) from error
