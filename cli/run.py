"""`rats-video run`."""

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

EXAMPLE = "Example: `rats-video run --config tiny --output runs/demo`"


@distributed
def run(
    *,
    config: ConfigOption = "tiny",
    output: RunFolderOption = None,
    seed: ConfigSeedOption = None,
    device: DeviceOption = "auto",
    resume: ResumeOption = False,
    overwrite: OverwriteOption = False,
    overrides: SetOption = None,
) -> None:
    """Do everything in one folder: distill, sample, export a comparison, evaluate.

    Steps already done in the folder are skipped.
    """
    check_exclusive(("--resume", resume), ("--overwrite", overwrite))
    from rats_video.commands.run import run_all

    run_all(
        config=config,
        overrides=overrides or [],
        output=run_folder(output, config),
        seed=seed,
        device=device,
        resume=resume,
        overwrite=overwrite,
        echo=typer.echo,
    )
