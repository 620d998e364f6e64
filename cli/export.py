"""`rats-video export`: pictures and videos for people to look at."""

from pathlib import Path
from typing import Annotated

import typer

from rats_video.cli.launch import distributed
from rats_video.cli.options import (
    DeviceOption,
    NfeOption,
    NumVideosOption,
    PromptOption,
    PromptsOption,
    RunArgument,
    SeedOption,
    check_exclusive,
)

app = typer.Typer(help="Export videos of a finished run.")


@app.callback()
def export() -> None:
    """Export videos of a finished run."""


@app.command(epilog="Example: `rats-video export comparison runs/demo --nfe 4`")
@distributed
def comparison(
    run: RunArgument,
    *,
    nfe: NfeOption = 4,
    prompt: PromptOption = None,
    prompts: PromptsOption = None,
    num_videos: NumVideosOption = None,
    seed: SeedOption = 0,
    output: Annotated[
        Path | None, typer.Option("--output", metavar="DIR", help="Folder to write to. [default: RUN/comparison]")
    ] = None,
    device: DeviceOption = "auto",
) -> None:
    """Put teacher and student side by side, from the same noise and prompt.

    Writes one MP4 a prompt. Without prompts it uses the run's validation prompts.
    """
    check_exclusive(("--prompt", prompt), ("--prompts", prompts))
    from rats_video.build.comparison import run_export_comparison

    lines = run_export_comparison(
        run=run,
        nfe=nfe,
        prompts=prompt or [],
        prompts_file=prompts,
        num_videos=num_videos,
        seed=seed,
        output=output,
        device=device,
    )
    typer.echo("\n".join(lines))
