"""`rats-video sample`."""

from pathlib import Path
from typing import Annotated

import typer

from rats_video.cli.launch import distributed
from rats_video.cli.options import (
    DeviceOption,
    NfeOption,
    NumVideosOption,
    OutputOption,
    PromptOption,
    PromptsOption,
    SeedOption,
    check_exclusive,
)

EXAMPLE = 'Example: `rats-video sample --nfe 4 --prompt "a red circle moves left" --output samples`'


@distributed
def sample(
    *,
    model: Annotated[
        Path | None,
        typer.Option(
            "--model", metavar="RUN|DIR", help="Run or student folder. [default: the tiny student in the package]"
        ),
    ] = None,
    nfe: NfeOption = 4,
    prompt: PromptOption = None,
    prompts: PromptsOption = None,
    num_videos: NumVideosOption = None,
    seed: SeedOption = 0,
    output: OutputOption = Path("samples"),
    device: DeviceOption = "auto",
) -> None:
    """Make videos from prompts with a distilled student.

    Writes one MP4 a video. Without prompts it uses the model's own examples.
    """
    check_exclusive(("--prompt", prompt), ("--prompts", prompts))
    from rats_video.build.inference import run_sample

    lines = run_sample(
        model=model,
        nfe=nfe,
        prompts=prompt or [],
        prompts_file=prompts,
        num_videos=num_videos,
        seed=seed,
        output=output,
        device=device,
    )
    typer.echo("\n".join(lines))
