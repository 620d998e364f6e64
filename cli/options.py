"""Options that several commands share, each described once."""

import functools
import inspect
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from rats_video.errors import UserError


def _check_device(value: str) -> str:
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", value):
        raise typer.BadParameter(f"{value!r} is not one of auto, cpu, cuda, cuda:N")
    return value


ConfigOption = Annotated[
    str, typer.Option("--config", metavar="NAME|FILE", help="Config: a packaged name, or the path of a YAML file.")
]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change one config value, as training.steps=100. Repeatable."),
]
RunFolderOption = Annotated[
    Path | None, typer.Option("--output", metavar="DIR", help="Folder to write to. [default: runs/CONFIG]")
]
TrainFolderOption = Annotated[
    Path | None, typer.Option("--output", metavar="DIR", help="Folder to write to. [default: runs/MODEL-CONFIG]")
]
OutputOption = Annotated[Path, typer.Option("--output", metavar="DIR", help="Folder to write to.")]
ConfigSeedOption = Annotated[
    int | None, typer.Option("--seed", metavar="N", min=0, help="Seed of all randomness. [default: the config's seed]")
]
SeedOption = Annotated[int, typer.Option("--seed", metavar="N", min=0, help="Seed of the starting noise.")]
DeviceOption = Annotated[
    str,
    typer.Option(
        "--device",
        metavar="auto|cpu|cuda|cuda:N",
        callback=_check_device,
        help="Where to compute; auto takes the GPU when there is one.",
    ),
]
GpusOption = Annotated[
    int,
    typer.Option(
        "--gpus",
        min=1,
        metavar="N",
        help="Processes on this machine, one a GPU (any number with --device cpu).",
    ),
]
NodesOption = Annotated[
    int,
    typer.Option("--nodes", min=1, metavar="M", help="Machines; run the same command on each of them."),
]
NodeRankOption = Annotated[
    int | None,
    typer.Option("--node-rank", min=0, metavar="I",
        help="Number of this machine, from 0, which writes and prints. [default: they agree]",
    ),
]  # fmt: skip
RendezvousOption = Annotated[
    str | None,
    typer.Option(
        "--rendezvous", metavar="HOST:PORT", help="Where the machines meet: one of them, and a free port of it."
    ),
]
RestartsOption = Annotated[
    int,
    typer.Option("--restarts", min=0, metavar="N",
        help="Times to go on from the last checkpoint when a process is lost; a mistake is never tried again.",
    ),
]  # fmt: skip
ResumeOption = Annotated[bool, typer.Option("--resume", help="Continue the run in the output folder, exactly.")]
OverwriteOption = Annotated[bool, typer.Option("--overwrite", help="Replace what the output folder holds.")]
NfeOption = Annotated[
    int, typer.Option("--nfe", metavar="N", min=1, help="Network evaluations a clip: fewer is faster, more is finer.")
]
NumVideosOption = Annotated[
    int | None, typer.Option("--num-videos", metavar="N", min=1, help="Videos to make. [default: one a prompt]")
]
PortOption = Annotated[
    int, typer.Option("--port", metavar="PORT", min=1, max=65535, help="Where the page is, on this machine.")
]
PromptOption = Annotated[
    list[str] | None, typer.Option("--prompt", metavar="TEXT", help="What the video shows. Repeatable.")
]
PromptsOption = Annotated[Path | None, typer.Option("--prompts", metavar="FILE", help="Text file, one prompt a line.")]
BaseOption = Annotated[
    Path | None,
    typer.Option(
        "--base", metavar="DIR|USER/NAME", help="Where the student's base pipeline is now. [default: where it was]"
    ),
]
RunArgument = Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a finished `distill` or `run`.")]


Command = Callable[..., None]


def add_options(
    wrapper: Command, command: Command, options: Mapping[str, tuple[Any, Any]], *, without: str = ""
) -> Command:
    """Show Typer a wrapper as its command with more options, each an annotation and a default, at the end."""
    parameters = dict(inspect.signature(command).parameters)
    parameters.pop(without, None)
    for name, (annotation, default) in options.items():
        parameters[name] = inspect.Parameter(
            name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation
        )
    # Typer reads both.
    wrapper.__signature__ = inspect.Signature([*parameters.values()])  # type: ignore[attr-defined]
    wrapper.__annotations__ = {name: parameter.annotation for name, parameter in parameters.items()}
    return wrapper


def run_options(folder: Any) -> Callable[[Command], Command]:
    """Give a command the options of all that trains, checked, as the one argument `options`; see `with_folder`.

    Args:
        folder: its option `--output`.
    """
    shared = {
        "config": (ConfigOption, "tiny"),
        "output": (folder, None),
        "seed": (ConfigSeedOption, None),
        "device": (DeviceOption, "auto"),
        "resume": (ResumeOption, False),
        "overwrite": (OverwriteOption, False),
        "overrides": (SetOption, None),
    }

    def decorate(command: Command) -> Command:
        @functools.wraps(command)
        def run(**given: Any) -> None:
            options = {name: given.pop(name) for name in shared}
            check_exclusive(("--resume", options["resume"]), ("--overwrite", options["overwrite"]))
            command(options=options | {"overrides": options["overrides"] or []}, **given)

        return add_options(run, command, shared, without="options")

    return decorate


def with_folder(options: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The options of a command that trains, its output in runs/PREFIX-CONFIG unless it is given.

    Raises:
        UserError: `--resume` finds no run there. What was restarted may have been lost before it had one.
    """
    output = options["output"] or Path("runs") / f"{prefix}{Path(options['config']).stem}"
    restarts = (os.environ.get(name, "0") for name in ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"))
    is_first = os.environ.get("RANK", "0") == "0"  # another machine may not see the folder
    if options["resume"] and is_first and not any(map(int, restarts)):
        from rats_video.commands.folders import check_run

        check_run(output)
    return {**options, "output": output}


def check_exclusive(first: tuple[str, object], second: tuple[str, object]) -> None:
    """Refuse two options that contradict each other."""
    if first[1] and second[1]:
        raise UserError(f"cannot be used with {second[0]}", where=first[0], fix="give one of them")


def parse_nfe_list(text: str) -> tuple[int, ...]:
    """`3,4,8` as (3, 4, 8), in the order given."""
    parts = [part.strip() for part in text.split(",")]
    for part in parts:
        if not re.fullmatch(r"0*[1-9][0-9]{0,3}", part):
            raise UserError(f"{part!r} is not a whole number from 1 to 9999", where="--nfe", fix="like --nfe 3,4,8")
    return tuple(dict.fromkeys(int(part) for part in parts))
