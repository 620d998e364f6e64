"""The stock pipeline's call: how diffusers itself samples a student at exactly the noise levels it was trained for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class StockCall:
    """A scheduler whose saved configuration carries the noise levels, and a call.

    Args:
        scheduler: of diffusers; in the family's own pipeline it makes Euler steps along our grid.
        call: arguments of the pipeline's call beside prompt and size; plain values.
        latents: turns our noise `[B, C, F, H, W]` into the pipeline's.
        seen: turns our latents into those that the pipeline's callback shows, where these are laid out otherwise.
        note: what the caller must pass, because no folder can carry it; or nothing.
        seed: of the global generator, for VAEs that draw noise from it.
        beside: further arguments of the call that are made of our noise: of the sound's.
        draws_noise: True if the pipeline passes the `latents` it is given by, and draws its own.
    """

    scheduler: Any
    call: Mapping[str, Any]
    latents: Callable[[Tensor], Tensor] = lambda noise: noise
    seen: Callable[[Tensor], Tensor] | None = None
    note: str = ""
    seed: int = 0
    draws_noise: bool = False
    beside: Callable[[Tensor], Mapping[str, Tensor]] = lambda _noise: MappingProxyType({})
