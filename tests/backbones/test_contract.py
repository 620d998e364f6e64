"""What every family promises, on a tiny random pipeline of its own classes saved to disk: see `Family`.

A new family is a module beside this one and a line in `FAMILIES`.
"""

from __future__ import annotations

import copy
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cogvideox_family import COGVIDEOX_FAMILIES
from diffusers import DiffusionPipeline
from family import Family
from hunyuan_family import HUNYUAN
from ltx_family import LTX_FAMILIES
from safetensors.torch import load_file, save_file
from torch import Tensor
from wan22_family import WAN22_FAMILIES
from wan_family import WAN

from rats_video.backbones.attention import use_attention, used_attention
from rats_video.backbones.base import PipelineBackbone
from rats_video.backbones.compute import LoraConfig
from rats_video.backbones.features import middle_features
from rats_video.backbones.kinds import load_backbone
from rats_video.backbones.offload import OffloadedWeights
from rats_video.backbones.text_cache import TextCache
from rats_video.diffusion.causal import pool_to_latent_frames
from rats_video.diffusion.rollout import rollout
from rats_video.errors import UserError
from rats_video.seeds import seeded
from rats_video.types import ClipSpec, TextCondition

FAMILIES: tuple[Family, ...] = (WAN, *WAN22_FAMILIES, *LTX_FAMILIES, HUNYUAN, *COGVIDEOX_FAMILIES)

PROMPTS = ["a fast red circle moving left on a gray background", "a slow green square"]
LORA = LoraConfig(kind="lora", rank=2, alpha=6)


class Case(SimpleNamespace):
    """A family's folder, our backbone and the stock pipeline from it, and noise `[2, C, F, H, W]` of its clip."""

    family: Family
    folder: Path
    backbone: PipelineBackbone
    pipeline: Any
    noise: Tensor

    @property
    def sigma(self) -> Tensor:
        """One level a clip, that the model can be called at."""
        return self.backbone.sigmas(4, 3.0)[[1, 3]]

    def velocity(self, role: PipelineBackbone, prompts: list[str] = PROMPTS) -> Tensor:
        return role.velocity(self.noise, self.sigma, role.encode_text(prompts))


def load_pipeline(folder: Path) -> Any:
    """What a user of diffusers loads: nothing of ours in it."""
    pipeline = DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module", params=FAMILIES, ids=lambda family: family.name)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Case]:
    family: Family = request.param
    folder = tmp_path_factory.mktemp("contract") / family.name
    family.build(folder)
    backbone = load_backbone(folder)
    backbone.fps = family.clip.fps
    noise = backbone.sample_noise(2, family.clip, seeded(3))
    before = {name: weight.clone() for name, weight in backbone.weights.items()}
    yield Case(family=family, folder=folder, backbone=backbone, pipeline=load_pipeline(folder), noise=noise)
    assert all(torch.equal(weight, before[name]) for name, weight in backbone.weights.items())  # no test changes it


@pytest.fixture(autouse=True)
def gradient_only_where_a_test_says_so() -> Iterator[None]:
    with torch.no_grad():
        yield


