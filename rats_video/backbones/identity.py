"""The parts of a model that prepared clips depend on: its VAE, and its text encoders."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from rats_video.errors import AsUserError
from rats_video.files import weights_digest
from rats_video.reading import read_json

_WEIGHTS = {".safetensors", ".model", ".txt"}
_SMALL = ("config.json", "tokenizer.json", "vocab.json")
_REMARKS = ("_", "transformers_version", "dtype", "torch_dtype")  # what a config's keys begin with that compute nothing


def vae_digest(folder: Path) -> str:
    """SHA-256 of the VAE's weights and configuration in a pipeline folder; the same if diffusers saves it again.

    Raises:
        UserError: its configuration cannot be read.
    """
    return _digest([folder / "vae"])


def text_digest(folder: Path) -> str:
    """SHA-256 of the weights, configurations and vocabularies of the text encoders and tokenizers.

    Raises:
        UserError: a configuration cannot be read.
    """
    return _digest(
        sorted(path for name in ("text_encoder*", "tokenizer*") for path in folder.glob(name) if path.is_dir())
    )


def _digest(parts: list[Path]) -> str:
    digest = hashlib.sha256(weights_digest(parts, _WEIGHTS).encode())
    for path in (path for part in parts for name in _SMALL for path in part.glob(name)):
        with AsUserError("cannot read it", where=str(path)):
            content = {key: value for key, value in read_json(path).items() if not key.startswith(_REMARKS)}
        digest.update(json.dumps(content, sort_keys=True).encode())
    return digest.hexdigest()
