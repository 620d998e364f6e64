"""`rats-video evaluate`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer

from rats_video.cli.launch import distributed
from rats_video.cli.options import BaseOption, DeviceOption, RunArgument, SeedOption, parse_nfe_list
from rats_video.errors import UserError

EXAMPLE = "Example: `rats-video evaluate runs/demo --nfe 3,4,8 --num-clips 32`"

NumClipsOption = Annotated[
    int | None,
    typer.Option("--num-clips", metavar="N", min=1, help="Clips to score at each NFE. [default: the run's config]"),
]


@distributed
def evaluate(
    run: RunArgument,
    *,
    base: BaseOption = None,
    nfe: Annotated[
        str | None,
        typer.Option(
            "--nfe", metavar="N,N,...", help="Network evaluations a clip to measure at. [default: the run's config]"
        ),
    ] = None,
    num_clips: NumClipsOption = None,
    seed: SeedOption = 0,
    output: Annotated[
        Path | None, typer.Option("--output", metavar="DIR", help="Folder to write to. [default: RUN/evaluation]")
    ] = None,
    vbench_layout: Annotated[
        Path | None,
        typer.Option(
            "--vbench-layout",
            metavar="DIR",
            help="Instead, write the student's clips of --prompts where VBench's official scorer finds them.",
        ),
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            "--prompts",
            metavar="FILE|DIR",
            help="VBench's VBench_full_info.json or prompts_per_dimension, or any list of prompts.",
        ),
    ] = None,
    dimensions: Annotated[
        str | None,
        typer.Option("--dimensions", metavar="A,B,...", help="Only VBench's prompts that test these. [default: all]"),
    ] = None,
    teacher: Annotated[
        bool, typer.Option("--teacher", help="Write the teacher's clips for VBench too, from the same noise.")
    ] = False,
    device: DeviceOption = "auto",
) -> None:
    """Measure student and teacher over a range of NFE.

    Writes the scores as JSON, a plot and a report; or, for VBench, clips under the names that it expects.
    """
    counts = None if nfe is None else parse_nfe_list(nfe)
    if vbench_layout is not None:
        _check_vbench(prompts, counts, {"--num-clips": num_clips, "--output": output})
        from rats_video.commands.vbench import run_vbench

        lines = run_vbench(
            run=run, base=base, prompts=prompts or Path(), dimensions=_names(dimensions),
            nfe=counts[0] if counts else None, with_teacher=teacher, seed=seed, output=vbench_layout, device=device,
        )  # fmt: skip
        typer.echo("\n".join(lines))
        return
    for option, given in {"--prompts": prompts, "--dimensions": dimensions, "--teacher": teacher}.items():
        if given:
            raise UserError("is only for clips that VBench scores", where=option, fix="add --vbench-layout DIR")
    from rats_video.commands.evaluate import run_evaluate

    lines = run_evaluate(run=run, base=base, nfe=counts, num_clips=num_clips, seed=seed, output=output, device=device)
    typer.echo("\n".join(lines))


def _check_vbench(prompts: Path | None, counts: tuple[int, ...] | None, unused: Mapping[str, object]) -> None:
    if prompts is None:
        raise UserError("needs prompts", where="--vbench-layout", fix="add --prompts VBench_full_info.json")
    if counts is not None and len(counts) > 1:
        raise UserError("VBench scores one folder of clips at a time", where="--nfe", fix="give one number")
    for option, given in unused.items():
        if given is not None:
            raise UserError("does not go with --vbench-layout", where=option, fix="leave it out")


def _names(text: str | None) -> tuple[str, ...]:
    return tuple(filter(None, (part.strip() for part in (text or "").split(","))))
