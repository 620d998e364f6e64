"""`compare`: every method with the same teacher, prompts, noise and budget; finished work is never repeated."""

from __future__ import annotations

import contextlib
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType

from rats_video.commands.compare_arms import evaluate_arm, show, train
from rats_video.commands.compare_config import CompareConfig, mean_evaluations
from rats_video.commands.compare_layout import Arm, CompareLayout, is_trained
from rats_video.commands.device import start_runtime
from rats_video.commands.folders import clean_interrupt, make_folder
from rats_video.commands.record import environment
from rats_video.config.load import load_config
from rats_video.errors import BusyError, Interrupted, UserError, first_line
from rats_video.evaluation.compare_plots import plot_cost, plot_nfe, plot_wins
from rats_video.evaluation.compare_result import CompareResult, write_compare_result
from rats_video.evaluation.compare_stats import curve_points, differences, method_means, win_rates
from rats_video.evaluation.compare_tables import markdown, nfe_of, summary_table
from rats_video.evaluation.sets import fill_shares
from rats_video.evaluation.tables import TEACHER, aligned
from rats_video.files import locked, replacing
from rats_video.runtime import Runtime


def run_compare(
    *,
    config: str,
    overrides: Sequence[str],
    methods: tuple[str, ...] | None,
    output: Path,
    device: str,
    echo: Callable[[str], None],
) -> None:
    """Train and score the unfinished arms of a comparison, then write its tables and figures; `echo` gets the lines.

    Several processes on one OUTPUT share its arms; a process that finds no free arm exits without writing tables.

    Raises:
        UserError: the configuration is wrong, or arms failed; the others are done.
        Interrupted: somebody asked to stop.
    """
    cfg = load_config(CompareConfig, config, group="compare", overrides=overrides)
    layout = CompareLayout.of(cfg if methods is None else cfg.only(methods), output)
    runtime = start_runtime(device)
    make_folder(output)
    for line in _budget_lines(layout):
        echo(line)
    with _explain_stop(output):
        failed, elsewhere = run_arms(layout, runtime, echo)
        if elsewhere:
            echo(f"Others work at {', '.join(elsewhere)}: the last one writes {output / 'compare.md'}.")
        else:
            for line in write_tables(layout, runtime):
                echo(line)
    if failed:
        what = "; ".join(f"{title}: {line}" for title, line in failed.items())
        raise UserError(
            f"{len(failed)} of {len(layout.arms)} arms failed: {what}", where=str(output),
            fix="the others are done; the same command tries these again",
        )  # fmt: skip


def run_arms(layout: CompareLayout, runtime: Runtime, echo: Callable[[str], None]) -> tuple[dict[str, str], list[str]]:
    """Train and score every arm that no other process works on, until none is left.

    Returns:
        The error lines of the arms that failed, by title, and the titles of those that are running elsewhere.
    """
    failed: dict[str, str] = {}
    for arm in layout.arms:
        if layout.is_done(arm):
            echo(f"{arm.title}: done before")
    waiting = [arm for arm in layout.arms if not layout.is_done(arm)]
    while True:
        busy = []
        for arm in waiting:
            attempt = _CatchFailure()
            try:
                with locked(arm.folder), attempt:
                    _run_arm(layout, arm, runtime, echo)
            except BusyError:
                busy.append(arm)
            if attempt.failure:
                failed[arm.title] = attempt.failure
                echo(f"{arm.title}: failed: {attempt.failure}")
        left = [arm for arm in busy if not layout.is_done(arm)]
        if len(busy) == len(waiting):  # no arm was free
            return failed, [arm.title for arm in left]
        waiting = left


