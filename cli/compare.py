"""`rats-video compare`."""

import re
from pathlib import Path
from typing import Annotated

import typer

from rats_video.cli.options import DeviceOption, SetOption, parse_nfe_list
from rats_video.errors import UserError

EXAMPLE = "Example: `rats-video compare --config tiny --output runs/compare --methods rats,imitation --seeds 0`"


def compare(
    *,
    config: Annotated[
        str, typer.Option("--config", metavar="NAME|FILE", help="Comparison: a packaged name, or a YAML file.")
    ] = "tiny",
    output: Annotated[
        Path | None, typer.Option("--output", metavar="DIR", help="Folder to write to. [default: runs/compare-CONFIG]")
    ] = None,
    methods: Annotated[
        str | None,
        typer.Option("--methods", metavar="A,B,...", help="Only these of the config's methods. [default: all]"),
    ] = None,
    nfe: Annotated[
        str | None,
        typer.Option(
            "--nfe", metavar="N,N,...", help="Network evaluations a clip to judge at. [default: the config's]"
        ),
    ] = None,
    seeds: Annotated[
        str | None,
        typer.Option(
            "--seeds", metavar="K,K,...", help="Training seeds: one student a method and seed. [default: the config's]"
        ),
    ] = None,
    budget: Annotated[
        float | None,
        typer.Option(
            "--budget", metavar="N", help="Network evaluations to train each student. [default: the config's]"
        ),
    ] = None,
    num_clips: Annotated[
        int | None,
        typer.Option("--num-clips", metavar="N", min=1, help="Held-out clips an arm and NFE. [default: the config's]"),
    ] = None,
    device: DeviceOption = "auto",
    overrides: SetOption = None,
) -> None:
    """Train rival methods on equal budgets and judge all alike: same teacher, prompts, noise and network evaluations.

    Writes `compare.json`, `compare.md` and figures. What is done is kept: stop it and run it again at will, add
    methods, seeds or NFE, or start it several times on one folder, also from several machines, to share the work.
    """
    if budget is not None and not 0 < budget < float("inf"):
        raise UserError(f"must be above 0, got {budget:g}", where="--budget", fix="like --budget 150000")
    given = {
        "nfe": None if nfe is None else list(parse_nfe_list(nfe)),
        "seeds": None if seeds is None else _seeds(seeds),
        "budget": budget,
        "num_clips": num_clips,
    }
    changes = [f"{key}={value}" for key, value in given.items() if value is not None]
    from rats_video.commands.compare import run_compare

    run_compare(
        config=config,
        overrides=[*(overrides or []), *changes],
        methods=None if methods is None else _names(methods),
        output=output or Path("runs") / f"compare-{Path(config).stem}",
        device=device,
        echo=typer.echo,
    )


def _names(text: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(part.strip() for part in text.split(",")))


def _seeds(text: str) -> list[int]:
    parts = [part.strip() for part in text.split(",")]
    for part in parts:
        if not re.fullmatch(r"[0-9]{1,18}", part):
            raise UserError(f"{part!r} is not a whole number from 0", where="--seeds", fix="like --seeds 0,1,2")
    return list(dict.fromkeys(map(int, parts)))
