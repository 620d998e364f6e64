"""What is particular to HunyuanVideo: guidance as an input, guidance by two calls, and a decode in tiles."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hunyuan_family import CLIP, SHIFT, build, load_stock, native_text
from torch import Tensor

from rats_video.backbones.compute import DecodeConfig, LoraConfig
from rats_video.backbones.hunyuan import HunyuanVideoBackbone
from rats_video.backbones.hunyuan_decode import decode_tiles, run_decoder
from rats_video.backbones.lora import LORA_FILE
from rats_video.diffusion.rollout import rollout
from rats_video.diffusion.schedule import sigma_grid
from rats_video.distillation.roles import build_backbone
from rats_video.distillation.settings import DistillConfig
from rats_video.errors import UserError
from rats_video.seeds import seeded

pytestmark = pytest.mark.pipeline

PROMPTS = ["a fast red circle moving left on a gray background", "a slow green square"]
SIGMA = torch.tensor([0.9, 0.3])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "hunyuan"
    build(folder)
    return folder


@pytest.fixture(scope="module")
def pipeline(folder: Path) -> Any:
    return load_stock(folder)


@pytest.fixture
def backbone(folder: Path) -> HunyuanVideoBackbone:
    return HunyuanVideoBackbone.from_pretrained(folder)


@pytest.fixture
def noise(backbone: HunyuanVideoBackbone) -> Tensor:
    return backbone.sample_noise(2, CLIP, seeded(3))


def stock_sample(pipeline: Any, noise: Tensor, **options: Any) -> Tensor:
    return pipeline(
        PROMPTS, latents=noise, num_inference_steps=4, output_type="latent", num_frames=9, height=32, width=32,
        **options,
    ).frames  # fmt: skip


@torch.no_grad()
def our_sample(backbone: HunyuanVideoBackbone, noise: Tensor, guidance_scale: float = 1.0) -> Tensor:
    text, negative = backbone.encode_text(PROMPTS), backbone.encode_text([""])
    return rollout(
        backbone.velocity, noise, sigma_grid(4, SHIFT), text, negative=negative, guidance_scale=guidance_scale
    ).x0


def close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


# --------------------------------------------------------------------------------------------------------- guidance


def test_embedded_guidance_reaches_the_transformer(
    backbone: HunyuanVideoBackbone, pipeline: Any, noise: Tensor
) -> None:
    default = our_sample(backbone, noise)
    close(default, stock_sample(pipeline, noise))  # 6, as the pipeline's own default
    backbone.embedded_guidance = 2.5
    close(our_sample(backbone, noise), stock_sample(pipeline, noise, guidance_scale=2.5))
    assert (our_sample(backbone, noise) - default).abs().max() > 1e-3
    assert torch.equal(our_sample(backbone.with_own_denoiser(), noise), our_sample(backbone, noise))


def test_a_model_without_guidance_input_is_told_none(tmp_path: Path, noise: Tensor) -> None:
    build(tmp_path, guidance_embeds=False)
    backbone, seen = HunyuanVideoBackbone.from_pretrained(tmp_path), []
    hook = lambda _, __, options: seen.append(options["guidance"])  # noqa: E731
    backbone.denoiser.register_forward_pre_hook(hook, with_kwargs=True)
    close(our_sample(backbone, noise), stock_sample(load_stock(tmp_path), noise))
    assert seen == [None] * 4


def test_guidance_by_two_calls_is_the_pipelines(backbone: HunyuanVideoBackbone, pipeline: Any, noise: Tensor) -> None:
    theirs = stock_sample(pipeline, noise, true_cfg_scale=3.0, negative_prompt=["", ""])
    close(our_sample(backbone, noise, guidance_scale=3.0), theirs)
    assert (theirs - stock_sample(pipeline, noise)).abs().max() > 0.01


def test_the_configuration_sets_it(make_config: Callable[..., DistillConfig]) -> None:
    cpu = torch.device("cpu")
    assert build_backbone(make_config(), cpu).embedded_guidance == 6.0
    backbone = build_backbone(make_config("embedded_guidance=4.5"), cpu)
    assert backbone.with_own_denoiser().embedded_guidance == 4.5


# ------------------------------------------------------------------------------------------------------------- text


@pytest.mark.parametrize("prompts", [PROMPTS, [""], ["red " * 400, "a {circle}"]])
def test_text_is_the_pipelines(backbone: HunyuanVideoBackbone, pipeline: Any, prompts: list[str]) -> None:
    ours, theirs = backbone.encode_text(prompts), native_text(pipeline, prompts)
    assert ours.embeds.shape == (len(prompts), 256, 16)
    assert torch.equal(ours.embeds, theirs.embeds)
    assert torch.equal(ours.mask, theirs.mask)
    assert torch.equal(ours.pooled, theirs.pooled)


def test_padding_rows_and_the_pooled_vector(backbone: HunyuanVideoBackbone, noise: Tensor) -> None:
    text = backbone.encode_text(PROMPTS)
    padding = (text.mask == 0)[..., None]
    assert 0 < padding.float().mean() < 1
    with torch.no_grad():
        velocity = backbone.velocity(noise, SIGMA, text)
        garbage = type(text)(torch.where(padding, 9.0, text.embeds), text.mask, text.pooled)
        close(backbone.velocity(noise, SIGMA, garbage), velocity)
        other = type(text)(text.embeds, text.mask, text.pooled.flip(0))
        assert (backbone.velocity(noise, SIGMA, other) - velocity).abs().max() > 1e-3


# ----------------------------------------------------------------------------------------------------------- decode


@pytest.mark.parametrize("frames", [1, 4, 5, 7, 8])
def test_tiles_are_the_vaes_own(backbone: HunyuanVideoBackbone, pipeline: Any, frames: int) -> None:
    latents = torch.randn(2, 4, frames, 2, 2, generator=seeded(frames), dtype=torch.float64)
    ours, theirs = backbone.vae.double(), copy.deepcopy(pipeline.vae).double()
    with torch.no_grad():
        pixels = decode_tiles(ours, latents)
        assert pixels.shape == (2, 3, 4 * frames - 3, 16, 16)
        torch.testing.assert_close(pixels, theirs.decode(latents).sample, atol=1e-12, rtol=0)


def held_bytes(run: Callable[[], Tensor]) -> tuple[Tensor, int]:
    """What `run` returns, and the bytes that autograd keeps for its backward."""
    held: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        held[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        return run(), sum(held.values())


def test_recomputed_tiles_are_exact_and_hold_little(backbone: HunyuanVideoBackbone) -> None:
    def run(frames: int, *, recompute: bool) -> tuple[Tensor, Tensor, int]:
        backbone.decoding = DecodeConfig(checkpoint=recompute)
        latents = torch.randn(1, 4, frames, 4, 4, generator=seeded(frames), dtype=torch.float64).requires_grad_()
        videos, held = held_bytes(lambda: backbone.decode(latents))
        (gradient,) = torch.autograd.grad(videos.square().sum(), latents)
        return videos.detach(), gradient, held

    backbone.vae.double()  # convolving fewer frames at a time rounds otherwise
    plain, recomputed = run(7, recompute=False), run(7, recompute=True)
    torch.testing.assert_close(plain[0], recomputed[0], atol=1e-12, rtol=0)
    torch.testing.assert_close(plain[1], recomputed[1], atol=1e-9, rtol=1e-9)
    assert plain[1].flatten(3).abs().amax(dim=(0, 1, 3)).min() > 0  # every latent frame gets gradient
    assert recomputed[2] < plain[2] / 20
    assert run(7, recompute=False)[2] > 1.5 * run(4, recompute=False)[2]
    assert recomputed[2] - run(4, recompute=True)[2] < 0.02 * plain[2]


def test_within_a_tile_only_block_inputs_are_held(backbone: HunyuanVideoBackbone) -> None:
    latents = torch.randn(1, 4, 5, 4, 4, generator=seeded(1)).requires_grad_()
    plain, recomputed = (
        held_bytes(lambda recompute=recompute: run_decoder(backbone.vae.decoder, latents, recompute=recompute))[1]
        for recompute in (False, True)
    )
    inputs = 17 * 32 * 32 * (4 + 4 + 4) * 4  # of the last stage's blocks, and the head
    assert inputs < recomputed < 2 * inputs < plain / 2


def test_attention_without_a_mask_holds_no_square_of_the_tokens(backbone: HunyuanVideoBackbone, pipeline: Any) -> None:
    hidden, outcomes = torch.randn(1, 8, 4, 12, 12, generator=seeded(9)), []
    for vae in (backbone.vae, pipeline.vae):
        leaf = hidden.clone().requires_grad_()
        out, held = held_bytes(lambda block=vae.decoder.mid_block, leaf=leaf: block(leaf))
        outcomes.append((out, torch.autograd.grad(out.square().sum(), leaf)[0], held))
    (ours, our_gradient, our_bytes), (theirs, their_gradient, their_bytes) = outcomes
    close(ours, theirs)
    torch.testing.assert_close(our_gradient, their_gradient, atol=1e-4, rtol=1e-4)
    square = 4 * (4 * 12 * 12) ** 2
    assert their_bytes > square > 2 * our_bytes


def test_a_window_of_latents_is_not_exact(
    backbone: HunyuanVideoBackbone, folder: Path, make_config: Callable[..., DistillConfig]
) -> None:
    latents = torch.randn(1, 4, 3, 4, 4, generator=seeded(8))
    other = latents.clone()
    other[:, :, 2] += 1
    with torch.no_grad():
        changed = (backbone.decode(other) - backbone.decode(latents)).abs().amax(dim=(0, 2, 3, 4))
    assert changed[0] > 1e-4  # the last latent moves the first pixel frame, through the norms' means
    with pytest.raises(ValueError, match="no window"):
        backbone.decode(latents, range(2, 3))
    changes = (f"model={folder}", "clip.num_frames=9", "compute.decode.window=1")
    with pytest.raises(UserError, match=r"^compute\.decode\.window: [^\n]*HunyuanVideo[^\n]*$"):
        build_backbone(make_config(*changes), torch.device("cpu"))


# ------------------------------------------------------------------------------------------------------------- LoRA


def test_a_lora_student_is_loaded_by_the_pipeline(
    backbone: HunyuanVideoBackbone, folder: Path, noise: Tensor, tmp_path: Path
) -> None:
    student = backbone.with_adapter("student", LoraConfig(kind="lora", rank=2, alpha=4))
    layers = {name.split(".lora_")[0] for name in student.weights}
    assert {name.split(".")[1] for name in layers} >= {"transformer_blocks", "single_transformer_blocks"}
    with torch.no_grad():
        for name, weight in student.weights.items():
            weight.add_(0.1 * torch.randn(weight.shape, generator=seeded(len(name))))
    student.save_role(tmp_path)
    ours = our_sample(student, noise)
    assert (ours - our_sample(backbone, noise)).abs().max() > 0.01
    pipeline = load_stock(folder)
    pipeline.load_lora_weights(tmp_path, weight_name=LORA_FILE)
    close(stock_sample(pipeline, noise), ours)