def _run_arm(layout: CompareLayout, arm: Arm, runtime: Runtime, echo: Callable[[str], None]) -> None:
    if not is_trained(arm):
        echo(f"{arm.title}: trains in {arm.folder}")
        train(arm, runtime, layout.milestones(arm))
    if missing := layout.unscored(arm):
        echo(f"{arm.title}: judged at {', '.join(map(str, missing))}")
        evaluate_arm(layout, arm, runtime)
    if prompts := layout.unshown(arm):
        show(layout, arm, prompts, runtime)


class _CatchFailure(contextlib.AbstractContextManager[None]):
    """Keeps an arm's failure from the others; a bug still shows its traceback."""

    failure = ""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        if not isinstance(error, Exception):
            return False
        if isinstance(error, UserError):
            self.failure = str(error)
        else:
            traceback.print_exception(error, file=sys.stderr)
            self.failure = f"{type(error).__name__}: {first_line(error)}"
        return True


@contextlib.contextmanager
def _explain_stop(output: Path) -> Iterator[None]:
    """Replace the advice of a stopped training, which has saved its last step: the same command continues it."""
    try:
        with clean_interrupt(output):
            yield
    except Interrupted as stop:
        what = str(stop).partition("; ")[0]
        raise Interrupted(f"{what}; the same command goes on from there", stop.code) from stop


def _budget_lines(layout: CompareLayout) -> list[str]:
    """Each method's budget in updates."""
    table = [["method", "evaluations an update", "updates", "evaluations"]]
    for arm in layout.arms:
        if arm.cfg is not None and arm.seed == layout.cfg.seeds[0]:
            each, updates = mean_evaluations(arm.cfg), arm.cfg.training.steps
            table.append([arm.method, f"{each:,.1f}", f"{updates:,}", f"{each * updates:,.0f}"])
    arms = f"{len(layout.cfg.methods)} methods x {len(layout.cfg.seeds)} seeds"
    title = f"{arms}, {layout.cfg.budget:,.0f} network evaluations each (with gradient one counts three):"
    return [title, *aligned(table)]


def collect_result(layout: CompareLayout, runtime: Runtime) -> CompareResult:
    """The result of all finished arms."""
    done = [arm for arm in layout.arms if layout.is_done(arm)]
    judged = [each for arm in done for each in layout.scores(arm)]
    curve = [point for arm in done for point in layout.curve(arm)]
    teacher = next((each.scores for each in judged if each.method == TEACHER), None)
    if teacher is not None:
        for each in (*judged, *curve):
            fill_shares(each.scores, teacher)
    cfg, here = layout.cfg, environment(runtime.device)
    return CompareResult(
        settings={
            "base": cfg.base, "overrides": list(cfg.overrides), "methods": list(cfg.methods), "budget": cfg.budget,
            "nfe": list(cfg.nfe), "trained_nfe": list(cfg.trained_nfe), "seeds": list(cfg.seeds),
            "num_clips": cfg.num_clips, "clip_seed": cfg.clip_seed, "teacher_steps": cfg.teacher_steps,
            "missing": [arm.title for arm in layout.arms if arm not in done],
            "code": here["code"], "device": here["device"],
        },
        rows=[each.row for each in judged],
        means=method_means(judged),
        curve=curve_points(curve),
        wins=win_rates(judged),
        differences=differences(judged),
    )  # fmt: skip


def write_tables(layout: CompareLayout, runtime: Runtime) -> list[str]:
    """Write compare.json, compare.md and the figures; returns what to show."""
    output, compared = layout.output, collect_result(layout, runtime)
    write_compare_result(compared, output / "compare.json")
    with replacing(output / "compare.md", "table") as partial:
        partial.write_text(markdown(compared), encoding="utf-8")
    if not compared.means:
        return []
    plot_nfe(compared, output / "nfe.png")
    plot_cost(compared, output / "cost.png")
    plot_wins(compared, output / "wins.png")
    nfe = nfe_of(compared)
    return [
        "",
        f"All methods at {nfe} NFE:",
        *summary_table(compared, nfe).splitlines(),
        f"All tables and figures: {output}",
    ]
