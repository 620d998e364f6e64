"""`rats-video export`: what others look at, and what other programs load."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from rats_video.cli.launch import distributed
from rats_video.cli.options import (
    BaseOption,
    DeviceOption,
    NfeOption,
    NumVideosOption,
    OverwriteOption,
    PromptOption,
    PromptsOption,
    RunArgument,
    SeedOption,
    check_exclusive,
)
from rats_video.errors import UserError

PrivateOption = Annotated[bool, typer.Option("--private", help="Make it a repository that only you see.")]

app = typer.Typer(help="Export videos, or the model, of a finished run.")


@app.callback()
def export() -> None:
    """Export videos, or the model, of a finished run."""


@app.command(epilog="Example: `rats-video export comparison runs/demo --nfe 4`")
@distributed
def comparison(
    run: RunArgument,
    *,
    base: BaseOption = None,
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
    from rats_video.commands.export_comparison import run_export_comparison

    lines = run_export_comparison(
        run=run,
        base=base,
        nfe=nfe,
        prompts=prompt or [],
        prompts_file=prompts,
        num_videos=num_videos,
        seed=seed,
        output=output,
        device=device,
    )
    typer.echo("\n".join(lines))


@app.command(epilog="Example: `rats-video export model runs/demo --format diffusers`")
def model(
    run: Annotated[
        str,
        typer.Argument(metavar="RUN|STUDENT", help="Finished run, student folder, or USER/NAME on the hub."),
    ],
    *,
    kind: Annotated[
        Literal["diffusers", "lora", "comfyui", "merged", "int8", "fp8"],
        typer.Option(
            "--format",
            help="diffusers: a whole pipeline. lora: diffusers' keys. comfyui: original keys, and a workflow. "
            "merged: the denoiser alone. int8, fp8: a pipeline in 8-bit weights.",
        ),
    ],
    base: BaseOption = None,
    scale: Annotated[
        float,
        typer.Option("--scale", metavar="SCALE", min=0, max=2, help="How much of the student to take: 0 is its base."),
    ] = 1.0,
    nfe: Annotated[
        int | None,
        typer.Option(
            "--nfe",
            metavar="N",
            min=1,
            help="Network evaluations of the clips compared. [default: 4, or one trained for]",
        ),
    ] = None,
    num_clips: Annotated[
        int, typer.Option("--num-clips", metavar="N", min=1, help="Held-out clips that 8 bits are judged on.")
    ] = 8,
    verify: Annotated[
        bool, typer.Option("--verify/--no-verify", help="Compare the stock pipeline's clips with our sampler's.")
    ] = True,
    output: Annotated[
        Path | None, typer.Option("--output", metavar="DIR", help="Folder to write to. [default: RUN/export/FORMAT]")
    ] = None,
    overwrite: OverwriteOption = False,
    push_to_hub: Annotated[
        str | None,
        typer.Option("--push-to-hub", metavar="USER/NAME", help="Then upload it to this repository on the model hub."),
    ] = None,
    private: PrivateOption = False,
    device: DeviceOption = "auto",
) -> None:
    """Write the student in a form that other programs load, with a model card.

    What is written is loaded with the target's own code and sampled from the same noise as ours; where the clips
    differ, nothing is kept.
    """
    from rats_video.commands.export_model import ExportRequest, run_export_model

    order = ExportRequest(
        kind=kind, source=run, scale=scale, nfe=nfe, num_clips=num_clips, verify=verify, output=output,
        overwrite=overwrite, base=base,
    )  # fmt: skip
    if push_to_hub is None:
        if private:
            raise UserError("is of a repository on the hub", where="--private", fix="add --push-to-hub USER/NAME")
        typer.echo("\n".join(run_export_model(order, device)))
        return
    from rats_video.commands.push import export_and_push

    export_and_push(order, device, push_to_hub, private=private, echo=typer.echo)


@app.command(epilog="Example: `rats-video export push runs/demo/export/lora somebody/my-student`")
def push(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder that `export model` wrote.")],
    repository: Annotated[str, typer.Argument(metavar="USER/NAME", help="Repository on the model hub.")],
    *,
    private: PrivateOption = False,
) -> None:
    """Upload an export to the model hub, its model card with it.

    The token is that of `hf auth login`, or HF_TOKEN. The same command again replaces what an earlier one uploaded.
    """
    from rats_video.commands.push import run_push

    typer.echo("\n".join(run_push(folder, repository, private=private)))
