"""`rats-video demo`."""

from pathlib import Path
from typing import Annotated

import typer

from rats_video.cli.options import BaseOption, DeviceOption, PortOption

EXAMPLE = "Example: `rats-video demo runs/demo`"


def demo(
    model: Annotated[
        Path | None,
        typer.Argument(
            metavar="[RUN|STUDENT]", help="Run or student folder, or USER/NAME on the hub. [default: the tiny student]"
        ),
    ] = None,
    *,
    base: BaseOption = None,
    port: PortOption = 7860,
    device: DeviceOption = "auto",
) -> None:
    """Open a page with prompt, network calls and seed, and the teacher beside the student.

    Only a browser on this machine can see it; nothing is kept or sent anywhere. Needs `pip install 'rats-video[demo]'`.
    """
    from rats_video.commands.demo import run_demo

    run_demo(model=model, base=base, port=port, device=device, echo=typer.echo)
