"""What every family promises, on a tiny random pipeline of its own classes saved to disk: see `Family`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from contract import LORA, PROMPTS, Case, close, disturb
from torch import Tensor

from rats_video.backbones.attention import use_attention, used_attention
from rats_video.backbones.base import PipelineBackbone
from rats_video.backbones.kinds import load_backbone
from rats_video.backbones.offload import OffloadedWeights
from rats_video.backbones.text_cache import TextCache
from rats_video.condition import Condition
from rats_video.diffusion.rollout import rollout
from rats_video.errors import UserError

pytestmark = pytest.mark.usefixtures("no_gradient")


# --------------------------------------------------------------------------------------------- the stock pipeline


def test_its_folder_is_told_from_others(case: Case) -> None:
    assert type(case.backbone) is case.family.backbone
    assert type(case.pipeline).__name__ in case.backbone.pipelines


def test_velocity_is_the_transformers(case: Case) -> None:
    theirs = case.family.native_velocity(case.pipeline, case.noise, case.sigma, PROMPTS)
    assert theirs.std() > 0.1
    assert theirs.shape == case.noise.shape
    close(case.velocity(case.backbone), theirs)


def test_base_in_bfloat16_takes_and_gives_float32(case: Case) -> None:
    half = load_backbone(case.folder, dtype=torch.bfloat16)
    half.fps = case.backbone.fps
    velocity, whole = case.velocity(half), case.velocity(case.backbone)
    assert velocity.dtype == torch.float32
    assert 0 < (velocity - whole).abs().max() < 0.1 * whole.abs().max()
    path = rollout(half.velocity, case.noise, half.sigmas(2, 3.0), half.encode_text(PROMPTS))
    assert path.x0.dtype == half.decode(path.x0).dtype == torch.float32  # the VAE stays in float32


@pytest.mark.parametrize("num_steps", [1, 4])
def test_samples_are_the_pipelines(case: Case, num_steps: int) -> None:
    theirs = case.family.native_sample(case.pipeline, case.noise, PROMPTS, num_steps)
    text = case.backbone.encode_text(PROMPTS)
    path = rollout(case.backbone.velocity, case.noise, theirs.sigmas, text)
    assert path.nfe == num_steps
    assert theirs.x0.std() > 0.3
    close(path.x0, theirs.x0)
    close(case.backbone.decode(path.x0), theirs.videos)


def test_guided_samples_are_the_pipelines(case: Case) -> None:
    if case.family.native_guided is None:
        pytest.skip("the pipeline guides by another formula")
    theirs = case.family.native_guided(case.pipeline, case.noise, PROMPTS, 4, 3.0)
    text, negative = case.backbone.encode_text(PROMPTS), case.backbone.encode_text([""])
    path = rollout(
        case.backbone.velocity, case.noise, theirs.sigmas, text, negative=negative, guidance_scale=3.0,
        guide=case.backbone.guidance(),
    )  # fmt: skip
    close(path.x0, theirs.x0)


def test_text_features_are_the_pipelines(case: Case) -> None:
    theirs = case.family.native_text(case.pipeline, PROMPTS)
    ours = case.backbone.encode_text(PROMPTS)
    rows = ours.embeds.shape[1]
    assert rows <= (length := theirs.embeds.shape[1])
    assert case.family.text_length in {None, length}
    close(ours.embeds, theirs.embeds[:, :rows])
    assert not theirs.embeds[:, rows:].any()  # what is left out is padding
    for mine, native in ((ours.mask, theirs.mask), (ours.pooled, theirs.pooled)):
        assert (mine is None) == (native is None)
        if mine is not None and native is not None:
            close(mine.float(), native[:, : mine.shape[1]].float())


# ----------------------------------------------------------------------------------------------------------- text


def test_prompts_that_are_cut_are_told(case: Case) -> None:
    limit = case.backbone.text_limit
    assert case.backbone.truncation_note(PROMPTS[1]) == ""
    long = " ".join(["red"] * (limit + 1))
    assert case.backbone.truncation_note(long) == f"longer than the {limit} tokens this model reads"
    cut, longer = case.backbone.encode_text([long]), case.backbone.encode_text([f"{long} {PROMPTS[0]}"])
    assert torch.equal(cut.embeds, longer.embeds)


def test_the_prompt_matters(case: Case) -> None:
    one, other = case.velocity(case.backbone), case.velocity(case.backbone, PROMPTS[::-1])
    assert (one - other).abs().amax(dim=(1, 2, 3, 4)).min() > 1e-3


def test_prompts_of_unequal_length_can_be_put_together(case: Case) -> None:
    parts = [case.backbone.encode_text([prompt]) for prompt in PROMPTS]
    together = case.backbone.velocity(case.noise, case.sigma, Condition.cat(parts))
    close(together, case.velocity(case.backbone))
    alone = [case.backbone.velocity(case.noise[i : i + 1], case.sigma[i : i + 1], parts[i]) for i in range(2)]
    close(together, torch.cat(alone))


def test_guidance_is_the_formula_clip_by_clip(case: Case) -> None:
    """The rollout batches prompts and the negative prompt, which differ in length."""
    levels = torch.stack([case.sigma[0], torch.tensor(0.0)])
    negative = case.backbone.encode_text([""])
    path = rollout(
        case.backbone.velocity, case.noise, levels, case.backbone.encode_text(PROMPTS), negative=negative,
        guidance_scale=3.0, guide=case.backbone.guidance(),
    )  # fmt: skip
    for i, prompt in enumerate(PROMPTS):
        noise, sigma = case.noise[i : i + 1], levels[:1]
        cond = case.backbone.velocity(noise, sigma, case.backbone.encode_text([prompt]))
        uncond = case.backbone.velocity(noise, sigma, negative)
        guided = case.backbone.guide(cond, uncond, 3.0)
        close(path.x0[i : i + 1], noise - sigma * guided, 3e-5)  # errors tripled


def test_cached_text_is_the_encoders_and_does_without_them(case: Case, tmp_path: Path) -> None:
    TextCache.encode(case.backbone.encode_text, ["", *PROMPTS]).save(tmp_path / "text.safetensors", "tiny")
    text = TextCache.load(tmp_path / "text.safetensors", "tiny", PROMPTS)
    assert text is not None
    fresh = load_backbone(case.folder, with_text=False)
    fresh.fps = case.backbone.fps
    assert not [part for part in fresh.parts if part.startswith("text_encoder")]
    fresh.cache_text(text)
    close(case.velocity(fresh), case.velocity(case.backbone))


@pytest.mark.parametrize("level", ["block", "leaf"])
def test_offloaded_weights_are_there_when_they_are_needed(case: Case, level: Any) -> None:
    def gradients(backbone: PipelineBackbone) -> list[Tensor]:
        torch.manual_seed(0)  # where adapters start
        student = backbone.with_adapter("student", LORA)
        disturb(student)
        with torch.enable_grad():
            loss = case.velocity(student).square().mean()
        return [loss, *torch.autograd.grad(loss, list(student.weights.values()), materialize_grads=True)]

    plain, offloaded = case.backbone.with_own_denoiser(), case.backbone.with_own_denoiser()
    for network in offloaded.denoisers.values():
        OffloadedWeights(network.requires_grad_(requires_grad=False), torch.device("cpu"), level)
    results = [gradients(plain), gradients(offloaded)]
    assert max(float(gradient.abs().max()) for gradient in results[0]) > 1e-4
    for ours, theirs in zip(*results, strict=True):
        close(ours, theirs)


def test_attention_is_asked_for_or_refused(case: Case) -> None:
    backbone = case.backbone.with_own_denoiser()
    plain = case.velocity(backbone)
    for network in backbone.denoisers.values():
        assert used_attention(network) == "native"
        try:
            use_attention(network, "_native_math", has_mask=True)
        except UserError as error:
            assert str(error).endswith("only has native attention (native)")  # noqa: PT017
        else:
            assert "_native_math" in used_attention(network)
    close(case.velocity(backbone), plain)