def close(ours: Tensor, theirs: Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(ours, theirs, atol=tolerance, rtol=0)


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
        case.backbone.velocity, case.noise, theirs.sigmas, text, negative=negative, guidance_scale=3.0
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
    together = case.backbone.velocity(case.noise, case.sigma, TextCondition.cat(parts))
    close(together, case.velocity(case.backbone))
    alone = [case.backbone.velocity(case.noise[i : i + 1], case.sigma[i : i + 1], parts[i]) for i in range(2)]
    close(together, torch.cat(alone))


def test_guidance_is_the_formula_clip_by_clip(case: Case) -> None:
    """The rollout batches prompts and the negative prompt, which differ in length."""
    levels = torch.stack([case.sigma[0], torch.tensor(0.0)])
    negative = case.backbone.encode_text([""])
    path = rollout(
        case.backbone.velocity, case.noise, levels, case.backbone.encode_text(PROMPTS), negative=negative,
        guidance_scale=3.0,
    )  # fmt: skip
    for i, prompt in enumerate(PROMPTS):
        noise, sigma = case.noise[i : i + 1], levels[:1]
        cond = case.backbone.velocity(noise, sigma, case.backbone.encode_text([prompt]))
        uncond = case.backbone.velocity(noise, sigma, negative)
        close(path.x0[i : i + 1], noise - sigma * (uncond + 3 * (cond - uncond)), 3e-5)  # errors tripled


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
        return [loss, *torch.autograd.grad(loss, list(student.weights.values()))]

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


# --------------------------------------------------------------------------------------------------------- pixels


def test_decode_is_the_vaes_after_its_clamp(case: Case) -> None:
    theirs = case.family.native_sample(case.pipeline, 4 * case.noise, PROMPTS, 1)
    ours = case.backbone.decode(theirs.x0)
    clip = case.family.clip
    assert ours.shape == (2, clip.num_frames, 3, clip.height, clip.width)
    assert 0.001 < ((theirs.videos <= 0) | (theirs.videos >= 1)).float().mean() < 0.9
    close(ours, theirs.videos)
    assert ours.min() >= -1e-6
    assert ours.max() <= 1 + 1e-6


@pytest.mark.parametrize("checkpoint", [False, True])
def test_saturated_pixels_carry_gradient(case: Case, checkpoint: bool) -> None:  # noqa: FBT001
    backbone = copy.copy(case.backbone)
    backbone.decoding = backbone.decoding.model_copy(update={"checkpoint": checkpoint})
    latents = (4 * case.noise).requires_grad_()
    with torch.enable_grad():
        videos = backbone.decode(latents)
        saturated = (videos <= 0) | (videos >= 1)
        (gradient,) = torch.autograd.grad(videos[saturated].sum(), latents)
    assert gradient.abs().amax(dim=(1, 3, 4)).min() > 1e-4  # every latent frame's
    again = case.backbone.decode(latents)
    assert torch.equal(videos, again)  # and twice the same


def test_pixel_frames_belong_to_latent_frames(case: Case) -> None:
    """Latent 0 holds pixel 0, latent f the next `temporal_stride`: the map by which frame scores are pooled."""
    family, stride = case.family, case.backbone.temporal_stride
    _, frames, _, _ = case.backbone.latent_shape(family.clip)
    assert frames >= 3
    owner = [(pixel + stride - 1) // stride for pixel in range(family.clip.num_frames)]
    pooled = pool_to_latent_frames(torch.tensor([owner], dtype=torch.float32), stride)
    assert pooled.tolist() == [list(range(frames))]
    before = case.backbone.decode(case.noise)
    for changed in range(frames):
        other = case.noise.clone()
        other[:, :, changed] += 1
        differs = (case.backbone.decode(other) != before).flatten(2).any(2)
        first = family.decoded_from(changed)
        assert differs.tolist() == 2 * [[latent >= first for latent in owner]]
    assert case.backbone.exact_window == (family.decoded_from(frames - 1) > 0)


def random_videos(clip: ClipSpec) -> Tensor:
    """Two clips `[2, T, 3, height, width]` whose pixels fill [0, 1]."""
    return torch.rand(2, clip.num_frames, 3, clip.height, clip.width, generator=seeded(11))


def test_encode_is_the_vae_and_the_pipelines_normalisation(case: Case) -> None:
    clip = case.family.clip
    longer = ClipSpec(2 * clip.num_frames - 1, clip.height, clip.width, clip.fps)  # more than a chunk, or a tile
    for spec in (clip, longer):
        videos = random_videos(spec)
        latents, theirs = case.backbone.encode(videos), case.family.native_latents(case.pipeline, videos)
        assert latents.shape == (2, *case.backbone.latent_shape(spec))
        assert theirs.std() > 0.01
        close(latents, theirs)
        close(case.backbone.encode(videos[1:]), latents[1:])  # each clip by itself


def test_encode_has_no_gradient_and_is_float32(case: Case) -> None:
    videos = random_videos(case.family.clip)
    backbone = copy.copy(case.backbone)
    backbone.vae = copy.deepcopy(case.backbone.vae).bfloat16()
    with torch.enable_grad():
        latents = backbone.encode(videos.requires_grad_())
    assert latents.dtype == torch.float32
    assert not latents.requires_grad


def test_normalisation_is_undone(case: Case) -> None:
    close(case.backbone._from_vae(case.backbone._to_vae(case.noise)), case.noise)
    assert (case.backbone._to_vae(case.noise) - case.noise).abs().max() > 0.01


def test_clips_that_do_not_divide_are_not_encoded(case: Case) -> None:
    clip = case.family.clip
    for name, change in (("num_frames", (1, 0)), ("height", (0, 1))):
        videos = torch.zeros(1, clip.num_frames + change[0], 3, clip.height + change[1], clip.width)
        with pytest.raises(UserError, match=rf"^clip\.{name}: must be [^\n]*multiple of \d+, got \d+$"):
            case.backbone.encode(videos)


def test_clips_and_prompts_are_encoded_without_a_denoiser(case: Case, tmp_path: Path) -> None:
    folder = tmp_path / "weightless"
    shutil.copytree(case.folder, folder)
    for weights in folder.glob("transformer*/*.safetensors"):
        weights.unlink()
    light, videos = load_backbone(folder, with_denoiser=False), random_videos(case.family.clip)
    assert light.denoiser_parts == case.backbone.denoiser_parts
    assert {weight.device.type for weight in light.denoiser.parameters()} == {"meta"}
    assert (light.device, light.dtype) == (case.backbone.device, case.backbone.dtype)
    assert light.latent_shape(case.family.clip) == case.backbone.latent_shape(case.family.clip)
    close(light.encode(videos), case.backbone.encode(videos))
    close(light.encode_text(PROMPTS).embeds, case.backbone.encode_text(PROMPTS).embeds)


# ---------------------------------------------------------------------------------------------- shapes and noise


def test_clip_that_does_not_divide(case: Case) -> None:
    good, backbone = case.family.clip, case.backbone
    assert case.noise.shape[1:] == backbone.latent_shape(good)
    sizes = {
        "num_frames": ClipSpec(good.num_frames + 1, good.height, good.width, good.fps),
        "height": ClipSpec(good.num_frames, good.height + 1, good.width, good.fps),
        "width": ClipSpec(good.num_frames, good.height, good.width + backbone.spatial_stride // 2, good.fps),
    }
    for name, clip in sizes.items():
        with pytest.raises(UserError, match=rf"^clip\.{name}: [^\n]*multiple of \d+, got {getattr(clip, name)}$"):
            backbone.latent_shape(clip)


def test_noise_is_standard_and_seeded(case: Case) -> None:
    noise = case.backbone.sample_noise(64, case.family.clip, seeded(1))
    assert abs(noise.mean()) < 0.05
    assert abs(noise.std() - 1) < 0.05
    assert torch.equal(noise, case.backbone.sample_noise(64, case.family.clip, seeded(1)))
    assert not torch.equal(noise, case.backbone.sample_noise(64, case.family.clip, seeded(2)))


def test_sigma_grids_fall_and_nest(case: Case) -> None:
    few, many = case.backbone.sigmas(4, 3.0), case.backbone.sigmas(16, 3.0)
    assert many.dtype == torch.float32
    assert many[0] == 1
    assert many[-1] == 0
    assert (many.diff() < 0).all()
    assert torch.equal(few, many[::4])


# ---------------------------------------------------------------------------------------------------------- roles


def test_middle_features_come_with_the_same_velocity(case: Case) -> None:
    role = case.backbone
    if len(role.denoisers) > 1:
        with pytest.raises(UserError, match="has two experts"):
            middle_features(role)
        return
    see, width = middle_features(role)
    velocity, features = see(case.noise, case.sigma, role.encode_text(PROMPTS))
    assert torch.equal(velocity, case.velocity(role))
    _, _, *size = case.noise.shape
    tokens = math.prod(each // patch for each, patch in zip(size, role.patch_size, strict=True))
    assert features.shape == (2, tokens, width)
    network = role.denoiser
    assert not any(module._forward_hooks for module in network.modules())


def disturb(role: PipelineBackbone) -> None:
    generator = seeded(7)
    for weight in role.weights.values():
        weight.add_(0.1 * torch.randn(weight.shape, generator=generator))


def test_only_the_denoiser_trains(case: Case) -> None:
    backbone = case.backbone
    assert all(weight.requires_grad for weight in backbone.denoiser.parameters())
    rest = [part for name, part in backbone.parts.items() if name not in backbone.denoiser_parts]
    frozen = [p for part in rest if isinstance(part, torch.nn.Module) for p in part.parameters()]
    assert frozen
    assert not any(p.requires_grad for p in frozen)


def test_full_role_is_a_denoiser_of_its_own(case: Case, tmp_path: Path) -> None:
    twin = case.backbone.with_own_denoiser()
    for name, part in case.backbone.parts.items():
        assert (twin.parts[name] is part) == (name not in case.backbone.denoiser_parts)
    base = case.velocity(case.backbone)
    close(case.velocity(twin), base, 1e-6)  # alone in its expert's batch, a clip's sums depend on memory alignment
    disturb(twin)
    changed = case.velocity(twin)
    assert (changed - base).abs().max() > 1e-3
    twin.save_role(tmp_path)
    close(case.velocity(case.backbone.load_role(tmp_path)), changed, 2e-6)
    with pytest.raises(UserError, match=f"nowhere: no {case.backbone.denoiser_parts[0]}/ in it"):
        case.backbone.load_denoiser(tmp_path / "nowhere")


def test_lora_role_is_an_adapter_on_the_base(case: Case, tmp_path: Path) -> None:
    backbone = case.backbone.with_own_denoiser()  # adapters stay on the denoiser they were added to
    base = case.velocity(backbone)
    student, teacher = backbone.with_adapter("student", LORA), backbone.with_adapter("teacher", LORA)
    assert torch.equal(case.velocity(student), base)
    disturb(student)
    changed = case.velocity(student)
    assert (changed - base).abs().max() > 1e-3
    assert torch.equal(case.velocity(teacher), base)
    assert torch.equal(case.velocity(backbone), base)
    assert torch.equal(case.velocity(student), changed)

    student.save_role(tmp_path)
    assert torch.equal(case.velocity(case.backbone.with_own_denoiser().load_role(tmp_path)), changed)
    pipeline = load_pipeline(case.folder)
    case.family.load_lora(pipeline, tmp_path)
    theirs = case.family.native_velocity(pipeline, case.noise, case.sigma, PROMPTS)
    close(changed, theirs)


def test_lora_adapts_attention_and_feed_forward(case: Case) -> None:
    adapted = case.backbone.with_own_denoiser().with_adapter("student", LORA).weights
    for name in case.backbone.lora_targets:
        assert any(f".{name}.lora_A." in key for key in adapted), name


def test_checkpointed_blocks_are_recomputed_under_their_own_adapter(case: Case) -> None:
    backbone = case.backbone.with_own_denoiser()
    student, teacher = backbone.with_adapter("student", LORA), backbone.with_adapter("teacher", LORA)
    disturb(student)
    disturb(teacher)

    def gradients() -> list[Tensor]:
        with torch.enable_grad():
            loss = case.velocity(student).square().mean()
        case.velocity(teacher)
        case.velocity(backbone)
        return list(torch.autograd.grad(loss, list(student.weights.values())))

    plain = gradients()
    assert max(float(gradient.abs().max()) for gradient in plain) > 1e-4
    assert backbone.adapters is not None
    for network in backbone.denoisers.values():
        network.enable_gradient_checkpointing(backbone.adapters.checkpointing)
    for ours, theirs in zip(gradients(), plain, strict=True):
        close(ours, theirs)


# ---------------------------------------------------------------------------------------------------------- loading


def copied(case: Case, tmp_path: Path) -> Path:
    return Path(shutil.copytree(case.folder, tmp_path / "model"))


def error_of(folder: Path, backbone: type[PipelineBackbone] | None = None) -> str:
    with pytest.raises(UserError) as caught:
        (backbone.from_pretrained if backbone else load_backbone)(folder)
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


def folders(case: Case) -> list[str]:
    """The components it has: some are optional."""
    return [name for name in type(case.backbone).component_classes() if (case.folder / name).is_dir()]


def test_folder_of_another_family(case: Case) -> None:
    other = next(f.backbone for f in FAMILIES if not set(f.backbone.pipelines) & set(case.backbone.pipelines))
    assert f"is a {type(case.pipeline).__name__} (give one of: {other.pipelines[0]}" in error_of(case.folder, other)


def test_folder_without_a_component(case: Case, tmp_path: Path) -> None:
    folder = copied(case, tmp_path)
    for part in folders(case):
        (folder / part).rename(tmp_path / "aside")
        assert f"model: no {part}/ in it" in error_of(folder)
        (tmp_path / "aside").rename(folder / part)


def test_folder_with_a_damaged_component(case: Case, tmp_path: Path) -> None:
    folder = copied(case, tmp_path)
    for part in folders(case):
        (folder / part).rename(tmp_path / "aside")
        (folder / part).mkdir()
        for file in (tmp_path / "aside").iterdir():
            (folder / part / file.name).write_bytes(file.read_bytes()[:-100])
        assert f"model: cannot load it as a {case.backbone.family} pipeline: {part}/" in error_of(folder)
        shutil.rmtree(folder / part)
        (tmp_path / "aside").rename(folder / part)


@pytest.mark.parametrize("damage", ["wrong shape", "missing"])
def test_weights_that_do_not_fit(case: Case, tmp_path: Path, damage: str) -> None:
    folder = copied(case, tmp_path)
    parts = [name for name, part in case.backbone.parts.items() if isinstance(part, torch.nn.Module)]
    for part in parts:
        path = next((folder / part).glob("*.safetensors"))
        whole = load_file(path)
        name = max(whole)
        rest = {key: weight for key, weight in whole.items() if key != name}
        save_file(rest if damage == "missing" else {**rest, name: torch.cat([whole[name]] * 2)}, path, {"format": "pt"})
        assert f"model: cannot load it as a {case.backbone.family} pipeline: {part}/" in error_of(folder)
        save_file(whole, path, {"format": "pt"})
