"""Each form of a student, loaded as its users load it, gives our sampler's clips; on tiny pipelines of each family."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import diffusers
import pytest
import torch
from cogvideox_family import COGVIDEOX_FAMILIES
from family import Family
from flux2_family import FLUX2
from flux_family import FLUX
from hunyuan_family import HUNYUAN
from ltx_family import LTX_095, LTX_FAMILIES
from qwen_image_family import QWEN_IMAGE
from safetensors import safe_open
from safetensors.torch import load_file
from sd3_family import SD3
from torch import Tensor
from wan22_family import WAN22_FAMILIES
from wan_family import WAN

from rats_video.backbones.compute import LoraConfig
from rats_video.backbones.image import pack
from rats_video.backbones.kinds import load_backbone
from rats_video.commands.export_clips import SEED
from rats_video.commands.export_model import ExportRequest, run_export_model
from rats_video.commands.students import load_student
from rats_video.diffusion.rollout import rollout
from rats_video.diffusion.schedule import sigma_grid
from rats_video.errors import UserError
from rats_video.inference.sampler import SamplerSpec, clip_noise, sample_videos
from rats_video.inference.student import StudentCard, save_student
from rats_video.seeds import seeded

IMAGES = (FLUX, SD3, QWEN_IMAGE, FLUX2)
FAMILIES = (WAN, WAN22_FAMILIES[1], LTX_FAMILIES[1], LTX_095, HUNYUAN, *COGVIDEOX_FAMILIES[1:], *IMAGES)
SHIFT, GUIDANCE = 2.0, 4.5
PROMPT = "a fast red circle moving left on a gray background"
CPU = torch.device("cpu")
LORA = LoraConfig(kind="lora", rank=2, alpha=6)


class Case(NamedTuple):
    """A family's base folder and a student of each kind on it."""

    family: Family
    base: Path
    students: dict[str, Path]

    def card(self) -> StudentCard:
        clip = self.family.clip
        size = {"num_frames": clip.num_frames, "height": clip.height, "width": clip.width, "fps": clip.fps}
        return StudentCard(str(self.base), (2, 4), SHIFT, size, steps=7, seed=3, embedded_guidance=GUIDANCE)


@pytest.fixture(scope="module", params=FAMILIES, ids=lambda family: family.name)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    folder = tmp_path_factory.mktemp("export")
    case = Case(request.param, folder / "base-model", {"lora": folder / "lora", "full": folder / "full"})
    case.family.build(case.base)
    backbone = load_backbone(case.base)
    for kind in ("full", "lora"):  # adapters stay on the base's denoiser
        role = backbone.with_own_denoiser() if kind == "full" else backbone.with_adapter("student", LORA)
        generator = seeded(7)
        with torch.no_grad():
            for weight in role.weights.values():
                weight.add_(0.05 * torch.randn(weight.shape, generator=generator))
        save_student(role, case.card(), case.students[kind])
    return case


