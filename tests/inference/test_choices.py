"""What a user chooses of a model that is sampled: its size, LoRAs beside it, a plain pipeline, a small GPU."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import wan22_family
from cogvideox_family import COGVIDEOX_FAMILIES
from family import Family
from hunyuan_family import HUNYUAN
from ltx_family import LTX_FAMILIES
from safetensors.torch import load_file, save_file
from shared import made_once
from torch import Tensor
from wan22_family import WAN22_FAMILIES

from rats_video.assets import ASSETS
from rats_video.backbones.compute import LoraConfig
from rats_video.backbones.kinds import load_backbone
from rats_video.backbones.lora import LORA_FILE
from rats_video.backbones.wan import WanBackbone
from rats_video.commands.sample import identity
from rats_video.commands.students import LoadedStudent, SampleChoices, load_chosen, load_student
from rats_video.datasets.shapes.render import SHAPES_CLIP
from rats_video.errors import UserError
from rats_video.export.comfyui import PREFIX, original_name
from rats_video.inference.plain import plain_card
from rats_video.inference.sampler import clip_noise, sample_batch
from rats_video.inference.student import StudentCard, save_student
from rats_video.inference.style import Style, add_style

pytestmark = pytest.mark.pipeline

CPU = torch.device("cpu")
CLIP = {"num_frames": 5.0, "height": 32.0, "width": 32.0, "fps": 8.0}
PROMPT = "a red circle"


def shaken(role: Any, seed: int) -> Any:
    with torch.no_grad():
        for weight in role.weights.values():
            weight.add_(0.05 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(seed)))
    return role


@pytest.fixture(scope="module")
def students(loaded: WanBackbone, tiny_wan: Path, tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    folder, lora = tmp_path_factory.mktemp("students"), LoraConfig(kind="lora", rank=2, alpha=6)
    for name, role in {"lora": loaded.with_own_denoiser().with_adapter("student", lora),
                       "full": loaded.with_own_denoiser()}.items():  # fmt: skip
        save_student(shaken(role, 1), StudentCard(str(tiny_wan), (2,), 3.0, CLIP, steps=1, seed=0), folder / name)
    return {name: folder / name for name in ("lora", "full")}


@pytest.fixture(scope="module")
def style(loaded: WanBackbone, tmp_path_factory: pytest.TempPathFactory) -> Path:
    role = loaded.with_own_denoiser().with_adapter(
        "s", LoraConfig(kind="lora", rank=3, alpha=6, targets=("to_q", "to_k"))
    )
    folder = tmp_path_factory.mktemp("style")
    shaken(role, 2).save_role(folder)
    return folder / LORA_FILE


def clip_of(loaded: LoadedStudent) -> Tensor:
    noise = clip_noise(loaded.student, loaded.clip, 0, 0)
    return sample_batch(loaded.student, [PROMPT], noise, loaded.spec(2))[0]


# --------------------------------------------------------------------------------------------------------------- size


def test_another_size_is_sampled_and_told(students: Mapping[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    size = {"num_frames": 9, "width": 48}
    chosen = load_chosen(students["full"], CPU, SampleChoices(size=size))
    assert clip_of(chosen).shape == (1, 9, 3, 32, 48)
    assert capsys.readouterr().err == (
        "warning: --num-frames 9 --width 48: this student was trained at 5 frames of 32 x 32; quality may drop\n"
    )
    assert identity(chosen) != identity(load_student(students["full"], CPU))
    load_chosen(students["full"], CPU, SampleChoices(size={"height": 32}))
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ({"num_frames": 6}, "--num-frames: must be 1 + a multiple of 4"),
        ({"height": 40}, "--height: must be a multiple of 16"),
        ({"width": 2**28}, f"--width {2**28}: too large: 5 frames of 32 x {2**28} are over"),
    ],
)
def test_sizes_that_it_cannot_make(students: Mapping[str, Path], size: dict[str, int], expected: str) -> None:
    with pytest.raises(UserError) as caught:
        load_chosen(students["full"], CPU, SampleChoices(size=size))
    assert str(caught.value).startswith(expected)


# -------------------------------------------------------------------------------------------------------------- LoRAs


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_a_lora_is_added_as_often_as_asked(students: Mapping[str, Path], style: Path, kind: str) -> None:
    """W + student + scale * alpha / rank * B A, whatever the student is."""
    plain = load_student(students[kind], CPU).student.parts["transformer"].state_dict()
    both = load_chosen(students[kind], CPU, SampleChoices(styles=(Style(style, 0.5), Style(style, 0.25))))
    state, tensors = both.student.parts["transformer"].state_dict(), load_file(style)
    changed = {name for name, weight in state.items() if not torch.equal(weight, plain[name])}
    assert len(changed) == len(tensors) // 2
    for name in changed:
        layer = name.removesuffix(".weight").removesuffix(".base_layer")
        a, b = (tensors[f"transformer.{layer}.lora_{x}.weight"] for x in "AB")
        torch.testing.assert_close(state[name], plain[name] + 0.75 * 6 / 3 * b @ a, atol=1e-6, rtol=0)
    assert (clip_of(both) - clip_of(load_student(students[kind], CPU))).abs().max() > 1e-3
    once = load_chosen(students[kind], CPU, SampleChoices(styles=(Style(style, 0.5),)))
    assert len({identity(each) for each in (both, once, load_student(students[kind], CPU))}) == 3


def test_a_file_under_the_original_names_does_as_well(loaded: WanBackbone, style: Path, tmp_path: Path) -> None:
    named = {
        PREFIX + original_name(loaded, key.removeprefix("transformer.")): value
        for key, value in load_file(style).items()
    }
    alphas = {key.replace("lora_A.weight", "alpha"): torch.tensor(6.0) for key in named if "lora_A" in key}
    save_file(named | alphas, tmp_path / "style.safetensors")
    ours, theirs = loaded.with_own_denoiser(), loaded.with_own_denoiser()
    add_style(ours, Style(style))
    add_style(theirs, Style(tmp_path / "style.safetensors"))
    for name, weight in ours.weights.items():
        torch.testing.assert_close(theirs.weights[name], weight, atol=1e-6, rtol=0)


def test_each_expert_takes_its_own(tmp_path_factory: pytest.TempPathFactory, tmp_path: Path) -> None:
    family = WAN22_FAMILIES[1]
    base = load_backbone(made_once(tmp_path_factory, family.name, family.build))
    role = base.with_own_denoiser().with_adapter("s", LoraConfig(kind="lora", rank=2, alpha=2))
    adapters = shaken(role, 2).adapters
    for name in ("x_low_noise", "x-HighNoise", "x"):
        adapters.write("s", tmp_path / f"{name}.safetensors", {"transformer": "transformer"})
    adapters.write("s", tmp_path / "both.safetensors", {part: part for part in ("transformer", "transformer_2")})
    both = {"transformer", "transformer_2"}
    for name, parts in {
        "x_low_noise": {"transformer_2"},
        "x-HighNoise": {"transformer"},
        "x": both,
        "both": both,
    }.items():
        model = base.with_own_denoiser()
        add_style(model, Style(tmp_path / f"{name}.safetensors"))
        before = base.weights
        assert {
            key.split(".")[0] for key, weight in model.weights.items() if not torch.equal(weight, before[key])
        } == parts


def test_loras_that_are_none(loaded: WanBackbone, style: Path, tmp_path: Path) -> None:
    def refused(expected: str, **tensors: Tensor) -> None:
        save_file(tensors, tmp_path / "file.safetensors")
        with pytest.raises(UserError) as caught:
            add_style(loaded.with_own_denoiser(), Style(tmp_path / "file.safetensors"))
        assert expected in str(caught.value)

    good = load_file(style)
    refused("holds nothing for a WanTransformer3DModel", a=torch.zeros(1))
    refused("was trained on another model: this one has no blocks.7.attn1.to_k",
            **{key.replace("blocks.0", "blocks.7"): value for key, value in good.items()})  # fmt: skip
    refused(
        "channels there, ",
        **{key: torch.cat([value, value], dim=-1 if "_A" in key else 0) for key, value in good.items()},
    )
    (tmp_path / "file.safetensors").write_text("no tensors")
    with pytest.raises(UserError, match="diffusers cannot read it as a LoRA"):
        add_style(loaded.with_own_denoiser(), Style(tmp_path / "file.safetensors"))


def test_a_files_name_may_hold_a_colon(style: Path, tmp_path: Path) -> None:
    odd = shutil.copy(style, tmp_path / "a:2")
    assert Style.parse(str(odd)) == Style(Path(odd))
    assert Style.parse(f"{odd}:-.5") == Style(Path(odd), -0.5)
    with pytest.raises(UserError, match=r"^--lora: no such file: .*/gone \(give FILE or FILE:SCALE\)"):
        Style.parse(f"{tmp_path}/gone:0.5")


# ---------------------------------------------------------------------------------------------- plain pipelines, tiles


@pytest.mark.parametrize(
    "family", [WAN22_FAMILIES[0], LTX_FAMILIES[1], HUNYUAN, COGVIDEOX_FAMILIES[1]], ids=lambda f: f.name
)
def test_a_plain_pipeline_is_sampled_as_its_own_would(
    family: Family, tmp_path_factory: pytest.TempPathFactory, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, clip = made_once(tmp_path_factory, family.name, family.build), family.clip
    size = {"num_frames": clip.num_frames, "height": clip.height, "width": clip.width}
    choose: Callable[..., LoadedStudent] = lambda **more: load_chosen(folder, CPU, SampleChoices(size=size, **more))  # noqa: E731
    plain = choose()
    assert capsys.readouterr().err.count("quality may drop") == 0
    guided = {"wan": 5.0, "ltx": 3.0, "hun": 1.0, "cog": 6.0}[family.name[:3]]
    assert (plain.card.guidance_scale, plain.card.num_steps) == (guided, (50,))
    assert plain.default_nfe == (50 if guided == 1 else 100)
    if family in WAN22_FAMILIES:
        assert plain.card.shift == wan22_family.SHIFT  # UniPC's `flow_shift`
    noise, spec = clip_noise(plain.student, plain.clip, 0, 0), plain.spec(2)
    assert f"--nfe 2: this pipeline takes {plain.default_nfe}; quality may drop" in capsys.readouterr().err
    videos, _ = sample_batch(plain.student, [PROMPT], noise, spec)
    offloaded = choose(offload=True, tiles=True)  # as small as one tile: the same pixels
    again, _ = sample_batch(offloaded.student, [PROMPT], noise, spec)
    torch.testing.assert_close(again, videos, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("extra", "clip"), [({}, (81, 480, 832, 16)), ({"expand_timesteps": True}, (121, 704, 1280, 24))]
)
def test_a_plain_wan_has_its_authors_clip(tmp_path: Path, extra: dict[str, Any], clip: tuple[int, ...]) -> None:
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "WanPipeline", **extra}))
    card = plain_card(tmp_path, "bfloat16")
    assert tuple(card.clip[key] for key in ("num_frames", "height", "width", "fps")) == clip


@pytest.mark.parametrize(("patch", "clip"), [(None, (9, 64, 96, 8)), (2, (81, 768, 1360, 16))])
def test_a_plain_cogvideox_has_its_own_clip_and_15_its_authors(
    tmp_path: Path, patch: int | None, clip: tuple[int, ...]
) -> None:
    config = {"patch_size_t": patch, "sample_frames": 9, "sample_height": 8, "sample_width": 12}
    (tmp_path / "transformer").mkdir()
    (tmp_path / "transformer" / "config.json").write_text(json.dumps(config))
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "CogVideoXPipeline"}))
    card = plain_card(tmp_path, "bfloat16")
    assert tuple(card.clip[key] for key in ("num_frames", "height", "width", "fps")) == clip


def test_a_model_of_ours_is_sampled_as_it_was_trained() -> None:
    embedded = load_chosen(ASSETS / "tiny-wan", CPU, SampleChoices())
    assert (embedded.clip, embedded.card.guidance_scale, embedded.card.shift) == (SHAPES_CLIP, 2.0, 3.0)
    with pytest.raises(UserError, match=r"^--num-frames: must be 1 \+ a multiple of 4, got 16 \(take 13 or 17\)$"):
        load_chosen(ASSETS / "tiny-wan", CPU, SampleChoices(size={"num_frames": 16}))


def test_a_negative_prompt_leads_away_where_there_is_guidance(students: Mapping[str, Path]) -> None:
    away = SampleChoices(negative_prompt="a slow blue square moving up on a white background")
    model, without = (load_chosen(ASSETS / "tiny-wan", CPU, choices) for choices in (away, SampleChoices()))
    assert model.spec(4) == replace(without.spec(4), negative_prompt=away.negative_prompt)
    assert identity(model) != identity(without)  # of a folder that is gone on with
    with pytest.raises(UserError, match=r"^--negative-prompt: this model does not know 'zebra'"):
        load_chosen(ASSETS / "tiny-wan", CPU, SampleChoices(negative_prompt="zebra"))
    with pytest.raises(UserError, match=r"^--negative-prompt: is for models that are sampled with guidance"):
        load_chosen(students["full"], CPU, away)


def test_guidance_is_chosen_where_there_is_any(students: Mapping[str, Path], tmp_path: Path) -> None:
    model, own = (load_chosen(ASSETS / "tiny-wan", CPU, SampleChoices(guidance_scale=s)) for s in (5.0, None))
    assert model.spec(4) == replace(own.spec(4), guidance_scale=5.0)
    assert identity(model) != identity(own)  # of a folder that is gone on with
    with pytest.raises(UserError, match=r"^--guidance-scale: is for models that are sampled with guidance"):
        load_chosen(students["full"], CPU, SampleChoices(guidance_scale=5.0))
    with pytest.raises(UserError, match=r"^--guidance-scale-2: this Wan has no second expert \(leave it out\)$"):
        load_chosen(ASSETS / "tiny-wan", CPU, SampleChoices(guidance_scale_2=3.0))
    wan22_family.build(tmp_path / "a14b", experts=True)
    small = {"num_frames": 5, "height": 64, "width": 64}
    scales = SampleChoices(size=small, guidance_scale=4.0, guidance_scale_2=3.0)
    two = load_chosen(tmp_path / "a14b", CPU, scales)
    assert (two.spec(4).guidance_scale, two.spec(4).guidance_scale_2) == (4.0, 3.0)


def test_tiles_are_blended_into_about_the_same_clip(students: Mapping[str, Path]) -> None:
    size = {"height": 64, "width": 64}
    whole = load_chosen(students["full"], CPU, SampleChoices(size=size))
    tiled = load_chosen(students["full"], CPU, SampleChoices(size=size, tiles=True))
    tiled.student.vae.enable_tiling(32, 32, 16, 16)
    difference = (clip_of(tiled) - clip_of(whole)).abs()
    assert 0 < difference.mean() < 0.1
    assert identity(tiled) != identity(whole)
