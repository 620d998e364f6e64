"""`rats-video calibrate`."""

from pathlib import Path
from typing import Annotated

import typer

from rats_video.cli.options import ConfigOption, DeviceOption, OverwriteOption, SetOption

EXAMPLE = "Example: `rats-video calibrate --config tiny --num-prompts 64 --output calibrated.yaml`"


def calibrate(
    *,
    config: ConfigOption = "tiny",
    overrides: SetOption = None,
    num_prompts: Annotated[
        int,
        typer.Option(
            "--num-prompts", metavar="N", min=2, help="Training prompts to measure on; more give narrower intervals."
        ),
    ] = 32,
    output: Annotated[Path, typer.Option("--output", metavar="FILE", help="Config to write.")] = Path(
        "calibrated.yaml"
    ),
    device: DeviceOption = "auto",
    overwrite: OverwriteOption = False,
) -> None:
    """Measure how the reward tells the teacher from the untrained student, and set its scale, the gate and the loss.

    Writes a config that extends the given one: the scale of a sum's terms, method.gate.tau, method.reward_weight.
    """
    from rats_video.commands.calibrate import run_calibrate

    lines = run_calibrate(
        config=config,
        overrides=overrides or [],
        num_prompts=num_prompts,
        output=output,
        device=device,
        overwrite=overwrite,
    )
    typer.echo("\n".join(lines))
