"""The card's section for ComfyUI: folders, nodes, and the noise levels for each number of calls.

What it says was tried in ComfyUI 0.3.64 and 0.10.0, with random weights of the true sizes, against our sampler; figures
are in docs/exports.md.
"""

from __future__ import annotations

import torch

from rats_video.backbones.experts import HIGH_NOISE, expert_by_step
from rats_video.diffusion.schedule import shift_sigma
from rats_video.export.base import ExportedStudent
from rats_video.export.comfyui_models import ComfyModel
from rats_video.export.usage import fenced, sigma_string

TIMESTEPS = 1000  # of ComfyUI's ModelSamplingDiscreteFlow
LCM = "lcm"  # comfy/k_diffusion/sampling.py: re-noises by the model's own `noise_scaling`, of flows the same formula
SAME_LEVELS = 1e-6  # float32 around 1, and the widget's rounding


def sampling_section(exported: ExportedStudent, model: ComfyModel, files: list[str]) -> str:
    """What to do in ComfyUI with the files of an export."""
    parts = [_loading(exported, files), _sampler(exported, model)]
    parts += [
        f"{levels_label(exported, n)}:\n\n{fenced(sigma_string(exported.sigmas[n]), 'text')}" for n in exported.sigmas
    ]
    if model.shift_node is not None:
        parts.append(_ksampler(exported, model.shift_node))
    return "\n\n".join(parts)


def sampler_name(exported: ExportedStudent) -> str:
    """ComfyUI's name of the student's sampler."""
    return LCM if exported.card.sampler == "renoise" else "euler"


def levels_label(exported: ExportedStudent, steps: int) -> str:
    """The number of calls that a line of noise levels is for, and with two experts where to split it."""
    calls = f"{steps} call{'s' if steps != 1 else ''}"
    if exported.boundary is None:
        return calls
    first = high_noise_calls(exported, steps)
    return f"{calls}, {f'SplitSigmas at step {first}' if first < steps else 'all by the high-noise model'}"


def high_noise_calls(exported: ExportedStudent, steps: int) -> int:
    """How many of the calls the first expert makes: all without a second one."""
    return expert_by_step(torch.tensor(exported.sigmas[steps]), exported.boundary).count(HIGH_NOISE)


def simple_levels(num_steps: int, shift: float) -> list[float]:
    """The noise levels `[N + 1]` of KSampler's `simple` after ModelSamplingSD3: every 1000 / N-th of 1000, shifted.

    `simple_scheduler` of comfy/samplers.py, ComfyUI 0.10.0.
    """
    places = [TIMESTEPS - int(step * TIMESTEPS / num_steps) for step in range(num_steps)]
    return [*shift_sigma(torch.tensor(places, dtype=torch.float64) / TIMESTEPS, shift).tolist(), 0.0]


def _loading(exported: ExportedStudent, files: list[str]) -> str:
    names = " and ".join(f"`{file}`" for file in files)
    if not exported.is_lora:
        return f"By hand: load {names} with Load Diffusion Model."
    onto = "each onto its own expert of the base" if exported.boundary is not None else "onto the base"
    return f"By hand: load {names} with LoraLoaderModelOnly at strength 1, {onto}."


def _sampler(exported: ExportedStudent, model: ComfyModel) -> str:
    text = (
        f"Sample with SamplerCustom: cfg 1.0, KSamplerSelect `{sampler_name(exported)}`, and one of the lines below in "
        "ManualSigmas, which "
        "ComfyUI has from 0.7.0 on."
    )
    if exported.boundary is not None:
        text += (
            " Each call must be made by its own expert, so split the line with SplitSigmas. The first SamplerCustom "
            "takes the high-noise model and `high_sigmas`; the second takes the low-noise model, `low_sigmas` and the "
            "first one's `output`, with `add_noise` off."
        )
        if sampler_name(exported) == LCM:
            text += " Give them different `noise_seed`s: `lcm` draws noise in both."
    if exported.pictures is not None:
        text += f" The picture, scaled to the clip with crop `center`, goes into {model.picture_node}."
    if model.sound_nodes:
        text += f" {model.sound_nodes}."
    if model.takes_frame_rate:
        text += f" Put LTXVConditioning with `frame_rate` {exported.card.clip['fps']:g} behind the prompt."
    if model.guidance_node is not None:
        told = exported.card.embedded_guidance
        text += f" Put {model.guidance_node} with `guidance` {told:g} behind the prompt, as in training."
    no_node = f"Use no {model.ruined_by}: it ruins the clip" if model.ruined_by else "No ModelSampling node is needed"
    return f"{text} {no_node}."


def _ksampler(exported: ExportedStudent, node: str) -> str:
    off = {n: _furthest(exported, n) for n in exported.sigmas}
    same = [n for n, far in off.items() if far <= SAME_LEVELS]
    text = (
        f"In any version, KSampler does as well: {node} with shift {exported.card.shift:g} behind the model, then the "
        "number of calls as `steps`, cfg 1.0, "
        f"sampler `{sampler_name(exported)}`, scheduler `simple`. "
    )
    if exported.boundary is not None:
        text += (
            "For the two experts take KSamplerAdvanced twice, with all of the `steps` in both: the high-noise model "
            "from 0 to the split with `return_with_leftover_noise` on, then the low-noise model from there with "
            "`add_noise` off. "
        )
    if same:
        text += f"These are the same noise levels for {_count(same)}. "
    text += "".join(f"For {_count([n])} they are up to {far:.2g} off. " for n, far in off.items() if n not in same)
    return (
        f"{text}Another shift, and the schedulers `normal`, `sgm_uniform` and `beta`, make other levels, at which it "
        "is another model."
    )


def _furthest(exported: ExportedStudent, steps: int) -> float:
    theirs = simple_levels(steps, exported.card.shift)
    return max(abs(a - b) for a, b in zip(theirs, exported.sigmas[steps], strict=True))


def _count(steps: list[int]) -> str:
    return f"{', '.join(map(str, steps))} call{'s' if steps != [1] else ''}"
