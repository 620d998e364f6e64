"""`rats-video train`: the models that a distillation starts from."""

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from rats_video.cli.launch import distributed
from rats_video.cli.options import TrainFolderOption, check_exclusive, run_options, with_folder
from rats_video.errors import UserError

app = typer.Typer(help="Train what a distillation starts from: VAE, teacher, reward.")


@app.command(epilog="Example: `rats-video train vae --config tiny --output runs/vae`")
@run_options(TrainFolderOption)
def vae(*, options: dict[str, Any]) -> None:
    """Train a video VAE: the codec between pixels and latents."""
    from rats_video.commands.train import run_train_vae

    typer.echo("\n".join(run_train_vae(**with_folder(options, "vae-"))))


@app.command(epilog="Example: `rats-video train teacher --config tiny --output runs/teacher`")
@distributed
@run_options(TrainFolderOption)
def teacher(
    *,
    data: Annotated[
        Path | None,
        typer.Option("--data", metavar="CACHE", help="Fine-tune a model on clips that `rats-video prepare` wrote."),
    ] = None,
    options: dict[str, Any],
) -> None:
    """Train a many-step teacher: on rendered shapes from nothing, or with --data an existing model on your clips."""
    if data is not None:
        from rats_video.commands.finetune import run_finetune

        run_finetune(data=data, echo=typer.echo, **with_folder(options, "finetune-"))
        return
    if "WORLD_SIZE" in os.environ:
        raise UserError("on rendered shapes one process trains", where="--gpus", fix="leave it out, or give --data")
    from rats_video.commands.train import run_train_teacher

    typer.echo("\n".join(run_train_teacher(**with_folder(options, "teacher-"))))


@app.command(epilog="Example: `rats-video train paths --config tiny --output runs/tiny-paths`")
@run_options(TrainFolderOption)
def paths(*, options: dict[str, Any]) -> None:
    """Teach a Wan model to follow motion paths, on rendered shapes whose paths are known."""
    from rats_video.commands.train import run_train_paths

    typer.echo("\n".join(run_train_paths(**with_folder(options, "paths-"))))


@app.command(epilog="Example: `rats-video train reward --config tiny --output runs/reward`")
@run_options(TrainFolderOption)
def reward(
    *,
    latent: Annotated[
        bool, typer.Option("--latent", help="Train one that scores latents, taught by one that scores pixels.")
    ] = False,
    data: Annotated[
        Path | None, typer.Option("--data", metavar="CACHE", help="Learn from clips that `rats-video prepare` wrote.")
    ] = None,
    preferences: Annotated[
        Path | None,
        typer.Option(
            "--preferences",
            metavar="FILE",
            help="JSONL of preferred and rejected clips of CACHE. [default: clips and damaged copies of them]",
        ),
    ] = None,
    options: dict[str, Any],
) -> None:
    """Train a reward model that scores decoded clips, or with --latent their latents; with --data on clips of yours."""
    check_exclusive(("--latent", latent), ("--data", data))
    if preferences is not None and data is None:
        raise UserError("are of prepared clips", where="--preferences", fix="give these with --data CACHE")
    common = with_folder(options, "latent-reward-" if latent else "reward-")
    if data is not None:
        from rats_video.commands.train_preference import run_train_preference

        lines = run_train_preference(data=data, preferences=preferences, **common)
    else:
        from rats_video.commands.train_reward import run_train_latent_reward, run_train_reward

        lines = (run_train_latent_reward if latent else run_train_reward)(**common)
    typer.echo("\n".join(lines))
