"""The `rats-video` command. A command imports what it runs inside itself, so that help answers at once."""

import contextlib
import errno
import signal
import sys
from collections.abc import Iterator
from types import FrameType
from typing import Annotated

import typer

import rats_video
from rats_video.cli import (
    calibrate,
    compare,
    demo,
    distill,
    doctor,
    evaluate,
    export,
    plan,
    prepare,
    rate,
    report,
    rewards,
    run,
    sample,
    train,
)
from rats_video.cli.launch import RankZeroOutput, record_exit
from rats_video.errors import REQUEUE, Interrupted, UserError, printable
from rats_video.quiet import quiet_libraries

app = typer.Typer(pretty_exceptions_enable=False, rich_markup_mode="markdown")
app.command("run", epilog=run.EXAMPLE)(run.run)
app.command("distill", epilog=distill.EXAMPLE)(distill.distill)
app.command("plan", epilog=plan.EXAMPLE)(plan.plan)
app.command("calibrate", epilog=calibrate.EXAMPLE)(calibrate.calibrate)
app.command("sample", epilog=sample.EXAMPLE)(sample.sample)
app.command("demo", epilog=demo.EXAMPLE)(demo.demo)
app.add_typer(export.app, name="export")
app.command("evaluate", epilog=evaluate.EXAMPLE)(evaluate.evaluate)
app.command("compare", epilog=compare.EXAMPLE)(compare.compare)
app.command("rate", epilog=rate.EXAMPLE)(rate.rate)
app.command("report", epilog=report.EXAMPLE)(report.report)
app.command("prepare", epilog=prepare.EXAMPLE)(prepare.prepare)
app.add_typer(train.app, name="train")
app.add_typer(rewards.app, name="rewards")
app.command("doctor", epilog=doctor.EXAMPLE)(doctor.doctor)


@app.callback(invoke_without_command=True)
def root(
    context: typer.Context,
    *,
    version: Annotated[bool, typer.Option("--version", help="Show the version and exit.")] = False,
) -> None:
    """Distill a slow video or image diffusion model into a few-step one that people prefer (RATS).

    Start with `rats-video run`: it distills a tiny model on a CPU, samples it, compares it with its teacher and
    evaluates it. `rats-video doctor` says what this machine lacks. Each command explains its options with `--help`.
    """
    if version:
        typer.echo(f"rats-video {rats_video.__version__}")
    elif context.invoked_subcommand is None:
        typer.echo(context.get_help())


def main() -> None:
    """Run the command line; a user's mistake ends as one line and exit code 2, a bug keeps its traceback.

    Ctrl-C ends it with code 130, SIGTERM and SIGUSR1 with 75, on which a scheduler may start it again.
    """
    quiet_libraries()
    try:
        with _orderly_end(), RankZeroOutput((UserError, Interrupted, SystemExit, typer.TyperException, OSError)):
            code = app(prog_name="rats-video", standalone_mode=False)
    except UserError as error:
        _fail(str(error), 2)
    except Interrupted as stop:
        record_exit(str(stop), stop.code)
        typer.echo(str(stop), err=True)
        sys.exit(stop.code)
    except typer.TyperException as error:
        from pydantic import ValidationError

        if isinstance(error.__cause__, ValidationError):  # of an option's value
            from rats_video.config.explain import first_mistake

            error.message = first_mistake(error.__cause__)
        _fail(error.format_message(), error.exit_code)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        _fail(f"disk full while writing {error.filename or 'the output'}", 2)
    if code == 130:  # how Typer reports Ctrl-C
        _fail("interrupted", code)
    sys.exit(code)


@contextlib.contextmanager
def _orderly_end() -> Iterator[None]:
    """Context in which a request to end deletes what is half-written; a training also saves, by handlers of its own."""

    def end(number: int, _: FrameType | None) -> None:
        raise Interrupted(f"stopped by {signal.Signals(number).name}; nothing that was saved is lost", REQUEUE)

    previous = {number: signal.signal(number, end) for number in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _fail(line: str, code: int) -> None:
    record_exit(line, code)
    from rich.console import Console
    from rich.text import Text

    # Text, because a `Text` takes no markup from a file name; soft_wrap, because a script greps for one line.
    text = Text.assemble(("error:", "bold red"), " ", printable(" ".join(line.split())))
    Console(stderr=True).print(text, soft_wrap=True, highlight=False)
    sys.exit(code)
