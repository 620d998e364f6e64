"""`rats-video sample`."""

from pathlib import Path
from typing import Annotated

import typer

from rats_video.cli.launch import distributed
from rats_video.cli.options import (
    BaseOption,
    DeviceOption,
    NumVideosOption,
    OutputOption,
    OverwriteOption,
    PromptOption,
    SeedOption,
    check_exclusive,
)

EXAMPLE = 'Example: `rats-video sample --nfe 4 --prompt "a fast red circle moving left on a gray background"`'


ModelOption = Annotated[
    Path | None,
    typer.Option(
        "--model",
        metavar="RUN|DIR|USER/NAME",
        help="A run, student or pipeline. [default: the tiny student]",
    ),
]
CallsOption = Annotated[
    int | None,
    typer.Option(
        "--nfe", metavar="N", min=1, help="Network evaluations a clip. [default: 4; a plain pipeline: its own number]"
    ),
]
FramesOption = Annotated[
    int | None, typer.Option("--num-frames", metavar="N", min=1, help="Frames of a clip. [default: as it was trained]")
]
HeightOption = Annotated[
    int | None, typer.Option("--height", metavar="N", min=1, help="Height in pixels. [default: as it was trained]")
]
WidthOption = Annotated[
    int | None, typer.Option("--width", metavar="N", min=1, help="Width in pixels. [default: as it was trained]")
]
LoraOption = Annotated[
    list[str] | None,
    typer.Option("--lora", metavar="FILE[:SCALE]", help="A LoRA beside the student, such as a style. Repeatable."),
]
NegativeOption = Annotated[
    str, typer.Option("--negative-prompt", metavar="TEXT", help="What guidance leads away from, where a model has it.")
]
GuidanceOption = Annotated[
    float | None,
    typer.Option(
        "--guidance-scale",
        metavar="SCALE",
        min=1,
        help="Strength of guidance, where a model has it. [default: its own]",
    ),
]
Guidance2Option = Annotated[
    float | None,
    typer.Option(
        "--guidance-scale-2",
        metavar="SCALE",
        min=1,
        help="Strength in its second expert (Wan 2.2 A14B). [default: the same]",
    ),
]
ListOption = Annotated[
    Path | None,
    typer.Option(
        "--prompts",
        metavar="FILE|-",
        help="One prompt a line; a table (.csv, .tsv, .json, .jsonl) of prompt, seed, nfe, id, image; or - for a pipe.",
    ),
]
ImageOption = Annotated[
    Path | None,
    typer.Option("--image", metavar="FILE", help="Picture that each video starts from: scaled to cover it, then cut."),
]
LastImageOption = Annotated[
    Path | None, typer.Option("--last-image", metavar="FILE", help="Picture that each video ends at.")
]
BatchOption = Annotated[int, typer.Option("--batch-size", metavar="N", min=1, help="Videos made together.")]
OffloadOption = Annotated[
    bool, typer.Option("--offload", help="Keep the weights in host memory, a layer at a time on the GPU: slower.")
]
TiledOption = Annotated[bool, typer.Option("--tiled", help="Decode in tiles: less memory, seams that are blended.")]


@distributed
def sample(
    *,
    model: ModelOption = None,
    base: BaseOption = None,
    nfe: CallsOption = None,
    num_frames: FramesOption = None,
    height: HeightOption = None,
    width: WidthOption = None,
    lora: LoraOption = None,
    prompt: PromptOption = None,
    prompts: ListOption = None,
    image: ImageOption = None,
    last_image: LastImageOption = None,
    negative_prompt: NegativeOption = "",
    guidance_scale: GuidanceOption = None,
    guidance_scale_2: Guidance2Option = None,
    num_videos: NumVideosOption = None,
    seed: SeedOption = 0,
    batch_size: BatchOption = 16,
    output: OutputOption = Path("samples"),
    overwrite: OverwriteOption = False,
    offload: OffloadOption = False,
    tiled: TiledOption = False,
    device: DeviceOption = "auto",
) -> None:
    """Make videos from prompts with a distilled student, or a pipeline that nobody distilled.

    Writes one MP4 a video as soon as it is ready, and a manifest. Without prompts it uses the model's own examples.
    The same command again makes what is missing.
    """
    check_exclusive(("--prompt", prompt), ("--prompts", prompts))
    from rats_video.commands.sample import run_sample

    size = {"num_frames": num_frames, "height": height, "width": width}
    run_sample(
        model=model,
        base=base,
        size={key: value for key, value in size.items() if value is not None},
        loras=lora or [],
        offload=offload,
        tiled=tiled,
        nfe=nfe,
        prompts=prompt or [],
        prompts_file=prompts,
        image=image,
        last_image=last_image,
        negative_prompt=negative_prompt,
        guidance_scale=guidance_scale,
        guidance_scale_2=guidance_scale_2,
        num_videos=num_videos,
        seed=seed,
        output=output,
        device=device,
        batch_size=batch_size,
        overwrite=overwrite,
        echo=typer.echo,
    )
