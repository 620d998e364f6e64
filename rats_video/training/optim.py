"""Learning-rate schedules and counter-based seeds."""

from __future__ import annotations

import hashlib
import math

import torch



def cosine_lr(step: int, total: int, peak: float, *, warmup: int = 0, floor: float = 0.0) -> float:
    """Learning rate at `step` of `total`: linear warm-up, then half a cosine down to `floor * peak`."""
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, total - warmup)
    return peak * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress)))


def seeded(*counters: int, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator that depends on the counters alone, e.g. (seed, stream, step).

    With no state carried from step to step, a resumed run draws what an uninterrupted one draws.
    """
    digest = hashlib.blake2b(repr(counters).encode(), digest_size=8).digest()
    return torch.Generator(device=device).manual_seed(int.from_bytes(digest, "little") >> 1)
