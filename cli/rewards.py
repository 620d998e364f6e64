"""`rats-video rewards`: what can judge clips, and whether it is sound."""

from pathlib import Path
from typing import Annotated

import typer

from rats_video.cli.options import ConfigOption, DeviceOption, SetOption

app = typer.Typer(help="The rewards there are: list them, check that one is sound, convert weights.")


@app.command("list", epilog="Example: `rats-video rewards list --config wan21_1b`")
def list_rewards(
    *,
    config: Annotated[
        str | None,
        typer.Option(
            "--config",
            metavar="NAME|FILE",
            help="Look for the weights where this config says. [default: in each one's usual folder]",
        ),
    ] = None,
) -> None:
    """List every reward: what it scores, per frame or clip, with gradient or not, and whether its weights are here."""
    from rats_video.commands.rewards import run_list_rewards

    typer.echo("\n".join(run_list_rewards(config=config)))


@app.command(epilog="Example: `rats-video rewards check heldout_reward --config tiny`")
def check(
    name: Annotated[
        str, typer.Argument(metavar="NAME", help="`reward` or `heldout_reward` of the config, or a kind of the list.")
    ],
    *,
    config: ConfigOption = "tiny",
    overrides: SetOption = None,
    device: DeviceOption = "auto",
) -> None:
    """Test a reward on its real weights: two clips of the config's size, together and alone, and their gradient.

    A run does the same before it starts.
    """
    from rats_video.commands.rewards import run_check_reward

    lines = run_check_reward(name=name, config=config, overrides=overrides or [], device=device)
    typer.echo("\n".join(lines))


@app.command(epilog="Example: `rats-video rewards convert HPS_v2.1_compressed.pt models/HPSv2.1`")
def convert(
    source: Annotated[Path, typer.Argument(metavar="SOURCE", help="A checkpoint as torch.save writes it.")],
    output: Annotated[Path, typer.Argument(metavar="OUTPUT", help="Folder for its model.safetensors.")],
) -> None:
    """Turn a pickled checkpoint, read without running any code in it, into safetensors, which all rewards load."""
    from rats_video.rewards.convert import convert_checkpoint

    typer.echo(f"weights: {convert_checkpoint(source, output)}")
