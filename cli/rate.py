"""`rats-video rate`."""

from pathlib import Path
from typing import Annotated

import typer

from rats_video.cli.options import (
    DeviceOption,
    OverwriteOption,
    PortOption,
    PromptOption,
    PromptsOption,
    SeedOption,
    check_exclusive,
)

EXAMPLE = "Example: `rats-video rate runs/demo`"


def rate(
    runs: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="RUN",
            help="Runs, students, pipelines or folders of `sample`. One run alone meets its teacher; none goes on with "
            "the rating of the --output folder.",
        ),
    ] = None,
    *,
    output: Annotated[
        Path | None, typer.Option("--output", metavar="DIR", help="Folder to write to. [default: ratings/RUN-RUN]")
    ] = None,
    nfe: Annotated[
        int | None, typer.Option("--nfe", metavar="N", min=1, help="Network evaluations a clip. [default: as `sample`]")
    ] = None,
    prompt: PromptOption = None,
    prompts: PromptsOption = None,
    num_videos: Annotated[
        int | None,
        typer.Option(
            "--num-videos", metavar="N", min=1, help="Clips of each run. [default: 16, or one a given prompt]"
        ),
    ] = None,
    seed: SeedOption = 0,
    batch_size: Annotated[int, typer.Option("--batch-size", metavar="N", min=1, help="Videos made together.")] = 16,
    port: PortOption = 7861,
    results: Annotated[
        bool, typer.Option("--results", help="Only show what the votes say, and which rewards agree with them.")
    ] = False,
    reward: Annotated[
        list[Path] | None,
        typer.Option("--reward", metavar="DIR", help="Folder of a `train reward`, to compare with people. Repeatable."),
    ] = None,
    min_attention: Annotated[
        float,
        typer.Option(
            "--min-attention", metavar="SHARE", min=0, max=1, help="Checks a person must pass to count, 0 to 1."
        ),
    ] = 0.75,
    overwrite: OverwriteOption = False,
    device: DeviceOption = "auto",
) -> None:
    """Let people choose between clips of the same prompt and noise, without knowing whose they are.

    Opens a page on this machine: keys 1, 2, 0 (no difference), U (undo). Ctrl-C shows win rates and writes preferences,
    as `train reward` reads them. The same command goes on. Each vote is on the disk before the next pair shows.
    """
    check_exclusive(("--prompt", prompt), ("--prompts", prompts))
    from rats_video.commands.rate import run_rate
    from rats_video.commands.rate_arms import RateOptions

    run_rate(
        runs=runs or [],
        options=RateOptions(nfe, prompt or [], prompts, num_videos, seed, device, batch_size),
        output=output,
        port=port,
        overwrite=overwrite,
        results=results,
        rewards=reward or [],
        least=min_attention,
        echo=typer.echo,
    )
