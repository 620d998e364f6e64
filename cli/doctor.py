"""`rats-video doctor`."""

import typer

EXAMPLE = "Example: `rats-video doctor`"


def doctor() -> None:
    """Say what is here and what is missing for which command, with the fix: GPU, libraries, disk, ports, model hub.

    Exit code 0 if all that the basic commands need is here, 1 if not. Sends nothing but one request to the model hub.
    """
    from rats_video.commands.doctor import run_doctor

    lines, is_sound = run_doctor()
    typer.echo("\n".join(lines))
    raise typer.Exit(0 if is_sound else 1)
