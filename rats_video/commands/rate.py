"""`rate`: people compare clips of several runs on a page of this machine."""

from __future__ import annotations

import shlex
import signal
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path

from rats_video.commands.device import pick_device
from rats_video.commands.folders import claim_folder, make_folder
from rats_video.commands.rate_arms import RateOptions, arm_names, make_rating
from rats_video.commands.rate_results import counted_votes, tell_results
from rats_video.commands.rate_rewards import agreement, rewards_at_hand
from rats_video.datasets.prompts.files import read_prompts
from rats_video.errors import Interrupted, UserError
from rats_video.files import locked
from rats_video.inference.audio import read_sound
from rats_video.rating.raters import Raters
from rats_video.rating.record import RECORD, Asked, Rating
from rats_video.rating.server import RatingServer


def run_rate(
    *,
    runs: Sequence[Path],
    options: RateOptions,
    output: Path | None,
    port: int,
    overwrite: bool,
    results: bool,
    rewards: Sequence[Path],
    least: float,
    echo: Callable[[str], None],
) -> None:
    """Serve the page until it is stopped, then show what the votes say; or with `results` only show it.

    Args:
        runs: the arms: runs, students, pipelines, or folders of `sample`; none goes on with the rating in `output`.
        options: how their clips are made.
        output: the rating's folder; None is ratings/ARM-ARM.
        port: of the page.
        overwrite: replaces the rating that is there.
        results: serves nothing.
        rewards: folders of `train reward` to compare with people, beside those at hand.
        least: share of the attention checks that a person must get right to be counted.
        echo: gets the lines to show.

    Raises:
        Interrupted: when it is stopped, by Ctrl-C.
        UserError: nothing can be compared, the port is taken, or another process rates there.
    """
    if output is None and not runs:
        raise UserError("nothing to compare", where="RUN", fix="name a run, or with --output a rating to go on with")
    folder = output or Path("ratings") / "-".join(arm_names(runs))
    if results:
        rating = Rating.load(folder)
        _check_same(rating, runs, options, folder)
        votes, people = counted_votes(rating, folder, least)
        if not votes:
            raise UserError("no vote counts yet", where=str(folder), fix="vote first: leave --results out")
        heard = read_sound(folder / votes[0].files[0]) is not None
        at_hand = rewards_at_hand(rating.asked.runs, rewards, with_sound=heard)
        found = agreement(votes, at_hand, pick_device(options.device), folder)
        echo("\n".join(tell_results(rating, votes, people, found, folder)))
        return
    if not runs:
        Rating.load(folder)  # before the folder is made
    make_folder(folder)
    with locked(folder):
        if overwrite:
            claim_folder(folder, overwrite=True)
        if (folder / RECORD).exists():
            rating = Rating.load(folder)
            _check_same(rating, runs, options, folder)
        else:
            rating = make_rating(runs, options, _asked(runs, options), folder)
        try:
            with closing(RatingServer(Raters(rating, folder), port)) as server:
                echo(f"{len(rating.pairs)} pairs of {', '.join(rating.arms)}: {folder}")
                echo(f"{server.url} (this machine only; Ctrl-C ends it and shows the results)")
                signal.pause()
        except KeyboardInterrupt as stop:
            votes, people = counted_votes(rating, folder, least)
            echo("\n".join(tell_results(rating, votes, people, {}, folder)) if votes else "no vote counts yet")
            echo(f"which reward agrees with people: rats-video rate --output {shlex.quote(str(folder))} --results")
            raise Interrupted("the page is closed; the same command goes on") from stop


def _asked(runs: Sequence[Path], options: RateOptions) -> Asked:
    prompts = [*options.prompts, *(read_prompts(options.prompts_file) if options.prompts_file else ())]
    return Asked(
        runs=tuple(str(run.expanduser().absolute()) if run.expanduser().exists() else str(run) for run in runs),
        nfe=options.nfe, num_videos=options.num_videos, seed=options.seed, prompts=tuple(prompts),
    )  # fmt: skip


def _check_same(rating: Rating, runs: Sequence[Path], options: RateOptions, folder: Path) -> None:
    """Refuse a rating of other clips than the command names; it need not name any."""
    now, before = _asked(runs, options).model_dump(), rating.asked.model_dump()
    names = {"runs": "RUN", "nfe": "--nfe", "num_videos": "--num-videos", "seed": "--seed", "prompts": "the prompts"}
    changed = [option for key, option in names.items() if now[key] != before[key]]
    if runs and changed:
        verb = "differs" if len(changed) == 1 else "differ"
        fix = f"go on with it: rats-video rate --output {shlex.quote(str(folder))}; or give another --output"
        raise UserError(f"holds a rating of other clips: {', '.join(changed)} {verb}", where=str(folder), fix=fix)
