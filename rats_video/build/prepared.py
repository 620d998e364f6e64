"""Prepared clips, and the model that is to work on them."""

from __future__ import annotations

from pathlib import Path

from rats_video.backbones.identity import text_digest, vae_digest
from rats_video.datasets.cache import ClipCache
from rats_video.errors import UserError

DIGESTS = {"VAE": vae_digest, "text encoder": text_digest}


def check_cache(cache: ClipCache, folder: Path, *parts: str) -> None:
    """Refuse a cache that was made with other parts than a pipeline folder's: its numbers mean nothing to them.

    Args:
        cache: the clips.
        folder: of the pipeline.
        parts: of `DIGESTS`; all of them where none is named.

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
