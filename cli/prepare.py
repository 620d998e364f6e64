"""`rats-video prepare`."""

from pathlib import Path
from typing import Annotated

import typer

from rats_video.cli.launch import distributed
from rats_video.cli.options import ConfigOption, DeviceOption, OverwriteOption, SetOption

EXAMPLE = "Example: `rats-video prepare clips --output caches/clips --config wan21_1b --gpus 4`"


@distributed
def prepare(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE",
            help="Folder of captioned videos or images, table of them, tars of a WebDataset, prompts, or `shapes`.",
        ),
    ],
    *,
    output: Annotated[
        Path, typer.Option("--output", metavar="DIR", help="Folder of the cache; what it lacks is made.")
    ],
    config: ConfigOption = "tiny",
    device: DeviceOption = "auto",
    overwrite: OverwriteOption = False,
    overrides: SetOption = None,
) -> None:
    """Turn videos and images into cached latents to train on.

    Stopped or called again, it goes on where it was: only new and changed files are read.
    """
    from rats_video.commands.prepare import run_prepare

    lines = run_prepare(
        source=source, config=config, output=output, device=device, overrides=overrides or [], overwrite=overwrite
    )
    typer.echo("\n".join(lines))
