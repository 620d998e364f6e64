"""Real clips that a run trains on."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from rats_video.assets import resolve_folder
from rats_video.backbones.base import PipelineBackbone
from rats_video.backbones.identity import text_digest, vae_digest
from rats_video.condition import Condition
from rats_video.datasets.prepared.cache import ClipCache
from rats_video.datasets.prepared.loader import ClipLoader, ReadAhead
from rats_video.distillation.settings import DistillConfig
from rats_video.errors import UserError, warn
from rats_video.methods.real_data import RealData, RealDataConfig
from rats_video.runtime import Runtime

DIGESTS = {"VAE": vae_digest, "text encoder": text_digest}


def check_cache(cache: ClipCache, folder: Path, *parts: str) -> None:
    """Refuse a cache that was made with another VAE or text encoder than a pipeline's: its numbers mean nothing there.

    Args:
        cache: the clips.
        folder: of the pipeline.
        parts: of `DIGESTS`; default all.

    Raises:
        UserError: a part is another one.
    """
    made = cache.manifest
    theirs = {"VAE": made.vae, "text encoder": made.text}
    for part in parts or DIGESTS:
        if theirs[part] != DIGESTS[part](folder):
            raise UserError(
                f"was prepared with another {part} ({made.model}) than {folder} has", where=str(cache.folder),
                fix="prepare with this model, or set model to that one",
            )  # fmt: skip


WHERE = "method.real_data"


def with_data_digest(cfg: DistillConfig) -> DistillConfig:
    """The configuration with the digest of its real clips, by which `--resume` knows them again.

    Raises:
        UserError: there is no finished cache, or another one than the configuration was written with.
    """
    real = cfg.method.real_data
    if real is None:
        return cfg
    digest = ClipCache(Path(real.path)).digest
    if real.digest not in {None, digest}:
        raise UserError(
            "its clips are not those that this configuration was written with", where=real.path,
            fix=f"give the cache of that run, or set {WHERE}.digest=null",
        )  # fmt: skip
    changed = real.model_copy(update={"digest": digest})
    return cfg.model_copy(update={"method": cfg.method.model_copy(update={"real_data": changed})})


def build_real_data(cfg: DistillConfig, backbone: PipelineBackbone, runtime: Runtime) -> RealData | None:
    """The clips of the run's real-data term; None if it has none."""
    real = cfg.method.real_data
    return None if real is None or real.weight == 0 else open_real_data(cfg, real, backbone, runtime)


def open_real_data(cfg: DistillConfig, real: RealDataConfig, backbone: PipelineBackbone, runtime: Runtime) -> RealData:
    """Clips of a prepared cache.

    Raises:
        UserError: the cache is of another VAE, text encoder or frame rate, has no clips of the run's size, or its
            clips cannot be shared evenly.
    """
    cache, clip = ClipCache(Path(real.path)), cfg.clip.spec
    check_cache(cache, resolve_folder(cfg.model, where="model"))
    if cache.manifest.fps != clip.fps:
        raise UserError(
            f"its clips have {cache.manifest.fps:g} frames a second, the run's {clip.fps:g}", where=real.path,
            fix=f"set clip.fps={cache.manifest.fps:g}, or prepare them again",
        )  # fmt: skip
    batch_size, size = real.batch_size or cfg.training.batch_size, (clip.num_frames, clip.height, clip.width)
    rows = runtime.rows(batch_size, where=f"{WHERE}.batch_size")
    loader = ClipLoader(
        cache, batch_size=batch_size, seed=cfg.seed, rows=rows, size=size, prompt_dropout=real.prompt_dropout
    )
    others = sum(record.size != size for record in cache.of_split("train"))
    if others and runtime.is_main:
        warn(f"{others} clips of another size than the run's are left out", where=real.path)
    found, needed = tuple(loader.batch(0).latents.shape[1:]), backbone.latent_shape(clip)
    if found != needed:
        raise UserError(f"its latents are {found}, the model's {needed}", where=real.path, fix="prepare them again")
    ahead = ReadAhead(loader)

    def source(step: int) -> tuple[Tensor, Condition]:
        batch = ahead(step)
        if not cfg.prompts.first_frame:
            return batch.latents, batch.text
        first = torch.stack([frame.to(backbone.device) / 255 for frame in cache.first_frames(batch.records)])
        return batch.latents, batch.text.with_given(backbone.given_frames(clip, first))

    return RealData(source, real.weight, batch_size, rows, cfg.seed)
