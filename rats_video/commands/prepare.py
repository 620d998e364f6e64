"""`prepare`: turns a folder of videos into a cache of latents and text, in one go or in several."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from rats_video.assets import resolve_folder
from rats_video.backbones.base import PipelineBackbone
from rats_video.backbones.identity import text_digest, vae_digest
from rats_video.backbones.kinds import find_family, load_backbone
from rats_video.commands.device import explain_memory, start_runtime
from rats_video.commands.folders import check_free, claim_folder, clean_interrupt, locked_output
from rats_video.commands.prepare_sources import read_sources
from rats_video.config.load import load_config
from rats_video.datasets.prepared.cache import CONTACT, EMPTY, FORMAT, MANIFEST, CacheManifest, Skipped
from rats_video.datasets.video.records import SourceVideo
from rats_video.datasets.video.settings import PrepareConfig
from rats_video.datasets.video.sources import find_sources
from rats_video.errors import UserError, warn
from rats_video.files import tidy
from rats_video.preparation.encode import UnitEncoder, encode_units, save_empty_prompt
from rats_video.preparation.index import build_index, check_same, summary, write_index
from rats_video.preparation.units import (
    Fingerprint,
    SourceBatch,
    claim_units,
    fingerprint,
    latest,
    plan_units,
    prune,
    read_units,
)
from rats_video.progress import ProgressBar
from rats_video.runtime import Runtime
from rats_video.types import ClipSpec

HARMLESS = {"model", "workers", "timeout_seconds", "batch_size", "shard_clips", "num_shapes"}
"""Settings that may differ from one run to the next: they change no clip (`batch_size` only by rounding)."""
SOURCE = "source"  # among the manifest's settings


def run_prepare(
    *, source: str, config: str, output: Path, device: str, overrides: Sequence[str], overwrite: bool
) -> list[str]:
    """Prepare the sources that OUTPUT does not hold yet, on all processes; returns the lines to show.

    Stopped at any moment and called again, it does the rest, and where there is no rest, nothing.

    Raises:
        UserError: a mistake in what was given; OUTPUT holds clips made otherwise; or nothing was kept.
    """
    cfg = load_config(PrepareConfig, config, group="prepare", overrides=overrides)
    folder = resolve_folder(cfg.model, where="model")
    check_apart(source, output)
    runtime = start_runtime(device)
    with locked_output(output, runtime), clean_interrupt(output):
        job = PrepareJob.begin(source, cfg, folder, output, overwrite=overwrite) if runtime.is_main else None
        units = runtime.broadcast(None if job is None else job.units)
        if units is not None:
            with explain_memory(lambda: f"set batch_size below {cfg.batch_size}, or compute_dtype to bfloat16"):
                encode(units, cfg, folder, output, runtime)
        runtime.barrier()
        lines = [] if job is None else job.finish()
    runtime.close()
    return lines


@dataclass(frozen=True)
class PrepareJob:
    """The main process's view of a preparation.

    Args:
        output: the cache.
        manifest: the properties that all clips share.
        sources: all present ones, in order.
        unfit: files that are no sources.
        units: the rest to do; None if no model is needed.
    """

    output: Path
    manifest: CacheManifest
    sources: Mapping[Fingerprint, SourceVideo]
    unfit: tuple[Skipped, ...]
    units: tuple[SourceBatch, ...] | None

    @classmethod
    def begin(cls, source: str, cfg: PrepareConfig, folder: Path, output: Path, *, overwrite: bool) -> PrepareJob:
        """Find the sources, and claim the folder.

        Raises:
            UserError: there is nothing to prepare, or the folder holds something else.
        """
        tidy(output)
        found = find_sources(source, cfg)
        sources = {fingerprint(each): each for each in found.videos}
        manifest = describe_cache(source, cfg, folder)
        if overwrite:
            claim_folder(output, overwrite=True)
        if not (output / MANIFEST).is_file():
            check_free(output, overwrite=False)
            manifest.save(output)
        done = read_units(output)
        if not done and not (output / EMPTY).is_file():  # nothing was made: any settings will do
            manifest.save(output)
        before = CacheManifest.load(output)
        if any(entry.source in sources for entries in done.values() for entry in entries):  # it was moved at most
            manifest = replace(manifest, settings=manifest.settings | {SOURCE: before.settings.get(SOURCE)})
        check_same(before, manifest, output)
        units = plan_units(sources, done, cfg.timeout_seconds)
        needs_prompt = bool(sources) and not (output / EMPTY).is_file()
        return cls(output, manifest, sources, found.skipped, units if units or needs_prompt else None)

    def finish(self) -> list[str]:
        """Write the index of all units, and delete the units of sources that changed or are gone.

        Raises:
            UserError: nothing was kept.
        """
        done = read_units(self.output)
        kept = latest(done, self.sources)
        index = build_index(kept, self.unfit)
        is_new = write_index(self.output, self.manifest, index)
        gone = sum(map(len, done.values())) - len(kept)
        prune(self.output, done, kept)
        if not index.clips:
            reasons = ", ".join(f"{len(found)} x {reason}" for reason, found in index.reasons.items())
            first = next(iter(index.reasons.values()))[0]
            why = f"; {first.name}: {first.detail}" if first.detail else ""
            raise UserError(f"nothing was kept: {reasons}{why}", where=str(self.output), fix=f"look at {CONTACT} there")
        option = "" if any(record.split == "heldout" for record in index.records) else " --set heldout=0"
        return [
            *summary(index, self.manifest.settings["heldout"]),
            *([f"  deleted what was made of {gone} sources that changed or are gone"] if gone else []),
            *([] if is_new else [f"nothing to do: {self.output} holds all of it"]),
            f"Look at {self.output / CONTACT}. Next: rats-video train teacher --data {self.output}{option}",
        ]


def encode(units: Sequence[SourceBatch], cfg: PrepareConfig, folder: Path, output: Path, runtime: Runtime) -> None:
    """Prepare the units that no other process has claimed."""
    dtype: torch.dtype = getattr(torch, cfg.compute_dtype)
    backbone = load_backbone(folder, runtime.device, dtype, with_denoiser=False)
    nn.Module.to(backbone.vae, dtype)  # diffusers' own `to` warns
    check_buckets(cfg, backbone)
    with_images = takes_images(cfg, backbone)
    if runtime.is_main:
        warn_of_captions([source.caption for unit in units for _, source in unit.sources if source.caption], backbone)
        save_empty_prompt(output, backbone, getattr(torch, cfg.dtype))
    began, clips = time.monotonic(), 0

    def advance(sources: int, count: int) -> None:
        nonlocal clips
        clips += count
        progress.advance(sources, **{"clips/s": clips / (time.monotonic() - began)})

    def mine() -> Iterator[SourceBatch]:
        for unit, is_mine in claim_units(output, units):
            if is_mine:
                yield unit
            else:  # another process does it
                progress.advance(len(unit.sources))

    with ProgressBar("prepare", sum(len(unit.sources) for unit in units)) as progress:
        encode_units(
            mine(),
            lambda sources: read_sources(sources, cfg, with_images=with_images),
            lambda unit: UnitEncoder(output, unit, cfg, backbone),
            advance,
        )


def describe_cache(source: str, cfg: PrepareConfig, folder: Path) -> CacheManifest:
    """The properties that all clips of this preparation share."""
    settings = {name: value for name, value in cfg.model_dump(mode="json").items() if name not in HARMLESS}
    settings[SOURCE] = str(Path(source).resolve()) if Path(source).exists() else source
    found = find_family(folder)
    if found.has_sound:
        what = f"makes clips with sound: {found.family}'s latents hold it as well, and videos are read without theirs"
        raise UserError(what, where="model", fix="it can be distilled without real clips; prepare for another model")
    family = found.family
    return CacheManifest(FORMAT, cfg.model, family, vae_digest(folder), text_digest(folder), settings, cfg.fps)


def check_apart(source: str, output: Path) -> None:
    """Raise UserError if the cache would lie in its source, or --overwrite would delete the source."""
    here, there = output.resolve(), Path(source).resolve()
    if not there.exists():
        return
    if here.is_relative_to(there):
        raise UserError(f"lies in {source}, what it is to be made of", where=str(output), fix="give another --output")
    if there.is_relative_to(here):
        raise UserError(f"{source} lies in it", where=str(output), fix="give another --output")


def check_buckets(cfg: PrepareConfig, backbone: PipelineBackbone) -> None:
    """Raise UserError for a size that the model cannot take."""
    for number, bucket in enumerate(cfg.buckets):
        try:
            backbone.latent_shape(ClipSpec(bucket.num_frames, bucket.height, bucket.width, cfg.fps))
        except UserError as error:
            raise UserError(
                error.what, where=error.where.replace("clip", f"buckets.{number}"), fix=error.fix
            ) from error


def takes_images(cfg: PrepareConfig, backbone: PipelineBackbone) -> bool:
    """True if the model takes clips of one frame."""
    size = cfg.of_images.buckets[0]
    try:
        backbone.latent_shape(ClipSpec(1, size.height, size.width, cfg.fps))
    except UserError:
        return False
    return True


def warn_of_captions(captions: Sequence[str], backbone: PipelineBackbone) -> None:
    """Warn of captions that the text encoder reads only in part."""
    distinct = dict.fromkeys(captions)
    if unknown := [(caption, words) for caption in distinct if (words := backbone.unknown_words(caption))]:
        caption, words = unknown[0]
        known = f"hold words this model does not know, as {words[0]!r} in {caption[:60]!r}"
        warn(f"{len(unknown)} of {len(distinct)} captions {known}")
    elif misread := [(caption, why) for caption in distinct if (why := backbone.truncation_note(caption))]:
        caption, why = misread[0]
        warn(f"{len(misread)} of {len(distinct)} captions are {why}, as {caption[:60]!r}")
