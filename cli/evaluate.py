"""`rats-video evaluate`."""

from pathlib import Path
from typing import Annotated

import typer

from rats_video.cli.launch import distributed
from rats_video.cli.options import DeviceOption, RunArgument, SeedOption, parse_nfe_list

EXAMPLE = "Example: `rats-video evaluate runs/demo --nfe 3,4,8 --num-clips 32`"


@distributed
def evaluate(
    run: RunArgument,
    *,
    nfe: Annotated[
        str | None,
        typer.Option(
            "--nfe", metavar="N,N,...", help="Network evaluations a clip to measure at. [default: the run's config]"
        ),
    ] = None,
    num_clips: Annotated[
        int | None, typer.Option("--num-clips", min=1, help="Clips to score at each NFE. [default: the run's config]")
    ] = None,
    seed: SeedOption = 0,
    output: Annotated[
        Path | None, typer.Option("--output", metavar="DIR", help="Folder to write to. [default: RUN/evaluation]")
    ] = None,
    device: DeviceOption = "auto",
) -> None:
    """Measure student and teacher over a range of NFE.

    Writes the scores as JSON, a plot and a report.
    """
    counts = None if nfe is None else parse_nfe_list(nfe)
    from rats_video.build.evaluate import run_evaluate

    lines = run_evaluate(run=run, nfe=counts, num_clips=num_clips, seed=seed, output=output, device=device)
    typer.echo("\n".join(lines))
