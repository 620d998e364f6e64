"""`rats-video plan`."""

from pathlib import Path
from typing import Annotated

import typer

from rats_video.cli.options import ConfigOption, SetOption

EXAMPLE = "Example: `rats-video plan --config tiny --gpu-memory 24 --device-name rtx4090`"


def plan(
    *,
    config: ConfigOption = "tiny",
    overrides: SetOption = None,
    gpu_memory: Annotated[
        float | None,
        typer.Option("--gpu-memory", metavar="GIB", help="Memory of one GPU in GiB. [default: the device's]"),
    ] = None,
    gpus: Annotated[int, typer.Option("--gpus", metavar="N", min=1, help="Processes, each with a GPU of its own.")] = 1,
    device_name: Annotated[
        str,
        typer.Option(
            "--device-name", metavar="NAME", help="Device to plan for: h100, h200, a100, l40s, rtx4090 or cpu."
        ),
    ] = "h100",
    utilisation: Annotated[
        float | None,
        typer.Option(
            "--utilisation",
            metavar="SHARE",
            help="Share, 0 to 1, of the device's peak speed that is reached. [default: the device's]",
        ),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Also write the plan to this file, as JSON.")
    ] = None,
) -> None:
    """Say what a run will need before anything is loaded: memory, network calls, time, and settings that fit.

    Works without a GPU and before the model is downloaded, where the config names an `architecture`.
    """
    from rats_video.commands.plan import run_plan

    lines = run_plan(
        config=config,
        overrides=overrides or [],
        gpu_memory=gpu_memory,
        gpus=gpus,
        device_name=device_name,
        utilisation=utilisation,
        output=output,
    )
    typer.echo("\n".join(lines))
