"""`rats-video distill`."""

from typing import Any

import typer

from rats_video.cli.launch import distributed
from rats_video.cli.options import RunFolderOption, run_options, with_folder

EXAMPLE = "Example: `rats-video distill --config tiny --output runs/first --set training.optimizer.lr=1e-4`"


@distributed
@run_options(RunFolderOption)
def distill(*, options: dict[str, Any]) -> None:
    """Distill a teacher into a few-step student.

    Writes `config.resolved.yaml`, the log, checkpoints and the student's weights.
    """
    from rats_video.commands.distill import run_distill

    typer.echo("\n".join(run_distill(**with_folder(options))))
