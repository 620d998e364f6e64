"""Sizes of a network read off the tensors of a checkpoint that does not name them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from math import isqrt
from pathlib import Path

from torch import Tensor

from rats_video.errors import UserError

HEAD_WIDTH = 64  # of an attention head, in every published checkpoint read here
_DEPTHS = {512: 12, 768: 12, 1024: 24}  # published widths: a checkpoint whose last blocks are missing is noticed


class TensorSizes:
    """Reads shapes of tensors.

    Args:
        tensors: of a checkpoint, by name.
        where: the checkpoint, for messages.
    """

    def __init__(self, tensors: Mapping[str, Tensor], *, where: Path) -> None:
        self._tensors, self._where = tensors, where

    def of(self, name: str, num_dims: int) -> tuple[int, ...]:
        """Shape of a tensor; raises UserError if it is missing or has another number of dimensions."""
        if name not in self._tensors:
            raise UserError(f"lacks {name}", where=str(self._where))
        shape = tuple(self._tensors[name].shape)
        if len(shape) != num_dims:
            raise UserError(f"{name} is {list(shape)}, must have {num_dims} dimensions", where=str(self._where))
        return shape

    def depth(self, blocks: str, width: int) -> int:
        """Number of blocks of that width, named `blocks.0...`; raises UserError if heads do not fit it."""
        if not width or width % HEAD_WIDTH:
            raise UserError(f"{blocks} is {width} wide, no multiple of {HEAD_WIDTH}", where=str(self._where))
        numbered = (re.match(rf"{re.escape(blocks)}\.(\d+)\.", name) for name in self._tensors)
        return _DEPTHS.get(width, 1 + max((int(found[1]) for found in numbered if found), default=-1))

    def image_size(self, positions: str, num_dims: int, patch: int) -> int:
        """Side of the images; `positions` `[..., 1 + P, width]` holds one for the whole and one for each patch."""
        return patch * isqrt(max(self.of(positions, num_dims)[-2] - 1, 0))
