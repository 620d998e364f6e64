"""The animated grid at the top of the README: teacher, base model and student side by side, as one small file.

    python benchmarks/grid.py RUN [--nfe 4] [--seed 0] [--output docs/grid.webp]
    python benchmarks/grid.py RUN RUN --names "reward alone" RATS --output docs/motion.webp

Each row is a model, each column a held-out prompt, all from the same noise and, where the run's clips start from
pictures, the same picture. The prompts are the first of the split whose colours differ: nothing is chosen by its look.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from einops import rearrange
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from rats_video.commands.runs import load_run
from rats_video.commands.students import load_student
from rats_video.datasets.prompts.split import load_prompts
from rats_video.datasets.shapes.render import WORDS
from rats_video.distillation.pictures import give_pictures
from rats_video.inference.sampler import SamplerSpec, sample_videos

TILE = 112  # pixels a side
HEAD, FOOT = 22, 16
INK, PAPER = (30, 30, 30), (255, 255, 255)


def spread_prompts(prompts: Sequence[str], count: int) -> list[str]:
    """The first `count` prompts of colours that differ, their shapes in turn."""
    chosen: list[str] = []
    for prompt in prompts:
        words, used = set(prompt.split()), {word for other in chosen for word in other.split()}
        shape = WORDS["shape"][len(chosen) % len(WORDS["shape"])]
        if len(chosen) < count and shape in words and not words & used & set(WORDS["color"]):
            chosen.append(prompt)
    return chosen


def tiles(videos: Tensor) -> Tensor:
    """Clips `[B, T, 3, H, W]` in [0, 1] as bytes `[T, B, TILE, TILE, 3]`."""
    frames = torch.nn.functional.interpolate(videos.flatten(0, 1), size=(TILE, TILE), mode="bicubic").clamp(0, 1)
    return rearrange((frames * 255).round().byte(), "(b t) c h w -> t b h w c", b=len(videos))


def page(columns: dict[str, Tensor], prompts: Sequence[str], t: int) -> Image.Image:
    """One frame of the grid."""
    font = ImageFont.load_default(11)
    picture = Image.new("RGB", (len(prompts) * TILE, len(columns) * (TILE + HEAD) + FOOT), PAPER)
    draw = ImageDraw.Draw(picture)
    for row, (name, videos) in enumerate(columns.items()):
        top = row * (TILE + HEAD)
        draw.text((4, top + 5), name, INK, font)
        for column in range(len(prompts)):
            picture.paste(Image.fromarray(videos[t, column].numpy()), (column * TILE, top + HEAD))
    for column, prompt in enumerate(prompts):
        words = prompt.removeprefix("a ").replace(" moving", "").partition(" on a ")[0]
        draw.text((column * TILE + 4, picture.height - FOOT + 2), words, INK, ImageFont.load_default(9))
    return picture


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse, sample, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, nargs="+", help="the first one's prompts, teacher and base are shown")
    parser.add_argument("--names", nargs="+", default=["student"], help="of the students, one a run")
    parser.add_argument("--nfe", type=int, default=4)
    parser.add_argument("--count", type=int, default=6)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("docs/grid.webp"))
    options = parser.parse_args(arguments)
    students = [load_student(run, torch.device("cpu")) for run in options.run]
    loaded, (_, cfg) = students[0], load_run(options.run[0])
    prompts = spread_prompts(load_prompts(cfg.prompts).heldout, options.count)
    teacher = SamplerSpec(cfg.evaluation.teacher_steps, cfg.shift, cfg.evaluation.guidance_scale)
    arms = {
        f"teacher, {teacher.nfe} calls": (loaded.base, teacher),
        f"base model, {options.nfe} calls": (loaded.base, SamplerSpec(options.nfe, cfg.shift)),
    }
    for name, each in zip(options.names, students, strict=True):
        arms[f"{name}, {options.nfe} calls"] = (each.student, each.spec(options.nfe))
    give_pictures(cfg, *(model for model, _ in arms.values()))
    columns = {
        name: tiles(torch.cat([s.videos for s in sample_videos(model, prompts, loaded.clip, spec, seed=options.seed)]))
        for name, (model, spec) in arms.items()
    }
    frames = [page(columns, prompts, t) for t in range(len(next(iter(columns.values()))))]
    frames[0].save(
        options.output, save_all=True, append_images=frames[1:] + frames[-1:] * 4,
        duration=round(1000 / loaded.clip.fps), loop=0, quality=80,
    )  # fmt: skip
    print(f"{options.output}: {options.output.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
