"""Prompts encoded once, so that the text encoder need not stay in memory."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from rats_video.condition import Condition
from rats_video.errors import UserError
from rats_video.files import replacing

BATCH_SIZE = 16
LIBRARIES = ("ftfy", "tokenizers", "transformers")  # another version may make other tokens of a prompt


class TextCache:
    """Text conditions of one prompt each, in host memory or wherever `rows` finds them.

    Args:
        rows: `[1, L, D]` conditions by prompt; L may differ.
    """

    def __init__(self, rows: Mapping[str, Condition]) -> None:
        self._rows = rows

    @classmethod
    def encode(cls, encode_text: Callable[[Sequence[str]], Condition], prompts: Sequence[str]) -> TextCache:
        """Encode all prompts, those of about the same length together."""
        ordered = sorted(dict.fromkeys(prompts), key=len)
        rows: dict[str, Condition] = {}
        for start in range(0, len(ordered), BATCH_SIZE):
            batch = ordered[start : start + BATCH_SIZE]
            text = encode_text(batch).map(Tensor.cpu)
            for i, prompt in enumerate(batch):
                rows[prompt] = text.map(lambda part, i=i: part[i : i + 1].clone())  # type: ignore[misc]
        return cls(rows)

    def look_up(self, prompts: Sequence[str], device: torch.device) -> Condition:
        """The conditions of B prompts in one batch.

        Raises:
            UserError: a prompt was not encoded when the cache was made.
        """
        for prompt in prompts:
            if prompt not in self._rows:
                raise UserError(
                    f"was not encoded before the text encoder was freed: {prompt!r}", where="compute.cache_text",
                    fix="switch it off, or add it to the run's prompts",
                )  # fmt: skip
        return Condition.cat([self._rows[prompt] for prompt in prompts]).map(lambda part: part.to(device))

    def save(self, path: Path, identity: str) -> None:
        """Write to one file; `identity` says what the rows depend on besides the prompts."""
        tensors = {f"{i}.{name}": part for i, row in enumerate(self._rows.values()) for name, part in _parts(row)}
        with replacing(path, "text cache") as partial:
            save_file(tensors, partial, {"identity": identity, "prompts": json.dumps(list(self._rows))})

    @classmethod
    def load(cls, path: Path, identity: str, prompts: Sequence[str]) -> TextCache | None:
        """The cache that `save` wrote, or None if it is missing, damaged, of another identity, or lacks a prompt."""
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                names = json.loads(metadata["prompts"])
                if metadata["identity"] != identity or not set(prompts) <= set(names):
                    return None
                parts: list[dict[str, Tensor]] = [{} for _ in names]
                for key in file.keys():  # noqa: SIM118  # no mapping
                    row, name = key.split(".")
                    parts[int(row)][name] = file.get_tensor(key)
            return cls({name: Condition.of_text(row) for name, row in zip(names, parts, strict=True)})
        except (OSError, SafetensorError, LookupError, TypeError, ValueError):
            return None


def text_identity(folder: Path, dtype: str) -> str:
    """The identity of a pipeline's encoded prompts: its tokenizers and text encoders, and the libraries that read them.

    Files count by path, size and time.
    """
    files = sorted(
        path
        for part in ("tokenizer*", "text_encoder*", "connectors")
        for path in folder.glob(f"{part}/*")
        if path.is_file()
    )
    stats = [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    return json.dumps([dtype, *((name, version(name)) for name in LIBRARIES), *stats])


def _parts(row: Condition) -> list[tuple[str, Tensor]]:
    named = (("embeds", row.embeds), ("mask", row.mask), ("pooled", row.pooled))
    return [(name, part.contiguous()) for name, part in named if part is not None]
