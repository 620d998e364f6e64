"""The target's own code: a stock diffusers pipeline, opened afresh and called as the model card says."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rats_video.assets import INDEX
from rats_video.backbones.words import loses_spaces
from rats_video.errors import UserError
from rats_video.export.base import Clips, ExportedStudent
from rats_video.reading import read_json
from rats_video.seeds import seeded

TOKENIZER = "PreTrainedTokenizerFast"  # of transformers: reads any tokenizer.json as it stands


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep what diffusers, transformers and torchao log and warn of to themselves."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def open_pipeline(folder: Path, device: torch.device, dtype: torch.dtype, **parts: Any) -> Any:
    """The pipeline in a folder, its VAE in float32 as in training, with `parts` in the place of its own.

    Its tokenizers read prompts as the student's do, whatever class its index names.
    """
    from diffusers.utils.logging import disable_progress_bar

    disable_progress_bar()
    # Not DiffusionPipeline, which takes no notice of a transformer given to it where Wan's signature has it optional.
    pipeline = class_in(folder / INDEX).from_pretrained(
        folder, dtype={"default": dtype, "vae": torch.float32}, local_files_only=True,
        **misread_tokenizers(folder), **parts,
    )  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(device)


def misread_tokenizers(folder: Path) -> dict[str, Any]:
    """A pipeline's tokenizers that the class in its index misreads, by name, read by `TOKENIZER`, which is right.

    HunyuanVideo's is byte-level, and its index says `LlamaTokenizerFast`, which drops every space of the prompt.
    """
    import transformers

    found = {}
    for name, entry in read_json(folder / INDEX).items():
        if name.startswith("tokenizer") and (folder / name / "tokenizer.json").is_file():
            as_listed = getattr(transformers, entry[1]).from_pretrained(folder / name, local_files_only=True)
            if loses_spaces(as_listed):
                found[name] = getattr(transformers, TOKENIZER).from_pretrained(folder / name, local_files_only=True)
    return found


@torch.no_grad()
def sample_stock(pipeline: Any, exported: ExportedStudent) -> Clips:
    """Clips, made one at a time, from the student's prompts and noise."""
    videos: list[Tensor] = []
    kept: list[Tensor] = []
    stock = exported.stock

    def keep(_pipeline: Any, _step: int, _timestep: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        kept[-1:] = [tensors["latents"].float().cpu()]
        return {}

    for noise, prompt in zip(exported.noises, exported.prompts, strict=True):
        with torch.random.fork_rng([noise.device] if noise.is_cuda else []):
            torch.manual_seed(stock.seed)
            latents, generator = stock.latents(noise.to(pipeline.device)), seeded(stock.seed)
            with _drawing(pipeline, latents, generator) if stock.draws_noise else contextlib.nullcontext():
                kept.append(latents)
                made = pipeline(
                    prompt=prompt, latents=latents, generator=[generator], output_type="pt", callback_on_step_end=keep,
                    **exported.asked_size, **stock.call,
                )  # fmt: skip
            clip: Tensor = made.frames if exported.makes == "video" else made.images[:, None]
        videos.append(clip.float().cpu())
    return Clips(torch.cat(videos), torch.cat(kept))


@contextlib.contextmanager
def _drawing(pipeline: Any, latents: Tensor, generator: torch.Generator) -> Iterator[None]:
    """Within it, a pipeline that draws its own noise has drawn ours, and the generator is as fresh as before."""
    own, fresh = pipeline.prepare_latents, generator.get_state()

    def prepare(*args: Any, **options: Any) -> Any:
        _, *rest = own(*args, **options)
        generator.set_state(fresh)
        return latents, *rest

    pipeline.prepare_latents = prepare
    try:
        yield
    finally:
        del pipeline.prepare_latents


def class_in(config: Path) -> Any:
    """The diffusers class that a JSON file of diffusers names."""
    import diffusers

    name = read_json(config)["_class_name"]
    if (found := getattr(diffusers, name, None)) is None:
        raise UserError(f"diffusers has no {name}", where=str(config), fix="export what diffusers itself can load")
    return found
