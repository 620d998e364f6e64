"""The stock pipeline's call: how diffusers itself samples a student at exactly the noise levels it was trained for."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

from torch import Tensor

from rats_video.errors import UserError


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


def renoising(stock: StockCall, pipeline: str, sigmas: Sequence[float], shift: float) -> StockCall:
    """The same call with `FlowMatchLCMScheduler`, which puts fresh noise on each predicted clean clip.

    Args:
        stock: of Euler steps.
        pipeline: diffusers' name of it.
        sigmas: noise levels `[N + 1]`, 1 ... 0, of the grid with that shift.
        shift: of the grid.

    Raises:
        UserError: the pipeline does not go with such a scheduler.
    """
    from diffusers import FlowMatchLCMScheduler

    match type(stock.scheduler).__name__:
        case "FlowMatchEulerDiscreteScheduler" if not pipeline.startswith(("LTXCondition", "LTXImage")):
            scheduler, note = FlowMatchLCMScheduler(shift=stock.scheduler.config.shift), stock.note
        case "FlowMapEulerDiscreteScheduler":
            calls = len(sigmas) - 1
            scheduler = FlowMatchLCMScheduler(
                shift=_shift_of_lcm(calls, shift), shift_terminal=sigmas[-2] if calls > 1 else None
            )
            only = f"the scheduler has the noise levels of num_inference_steps={calls} alone"
            note = f"{stock.note}; {only}" if stock.note else only
        case _:
            raise UserError(
                f"diffusers' {pipeline} takes no scheduler that draws fresh noise, as this student does",
                where="student.sampler=renoise", fix="sample it with rats-video, or distill with student.sampler=euler",
            )  # fmt: skip
    return replace(stock, scheduler=scheduler, note=note)


def _shift_of_lcm(calls: int, shift: float) -> float:
    """The shift by which `FlowMatchLCMScheduler`, given no levels, makes our grid of so many calls.

    It shifts equal steps from 1 to its least level, s' / (999 + s'), and then stretches them linearly, so that they end
    at `shift_terminal`. Both are fractional linear in a step's number, and the same if their poles agree:
    c s'^2 + (999 c - s) s' + s = 0 with c = (s - 1) (1 - 1 / N) / 999, whose root at c = 0 is 1. It has none for dozens
    of calls at shifts above 16.
    """
    c = (shift - 1) * (1 - 1 / calls) / 999
    b = shift - 999 * c
    if (square := b * b - 4 * c * shift) < 0:
        raise UserError(
            f"FlowMatchLCMScheduler has no settings for {calls} calls at shift {shift:g}",
            where="student.sampler=renoise", fix="export with fewer --nfe",
        )  # fmt: skip
    return 2 * shift / (b + math.sqrt(square))
