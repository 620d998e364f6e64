"""`compare`: every method with the same teacher, prompts, noise and budget; what is done is never done again."""

from __future__ import annotations

import contextlib
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType

from rats_video.build.common import environment, make_folder, start_runtime, stoppable
from rats_video.build.compare_arms import Entrant, Study, is_trained, judge, show, train
from rats_video.config.compare import CompareConfig, mean_evaluations
from rats_video.config.load import load_config
from rats_video.errors import BusyError, Interrupted, UserError, first_line
from rats_video.evaluation.compared import Compared, write_compared
from rats_video.evaluation.compared_plots import plot_cost, plot_nfe, plot_wins
from rats_video.evaluation.compared_table import markdown, nfe_of, summary_table
from rats_video.evaluation.judged import curve_points, method_means, win_rates
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
    say: Callable[[str], None],
) -> None:
    """Train and judge what of a comparison is not done yet, then write its tables and figures; `say` is told of each.

    Several processes on one OUTPUT share its arms; who finds only arms that others work at ends without a table.

    Raises:
        UserError: the configuration is wrong, or arms failed; the others are done.
        Interrupted: somebody asked to stop.
    """
    cfg = load_config(CompareConfig, config, group="compare", overrides=overrides)
    study = Study.of(cfg if methods is None else cfg.only(methods), output)
    runtime = start_runtime(device)
    make_folder(output)
    for line in _budget(study):
        say(line)
    with _goes_on(output):
        failed, elsewhere = work(study, runtime, say)
        if elsewhere:
            say(f"Others work at {', '.join(elsewhere)}: the last one writes {output / 'compare.md'}.")
        else:
            for line in write(study, runtime):
                say(line)
    if failed:
        what = "; ".join(f"{title}: {line}" for title, line in failed.items())
        raise UserError(
            f"{len(failed)} of {len(study.entrants)} arms failed: {what}", where=str(output),
            fix="the others are done; the same command tries these again",
        )  # fmt: skip


def work(study: Study, runtime: Runtime, say: Callable[[str], None]) -> tuple[dict[str, str], list[str]]:
    """Do every arm that nobody else works at, until none is left.

    Returns:
        The error lines of those that failed, by title, and the titles of those that others work at.
    """
    failed: dict[str, str] = {}
    for entrant in study.entrants:
        if study.is_done(entrant):
            say(f"{entrant.title}: done before")
    waiting = [entrant for entrant in study.entrants if not study.is_done(entrant)]
    while True:
        busy = []
        for entrant in waiting:
            attempt = _Attempt()
            try:
                with locked(entrant.folder), attempt:
                    _do(study, entrant, runtime, say)
            except BusyError:
                busy.append(entrant)
            if attempt.failure:
                failed[entrant.title] = attempt.failure
                say(f"{entrant.title}: failed: {attempt.failure}")
        left = [entrant for entrant in busy if not study.is_done(entrant)]
        if len(busy) == len(waiting):  # nothing was free
            return failed, [entrant.title for entrant in left]
        waiting = left


def _do(study: Study, entrant: Entrant, runtime: Runtime, say: Callable[[str], None]) -> None:
    if not is_trained(entrant):
        say(f"{entrant.title}: trains in {entrant.folder}")
        train(entrant, runtime, study.milestones(entrant))
    if missing := study.unscored(entrant):
        say(f"{entrant.title}: judged at {', '.join(map(str, missing))}")
        judge(study, entrant, runtime)
    if prompts := study.unshown(entrant):
        show(study, entrant, prompts, runtime)


class _Attempt(contextlib.AbstractContextManager[None]):
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
def _goes_on(output: Path) -> Iterator[None]:
    """A training that was asked to stop has saved its last step; here the same command goes on from it."""
    try:
        with stoppable(output):
            yield
    except Interrupted as stop:
        what = str(stop).partition("; ")[0]
        raise Interrupted(f"{what}; the same command goes on from there", stop.code) from stop


def _budget(study: Study) -> list[str]:
    """What each method's budget comes to."""
    table = [["method", "evaluations an update", "updates", "evaluations"]]
    for entrant in study.entrants:
        if entrant.cfg is not None and entrant.seed == study.cfg.seeds[0]:
            each, updates = mean_evaluations(entrant.cfg), entrant.cfg.training.steps
            table.append([entrant.method, f"{each:,.1f}", f"{updates:,}", f"{each * updates:,.0f}"])
    arms = f"{len(study.cfg.methods)} methods x {len(study.cfg.seeds)} seeds"
    title = f"{arms}, {study.cfg.budget:,.0f} network evaluations each (with gradient one counts three):"
    return [title, *aligned(table)]


def gather(study: Study, runtime: Runtime) -> Compared:
    """What is there of a comparison."""
    done = [entrant for entrant in study.entrants if study.is_done(entrant)]
    judged = [each for entrant in done for each in study.judged(entrant)]
    curve = [point for entrant in done for point in study.curve(entrant)]
    teacher = next((each.scores for each in judged if each.method == TEACHER), None)
    if teacher is not None:
        for each in (*judged, *curve):
            fill_shares(each.scores, teacher)
    cfg, here = study.cfg, environment(runtime.device)
    return Compared(
        settings={
            "base": cfg.base, "overrides": list(cfg.overrides), "methods": list(cfg.methods), "budget": cfg.budget,
            "nfe": list(cfg.nfe), "trained_nfe": list(cfg.trained_nfe), "seeds": list(cfg.seeds),
            "num_clips": cfg.num_clips, "clip_seed": cfg.clip_seed, "teacher_steps": cfg.teacher_steps,
            "missing": [entrant.title for entrant in study.entrants if entrant not in done],
            "code": here["code"], "device": here["device"],
        },
        rows=[each.row for each in judged],
        means=method_means(judged),
        curve=curve_points(curve),
        wins=win_rates(judged),
    )  # fmt: skip


def write(study: Study, runtime: Runtime) -> list[str]:
    """Write compare.json, compare.md and the figures; returns what to show."""
    output, compared = study.output, gather(study, runtime)
    write_compared(compared, output / "compare.json")
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
