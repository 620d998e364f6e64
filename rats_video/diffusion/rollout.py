"""The samplers, Euler and re-noising, along a sigma grid, keeping only the latents somebody asked for."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from rats_video.condition import Condition
from rats_video.diffusion.flow import add_noise, euler_step, stochastic_step
from rats_video.diffusion.guidance import PLAIN, GuidanceScale, guided
from rats_video.types import FreshNoise, Guide, Trajectory, VelocityFn


def rollout(
    velocity: VelocityFn,
    noise: Tensor,
    sigmas: Tensor,
    condition: Condition,
    *,
    negative: Condition | None = None,
    guidance_scale: GuidanceScale = 1.0,
    guide: Guide = PLAIN,
    keep: Collection[int] | None = None,
    grad_steps: Collection[int] = (),
    predict: Collection[int] = (),
    fresh: FreshNoise | None = None,
    share: float = 1.0,
) -> Trajectory:
    """Integrate from `noise` at `sigmas[0]` to `sigmas[-1]`.

    With `fresh` noise each step but the last re-noises the clean clip that it predicts, `(1 - sigma_next) * x0 +
    sigma_next * fresh`, as diffusers' `FlowMatchLCMScheduler` and ComfyUI's `lcm` do; without it steps are Euler's.
    With a smaller `share` each keeps the rest of the noise that it has (`stochastic_step`).

    Args:
        velocity: the denoiser.
        noise: `[B, C, F, H, W]`.
        sigmas: `[N + 1]` falling.
        condition: B encoded prompts, and the frames that are given: these stay as they are on the whole way.
        negative: one encoded negative prompt; needed when `guidance_scale` is not 1.
        guidance_scale: 1 = off, one evaluation a step; or a function of the noise levels (`scale_of`).
        guide: puts the two together, as the family does (`Backbone.guidance`).
        keep: indices into `sigmas` whose latents are kept (the last one always is); default only the last.
        grad_steps: steps (0 ... N - 1) whose evaluation carries gradient. The others run without graph, and pass
            gradient straight from their output to their input, as truncated backpropagation does.
        predict: steps whose predicted clean clip is kept as well.
        fresh: noise of each step, for the samplers that draw it.
        share: of a step's noise that is drawn anew.

    Returns:
        Trajectory: `nfe` counts network evaluations a clip.
    """
    num_steps = len(sigmas) - 1
    use_guidance = guidance_scale != 1.0
    if use_guidance:
        if negative is None:
            raise ValueError("guidance_scale != 1 needs a negative prompt")
        velocity = guided(velocity, negative, guidance_scale, guide)
    kept = {num_steps, *(keep or ())}
    levels = sigmas.tolist()  # read here, where the grid was made: no read waits for the GPU
    sigmas = sigmas.to(noise.device)
    latents = condition.hold(noise)  # where velocities are 0, so that they stay
    horizon_latents = [latents] if 0 in kept else []
    clean: list[Tensor] = []
    for step in range(num_steps):
        with torch.set_grad_enabled(torch.is_grad_enabled() and step in grad_steps):
            slope = velocity(latents, sigmas[step].expand(len(latents)), condition)
        drawn = fresh if step + 1 < num_steps else None  # at the end nothing is
        if step in predict or (drawn is not None and share == 1.0):
            x0 = euler_step(latents, slope, sigmas[step], torch.zeros_like(sigmas[step]))
        if step in predict:
            clean.append(x0)
        if drawn is None:
            latents = euler_step(latents, slope, sigmas[step], sigmas[step + 1])
        elif share < 1.0:
            mean, std = stochastic_step(latents, slope, sigmas[step], sigmas[step + 1], share)
            latents = condition.hold(mean + std * drawn(step))
        else:
            latents = condition.hold(add_noise(x0, drawn(step), sigmas[step + 1].expand(len(latents))))
        if step + 1 in kept:
            horizon_latents.append(latents)
    nfe = num_steps * (guide.calls if use_guidance else 1)
    predictions = Trajectory(tuple(levels[i] for i in sorted(predict)), tuple(clean), nfe) if predict else None
    return Trajectory(tuple(levels[i] for i in sorted(kept)), tuple(horizon_latents), nfe, predictions)
