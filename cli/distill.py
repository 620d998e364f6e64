"""`rats-video distill`."""

import typer

from rats_video.cli.launch import distributed
from rats_video.cli.options import (
    ConfigOption,
    ConfigSeedOption,
    DeviceOption,
    OverwriteOption,
    ResumeOption,
    RunFolderOption,
    SetOption,
    check_exclusive,
    run_folder,
)

EXAMPLE = "Example: `rats-video distill --config tiny --output runs/first --set training.optimizer.lr=1e-4`"


@distributed
def distill(
    *,
    config: ConfigOption = "tiny",
    output: RunFolderOption = None,
    seed: ConfigSeedOption = None,
    device: DeviceOption = "auto",
    resume: ResumeOption = False,
    overwrite: OverwriteOption = False,
    overrides: SetOption = None,
) -> None:
    """Distill a teacher into a few-step student.

    Writes `config.resolved.yaml`, the log, checkpoints and the student's weights.
    """
    check_exclusive(("--resume", resume), ("--overwrite", overwrite))
    from rats_video.commands.distill import run_distill

    lines = run_distill(
        config=config,
        overrides=overrides or [],
        output=run_folder(output, config),
        seed=seed,
        device=device,
        resume=resume,
        overwrite=overwrite,
    )
    typer.echo("\n".join(lines))
