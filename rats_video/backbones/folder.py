"""What a diffusers pipeline folder says of itself."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rats_video.errors import UserError


def read_index(folder: Path, accepted: Sequence[str]) -> dict[str, Any]:
    """`model_index.json`: the pipeline's `_class_name`, each part's class, and plain settings.

    Raises:
        UserError: the folder is no diffusers pipeline, or one of another family than `accepted`.
    """
    try:
        index = dict(json.loads((folder / "model_index.json").read_text()))
        name = str(index["_class_name"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            "not a diffusers pipeline: no readable model_index.json in it",
            where=str(folder), fix="give the folder that pipeline.save_pretrained or a hub download made",
        ) from error  # fmt: skip
    if name not in accepted:
        raise UserError(f"is a {name}", where=str(folder), fix=f"give one of: {', '.join(accepted)}")
    return index