@pytest.fixture(scope="module")
def exported(case: Case, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """`exported(kind, weights)`: the folder of that export, made once and compared with our sampler."""

    @functools.cache
    def export(kind: str, weights: str, scale: float = 1.0) -> Path:
        output = tmp_path_factory.mktemp("exported") / f"{kind}-{weights}"
        order = ExportRequest(kind, str(case.students[weights]), scale=scale, output=output, num_clips=1)
        run_export_model(order, "cpu")
        return output

    return export


class Sampled(NamedTuple):
    """Our sampler's clip, its noise and noise levels; and the base's clip from there."""

    videos: Tensor
    noise: Tensor
    sigmas: Tensor
    base: Tensor


@pytest.fixture(scope="module")
def ours(case: Case) -> Callable[[str], Sampled]:
    """`ours(weights)`: sampled once."""

    @functools.cache
    @torch.no_grad()
    def sample(weights: str) -> Sampled:
        loaded = load_student(case.students[weights], CPU)
        student = loaded.student
        noise = clip_noise(student, loaded.clip, SEED, 0)
        spec = SamplerSpec(4, SHIFT)
        (samples,) = sample_videos(student, [PROMPT], loaded.clip, spec, seed=SEED)
        (base,) = sample_videos(loaded.base, [PROMPT], loaded.clip, spec, seed=SEED)
        return Sampled(samples.videos, noise, student.sigmas(4, SHIFT), base.videos)

    return sample


def stock(folder: Path) -> Any:
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.mark.parametrize("weights", ["full", "lora"])
@torch.no_grad()
def test_stock_pipeline_samples_the_folder(case: Case, exported: Any, ours: Any, weights: str) -> None:
    """Called without our help: the scheduler's configuration alone gives our noise levels, but for CogVideoX."""
    videos, noise, sigmas, base = ours(weights)
    pipeline = stock(exported("diffusers", weights))
    size = {name: getattr(case.family.clip, name) for name in ("num_frames", "height", "width")}
    if "cogvideox" in case.family.name:
        (timesteps,) = re.findall(r"timesteps=(\[.*?\])", (exported("diffusers", weights) / "README.md").read_text())[
            :1
        ]
        call = {"latents": noise.transpose(1, 2), "timesteps": json.loads(timesteps), "guidance_scale": 1.0}
        theirs = pipeline(PROMPT, output_type="pt", **call, **size).frames
    elif case.family is LTX_095:  # which draws its own noise: run_export_model has compared it
        assert type(pipeline).__name__ == "LTXConditionPipeline"
        return
    elif "hunyuan" in case.family.name:
        call = {"latents": noise, "num_inference_steps": 4, "guidance_scale": GUIDANCE}
        theirs = pipeline(PROMPT, output_type="pt", **call, **size).frames
    elif case.family is FLUX:
        call = {"latents": pack(noise), "num_inference_steps": 4, "guidance_scale": GUIDANCE}
        del size["num_frames"]
        theirs = pipeline(PROMPT, output_type="pt", **call, **size).images[:, None]
    else:
        native = case.family.native_sample(pipeline, noise, [PROMPT], 4)
        torch.testing.assert_close(native.sigmas.float(), sigmas, atol=1e-6, rtol=0)
        theirs = native.videos
    torch.testing.assert_close(theirs, videos, atol=1e-5, rtol=0)
    assert (theirs - base).abs().max() > 1e-3


@pytest.mark.parametrize("kind", ["diffusers", "lora", "merged"])
@torch.no_grad()
def test_our_own_sampler_takes_an_export_back(case: Case, exported: Any, ours: Any, kind: str) -> None:
    is_whole = kind == "diffusers" and "cogvideox" not in case.family.name  # which is told its levels by the base
    again = load_student(exported(kind, "lora"), CPU, None if is_whole else case.base)
    assert (again.card.num_steps, again.card.shift) == ((2, 4), SHIFT)
    (samples,) = sample_videos(again.student, [PROMPT], again.clip, again.spec(4), seed=SEED)
    torch.testing.assert_close(samples.videos, ours("lora").videos, atol=1e-5, rtol=0)


def test_tokenizer_that_the_base_names_wrongly_is_named_rightly(case: Case, exported: Any) -> None:
    index = json.loads((exported("diffusers", "lora") / "model_index.json").read_text())
    listed = json.loads((case.base / "model_index.json").read_text())["tokenizer"]
    wrong = "hunyuan" in case.family.name  # LlamaTokenizerFast drops the spaces of a byte-level one
    assert index["tokenizer"] == (["transformers", "PreTrainedTokenizerFast"] if wrong else listed)
    line = "    tokenizer=PreTrainedTokenizerFast.from_pretrained("
    assert (line in (exported("merged", "lora") / "README.md").read_text()) == wrong


def test_any_trained_step_count_is_in_the_folder(case: Case, exported: Any) -> None:
    if "cogvideox" in case.family.name or case.family is LTX_095:
        pytest.skip("its timesteps are an argument of the call")
    folder = exported("diffusers", "full")
    scheduler = stock(folder).scheduler
    if isinstance(scheduler, diffusers.FlowMapEulerDiscreteScheduler):
        scheduler.set_timesteps(2)
    else:  # LTXPipeline and HunyuanVideoPipeline pass these
        scheduler.set_timesteps(sigmas=[1.0, 0.5])
    torch.testing.assert_close(scheduler.sigmas.float(), sigma_grid(2, SHIFT))


@pytest.mark.parametrize(("kind", "weights"), [("lora", "lora"), ("merged", "full")])
@torch.no_grad()
def test_snippet_of_the_card_runs(
    case: Case, exported: Any, kind: str, weights: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """What it samples is ours from the same seed, as far as eight bits a pixel tell."""
    folder = exported(kind, weights)
    of_t5 = case.family.name.startswith(("ltx", "cogvideox"))  # which have no tokenizer.json
    peft = " peft" if kind == "lora" else ""
    line = f"\npip install 'diffusers>=0.42' 'transformers>=5.22' accelerate{' sentencepiece protobuf' * of_t5}{peft}\n"
    assert line in (folder / "README.md").read_text()
    monkeypatch.chdir(folder.parent)
    (code,) = re.findall(r"```python\n(.*?)\n```", (folder / "README.md").read_text(), re.DOTALL)
    found: dict[str, Any] = {}
    name = "image.png" if case.family in IMAGES else "clip.webp"
    exec(compile(code.replace(f'"{name}"', repr(str(tmp_path / name))), "card", "exec"), found)
    assert (tmp_path / name).stat().st_size > 100
    made = [found["images"]] if case.family in IMAGES else found["frames"]
    frames = torch.stack([torch.frombuffer(bytearray(f.tobytes()), dtype=torch.uint8) for f in made])
    loaded = load_student(case.students[weights], CPU)
    noise = torch.Generator().manual_seed(0)
    if "cogvideox" in case.family.name:  # it draws [B, F, C, H, W]
        shape = loaded.student.latent_shape(loaded.clip)
        start = torch.randn(1, shape[1], shape[0], *shape[2:], generator=noise).transpose(1, 2)
    else:
        start = loaded.student.sample_noise(1, loaded.clip, noise)
    student = loaded.student
    path = rollout(student.velocity, start, student.sigmas(4, SHIFT), student.encode_text([PROMPT]))
    expected = (student.decode(path.x0)[0].permute(0, 2, 3, 1) * 255).flatten(1)
    assert frames.shape == expected.shape
    if "ltx" not in case.family.name:  # whose VAE adds noise, there of the caller's generator
        assert (frames - expected).abs().max() < 1.1


# -------------------------------------------------------------------------------------------------------------- scale


@pytest.mark.parametrize("weights", ["full", "lora"])
def test_scale_runs_from_the_base_to_the_student(case: Case, exported: Any, weights: str) -> None:
    parts = sorted(path.name for path in case.base.glob("transformer*"))
    for part in parts:
        base, none, half, whole = (
            {name: weight for file in (folder / part).glob("*.safetensors") for name, weight in load_file(file).items()}
            for folder in (case.base, *(exported("merged", weights, scale) for scale in (0.0, 0.5, 1.0)))
        )
        assert base.keys() == none.keys() == half.keys() == whole.keys()
        for name, weight in base.items():
            assert torch.equal(none[name], weight)
            torch.testing.assert_close(half[name], (weight + whole[name]) / 2, atol=1e-6, rtol=0)
        assert max(float((whole[name] - weight).abs().max()) for name, weight in base.items()) > 1e-2


# --------------------------------------------------------------------------------------------------------------- lora


def test_lora_says_how_to_sample_it(case: Case, exported: Any) -> None:
    folder = exported("lora", "lora")
    experts = ("-high-noise", "-low-noise") if "a14b" in case.family.name else ("",)
    files = [folder / f"pytorch_lora_weights{expert}.safetensors" for expert in experts]
    assert sorted(folder.glob("*.safetensors")) == files
    there = load_file(case.students["lora"] / "pytorch_lora_weights.safetensors")
    for file, part in zip(files, ("transformer", "transformer_2"), strict=False):
        tensors = load_file(file)
        assert tensors.keys() == {key.replace(part, "transformer", 1) for key in there if key.startswith(f"{part}.")}
        for key in tensors:  # alpha / rank is in B, for who reads no header
            factor = 3 if ".lora_B." in key else 1
            assert torch.equal(tensors[key], factor * there[key.replace("transformer", part, 1)])
    with safe_open(files[-1], "pt") as file:
        header = file.metadata()
    adapter = json.loads(header["lora_adapter_metadata"])
    assert (adapter["transformer.r"], adapter["transformer.lora_alpha"]) == (2, 2)
    about = json.loads(header["rats_video"])
    assert about["base_model"] == "base-model"  # and no path of ours
    assert about["sigmas"]["4"] == load_backbone(case.base).sigmas(4, SHIFT).tolist()
    clip = case.family.clip
    assert about["clip"] == {"num_frames": clip.num_frames, "height": clip.height, "width": clip.width, "fps": clip.fps}
    assert (about["shift"], about["guidance_scale"], about["training_steps"]) == (SHIFT, 1.0, 7)


# ------------------------------------------------------------------------------------------------------------ comfyui


def test_what_comfyui_cannot_load_is_refused(case: Case, exported: Any) -> None:
    """The rest is in test_comfyui.py."""
    if "ltx" in case.family.name:
        pytest.skip("its sizes are in the file's header")
    if case.family in (FLUX, SD3, QWEN_IMAGE):
        reason = r".*config.json: ComfyUI takes a \w+ under diffusers' names, so it has no file of its own \("
    elif case.family is FLUX2 or case.family.name.startswith("cogvideox"):
        reason = r".*config.json: no names are known here for the weights of a \w+ but"
    else:
        reason = r".*attention_head_dim 8 \(not 128\)"
    with pytest.raises(UserError, match=rf"^--format comfyui: {reason}"):
        exported("comfyui", "full")


# ---------------------------------------------------------------------------------------------------------- quantised


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_quantised_blocks_load_without_pickle(case: Case, exported: Any, kind: str) -> None:
    if case.family not in ((WAN, HUNYUAN) if kind == "int8" else (WAN,)):
        pytest.skip("the same path")
    folder = exported(kind, "lora")
    assert not [path for path in folder.rglob("*") if path.suffix in {".bin", ".pt", ".pth", ".pkl"}]
    network = stock(folder).transformer
    weights = dict(network.named_parameters())
    kinds = {
        name: type(weight).__name__ for name, weight in weights.items() if "Parameter" not in type(weight).__name__
    }
    assert set(kinds.values()) == {"Int8Tensor" if kind == "int8" else "Float8Tensor"}
    assert all("blocks." in name for name in kinds)
    linears = [n for n, m in network.named_modules() if isinstance(m, torch.nn.Linear) and "blocks." in n]
    assert len(kinds) > 0.6 * len(linears)
    text = (folder / "README.md").read_text()
    assert re.search(r"denoiser: \d+\.\d MiB before, \d+\.\d MiB after", text)
    assert re.search(r"1 clip from the same noise: .*PSNR \d+\.\d dB", text)
    again = load_student(folder, CPU)  # rats-video samples it too, with the matrices that diffusers has
    assert again.card.num_steps == case.card().num_steps
    for name in kinds:
        layer = again.student.denoiser.get_submodule(name.removesuffix(".weight"))
        torch.testing.assert_close(layer.matrix(torch.float32), weights[name].dequantize())


# ------------------------------------------------------------------------------------------------------------ folders


def test_big_files_are_linked_and_small_ones_copied(case: Case, exported: Any) -> None:
    folder = exported("diffusers", "full")
    weights, config = (next((case.base / "vae").glob(f"*.{end}")) for end in ("safetensors", "json"))
    assert (folder / "vae" / weights.name).samefile(weights)
    assert not (folder / "vae" / config.name).samefile(config)
    assert not list(folder.parent.glob(".*"))  # nothing half-made beside it


def test_a_student_is_not_changed_by_being_exported(case: Case, exported: Any) -> None:
    before = replace(case.card())
    exported("merged", "lora")
    loaded = load_student(case.students["lora"], CPU)
    assert loaded.card == before
    assert loaded.student.adapters is not None
