"""Text conditions that `prepare` has stored, read when a prompt is looked up."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch

from rats_video.condition import Condition
from rats_video.datasets.prepared.cache import ClipCache


class PreparedText(Mapping[str, Condition]):
    """The text of a cache's captions, and of the empty prompt, as `[1, L, D]`.

    Args:
        cache: prepared clips.
        dtype: of the embeddings, whatever they are stored in.
    """

    def __init__(self, cache: ClipCache, dtype: torch.dtype) -> None:
        self._cache, self._dtype = cache, dtype
        self._records = {record.caption: record for record in reversed(cache.records) if record.caption}

    def __getitem__(self, prompt: str) -> Condition:
        text = self._cache.text(self._records[prompt]) if prompt else self._cache.empty_prompt
        return text.map(lambda part: part.to(self._dtype) if part.is_floating_point() else part)

    def __iter__(self) -> Iterator[str]:
        return iter(("", *self._records))

    def __len__(self) -> int:
        return 1 + len(self._records)
