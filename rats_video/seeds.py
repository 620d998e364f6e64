"""Counter-based seeds: randomness as a pure function of where it is used."""

from __future__ import annotations

import hashlib

import torch


def seeded(*counters: int, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator that depends on the counters alone, e.g. (seed, stream, step).

    With no state carried from step to step, a resumed run draws what an uninterrupted one draws.
    """
    digest = hashlib.blake2b(repr(counters).encode(), digest_size=8).digest()
    return torch.Generator(device=device).manual_seed(int.from_bytes(digest, "little") >> 1)
