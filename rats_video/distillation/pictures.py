"""The pictures that a run's clips start from."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from rats_video.backbones.base import PipelineBackbone
from rats_video.datasets.prepared.cache import ClipCache
from rats_video.datasets.prompts.settings import FilePromptsConfig, PreparedPromptsConfig, ShapesPromptsConfig
from rats_video.datasets.prompts.split import load_prompts
from rats_video.datasets.shapes.render import parse_prompt, render
from rats_video.datasets.video.pictures import fit_picture, read_picture
from rats_video.distillation.settings import DistillConfig
from rats_video.errors import UserError
from rats_video.seeds import seeded
from rats_video.types import ClipSpec, FirstFrames

T = TypeVar("T")
WHERE = "prompts.first_frame"
_KEPT = 256  # fitted pictures: a run sees each again and again
Draw = Callable[[str, int], tuple[Tensor, Tensor | None]]
"""`(prompt, seed) -> first and last picture`, each `[3, height, width]` in [0, 1]."""


def check_family(cfg: DistillConfig, family: type[PipelineBackbone]) -> None:
    """Refuse a family whose videos always start from a picture where the run has none; raises UserError."""
    if family.needs_picture and not cfg.prompts.first_frame:
        raise UserError(
            f"is a {family.pipelines[0]}, whose videos start from pictures, and this run's do not", where="model",
            fix=f"set {WHERE}=true, with a list that names pictures, or give a text-to-video model",
        )  # fmt: skip


def give_pictures(cfg: DistillConfig, *models: PipelineBackbone) -> None:
    """Let models draw the run's pictures, where its clips start from any; raises UserError as `first_frames`."""
    for model in {id(model): model for model in models}.values():
        model.first_frames = first_frames(cfg, model)


def first_frames(cfg: DistillConfig, backbone: PipelineBackbone) -> FirstFrames | None:
    """Where the run's pictures come from; None if its clips are made from text alone.

    Raises:
        UserError: the model takes no picture, or not what the prompts have.
    """
    if not cfg.prompts.first_frame:
        return None
    if backbone.pictures == "none":
        raise UserError(
            f"this {backbone.family} makes {backbone.makes}s from text alone", where=WHERE, fix="set it to false"
        )
    clip = cfg.clip.spec
    match cfg.prompts:
        case ShapesPromptsConfig():
            draw: Draw = partial(_rendered, clip)
        case FilePromptsConfig():
            draw = _of_list(cfg.prompts, clip, backbone)
        case PreparedPromptsConfig(path=path):
            draw = _of_cache(Path(path), clip)

    def pictures(prompts: Sequence[str], seeds: Sequence[int]) -> tuple[Tensor, Tensor | None]:
        found = [draw(prompt, seed) for prompt, seed in zip(prompts, seeds, strict=True)]
        first, last = torch.stack([first for first, _ in found]), [last for _, last in found if last is not None]
        return first.to(backbone.device), torch.stack(last).to(backbone.device) if last else None

    return pictures


def _rendered(clip: ClipSpec, prompt: str, seed: int) -> tuple[Tensor, None]:
    """The first frame of a clip that shows the prompt and stays in view, another one a seed."""
    return render([parse_prompt(prompt)], clip, seeded(seed))[0, 0], None


def _of_list(cfg: FilePromptsConfig, clip: ClipSpec, backbone: PipelineBackbone) -> Draw:
    """One of the prompt's rows, by the seed."""
    rows = defaultdict(list)
    for row in load_prompts(cfg).pictures:
        if row.last is not None and not backbone.takes_last_picture:
            what = f"this {backbone.family} takes a first picture alone, and the list has a last_image"
            raise UserError(what, where="prompts", fix="leave the column out")
        rows[row.prompt].append(row)
    fitted = lru_cache(_KEPT)(partial(read_picture, clip=clip))

    def draw(prompt: str, seed: int) -> tuple[Tensor, Tensor | None]:
        row = _choose(rows, prompt, seed)
        last = None if row.last is None else fitted(row.last, where=str(row.last))
        return fitted(row.first, where=str(row.first)), last

    return draw


def _of_cache(folder: Path, clip: ClipSpec) -> Draw:
    """The first frame of one of the clips with this caption, by the seed."""
    cache, records = ClipCache(folder), defaultdict(list)
    for record in cache.records:
        if record.num_frames:
            records[record.caption].append(record)
    cache.first_frames(cache.records[:1])  # raises where there are none

    def draw(prompt: str, seed: int) -> tuple[Tensor, None]:
        [frame] = cache.first_frames([_choose(records, prompt, seed)])
        return fit_picture(frame.movedim(0, -1).numpy(), clip), None

    return draw


def _choose(found: dict[str, list[T]], prompt: str, seed: int) -> T:
    """One of what belongs to a prompt; raises UserError for a prompt that is none of the run's."""
    if prompt not in found:
        what = f"{prompt!r} is none of the run's prompts, so no picture belongs to it"
        raise UserError(what, where="--prompt", fix="give a list of prompts with a column `image`")
    return found[prompt][seed % len(found[prompt])]
