"""`rats-video sample`."""

from pathlib import Path
from typing import Annotated

import typer

from rats_video.cli.launch import distributed
from rats_video.cli.options import (
    BaseOption,
    DeviceOption,
    NfeOption,
    NumVideosOption,
    OutputOption,
    OverwriteOption,
    PromptOption,
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
    base: BaseOption = None,
    nfe: NfeOption = 4,
    prompt: PromptOption = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            "--prompts",
            metavar="FILE|-",
            help="One prompt a line; or .jsonl or .csv rows of prompt, seed, nfe, id; or - for lines from a pipe.",
        ),
    ] = None,
    num_videos: NumVideosOption = None,
    seed: SeedOption = 0,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Videos made together.")] = 16,
    output: OutputOption = Path("samples"),
    overwrite: OverwriteOption = False,
    device: DeviceOption = "auto",
) -> None:
    """Make videos from prompts with a distilled student.

    Writes one MP4 a video as soon as it is ready, and a manifest. Without prompts it uses the model's own examples.
    The same command again makes what is missing.
    """
    check_exclusive(("--prompt", prompt), ("--prompts", prompts))
    from rats_video.commands.sample import run_sample

    run_sample(
        model=model,
        base=base,
        nfe=nfe,
        prompts=prompt or [],
        prompts_file=prompts,
        num_videos=num_videos,
        seed=seed,
        output=output,
        device=device,
        batch_size=batch_size,
        overwrite=overwrite,
        echo=typer.echo,
    )
