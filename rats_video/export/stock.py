"""The target's own code: a stock diffusers pipeline, opened afresh and called as the model card says."""

from __future__ import annotations

import contextlib
import itertools
import logging
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rats_video.backbones.folder import DECODERS
from rats_video.backbones.words import loses_spaces
from rats_video.errors import UserError
from rats_video.export.base import Clips, ExportedStudent
from rats_video.hub import INDEX
from rats_video.reading import read_json
from rats_video.seeds import seeded
from rats_video.sound import Sound
from rats_video.types import FreshNoise

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


def open_base(exported: ExportedStudent, device: torch.device, **parts: Any) -> Any:
    """The base's folder as the stock pipeline that samples the student, with `parts` in the place of its own."""
    kind = None if exported.pictures is None else exported.pipeline
    return open_pipeline(exported.base, device, exported.dtype, kind, **parts)


def open_pipeline(folder: Path, device: torch.device, dtype: torch.dtype, kind: str | None = None, **parts: Any) -> Any:
    """The pipeline in a folder, its VAE in float32 as in training, with `parts` in the place of its own.

    `kind` is its class; None takes that of the folder's index.
    Its tokenizers read prompts as the student's do, whatever class its index names.
    """
    from diffusers.utils.logging import disable_progress_bar

    disable_progress_bar()
    # Not DiffusionPipeline, which takes no notice of a transformer given to it where Wan's signature has it optional.
    pipeline = (class_in(folder / INDEX) if kind is None else _class(kind, folder)).from_pretrained(
        folder, dtype={"default": dtype, **dict.fromkeys(DECODERS, torch.float32)}, local_files_only=True,
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
    sounds: list[Sound] = []
    kept: list[Tensor] = []
    stock = exported.stock

    def keep(_pipeline: Any, _step: int, _timestep: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        kept[-1:] = [tensors["latents"].float().cpu()]
        return {}

    for index, (noise, prompt) in enumerate(zip(exported.noises, exported.prompts, strict=True)):
        pictures = {} if exported.pictures is None else exported.pictures.call(index)
        with torch.random.fork_rng([noise.device] if noise.is_cuda else []):
            torch.manual_seed(stock.seed)
            latents, generator = stock.latents(noise.to(pipeline.device)), seeded(stock.seed)
            drawing = _drawing(pipeline, latents, generator) if stock.draws_noise else contextlib.nullcontext()
            fresh = (
                _renoising(exported.fresh[index], stock.seen or stock.latents)
                if exported.fresh
                else contextlib.nullcontext()
            )
            with drawing, fresh, _by_the_mean(pipeline):
                kept.append(latents)
                made = pipeline(
                    prompt=prompt, latents=latents, generator=[generator], output_type="pt", callback_on_step_end=keep,
                    **exported.asked_size, **stock.call, **pictures, **stock.beside(noise.to(pipeline.device)),
                )  # fmt: skip
            if exported.has_sound:
                sounds.append(Sound(made.audio.float().cpu(), int(pipeline.vocoder.config.output_sampling_rate)))
            clip: Tensor = made.frames if exported.makes == "video" else made.images[:, None]
        videos.append(clip.float().cpu())
    latents = torch.cat(kept)
    return Clips(torch.cat(videos), latents if exported.free is None else latents * exported.free, tuple(sounds))


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


@contextlib.contextmanager
def _renoising(fresh: FreshNoise, lay_out: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Within it, diffusers' re-noising scheduler draws our noise: pipelines hand it no generator."""
    from diffusers.schedulers import scheduling_flow_match_lcm as lcm

    own, steps = lcm.randn_tensor, itertools.count()

    def draw(shape: Any, device: torch.device, dtype: torch.dtype, **_: Any) -> Tensor:
        return lay_out(fresh(next(steps))).to(device, dtype).reshape(shape)

    lcm.randn_tensor = draw
    try:
        yield
    finally:
        lcm.randn_tensor = own


@contextlib.contextmanager
def _by_the_mean(pipeline: Any) -> Iterator[None]:
    """Within it, pictures are encoded as in training, to the posterior's mean, of which some pipelines draw one."""
    encode = pipeline.vae.encode

    def encode_to_mean(*args: Any, **options: Any) -> Any:
        found = encode(*args, **options)
        found.latent_dist.sample = lambda *_, **__: found.latent_dist.mode()
        return found

    pipeline.vae.encode = encode_to_mean
    try:
        yield
    finally:
        del pipeline.vae.encode


def class_in(config: Path) -> Any:
    """The diffusers class that a JSON file of diffusers names."""
    return _class(read_json(config)["_class_name"], config)


def _class(name: str, config: Path) -> Any:
    import diffusers

    if (found := getattr(diffusers, name, None)) is None:
        raise UserError(f"diffusers has no {name}", where=str(config), fix="export what diffusers itself can load")
    return found
