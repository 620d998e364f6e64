"""`rats-video run`."""

from typing import Any

import typer

from rats_video.cli.launch import distributed
from rats_video.cli.options import RunFolderOption, run_options, with_folder

EXAMPLE = "Example: `rats-video run --config tiny --output runs/demo`"


@distributed
@run_options(RunFolderOption)
def run(*, options: dict[str, Any]) -> None:
    """Do everything in one folder: distill, sample, export a comparison, evaluate.

    Steps already done in the folder are skipped.
    """
    from rats_video.commands.run import run_all

    run_all(echo=typer.echo, **with_folder(options))
