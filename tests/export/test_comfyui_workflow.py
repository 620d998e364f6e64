"""The ready workflow: the nodes and links of each kind of model, in both forms that ComfyUI reads."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from rats_video.backbones.stock import StockCall
from rats_video.diffusion.schedule import sigma_grid
from rats_video.export.base import ExportedStudent
from rats_video.export.comfyui_workflow import needs_of, workflow
from rats_video.export.pictures import ExportPictures
from rats_video.inference.student import StudentCard
from rats_video.types import SamplerKind

WAN, LTX = "WanTransformer3DModel", "LTXVideoTransformer3DModel"
HUNYUAN = "HunyuanVideoTransformer3DModel"


def graph(
    base: str,
    kind: str,
    channels: int,
    *,
    is_lora: bool,
    experts: int = 1,
    pipeline: str = "WanPipeline",
    pictures: int = 0,
    image_dim: int | None = None,
    guidance_embeds: bool = False,
    sampler: SamplerKind = "euler",
) -> Any:
    rows = torch.zeros(1, 3, 4, 4)
    picture = ExportPictures(rows, rows if pictures == 2 else None, rows[0])
    card = StudentCard(f"models/{base}", (4,), 3.0, {"num_frames": 81, "height": 480, "width": 832, "fps": 24.0}, 1, 0)
    card = replace(card, sampler=sampler)
    exported = ExportedStudent(
        card=card, base=Path("models") / base, run="mine", pipeline=pipeline,
        networks=dict.fromkeys(("transformer", "transformer_2")[:experts], kind), stock=StockCall(None, {}),
        sigmas={4: tuple(sigma_grid(4, 3.0).tolist())}, boundary=0.875 if experts > 1 else None, is_lora=is_lora,
        prompts=("a red kite",), noises=(), clips=None, pictures=picture if pictures else None,
    )  # fmt: skip
    config = {"_class_name": kind, "out_channels": channels, "image_dim": image_dim, "guidance_embeds": guidance_embeds}
    needs = needs_of(exported, config)
    assert needs is not None
    return workflow(exported, needs, [f"student-{i}.safetensors" for i in range(experts)], 4)


def inputs(made: Any, kind: str) -> list[dict[str, Any]]:
    return [node["inputs"] for node in made.api().values() if node["class_type"] == kind]


def test_a_student_that_renoises_is_sampled_by_lcm() -> None:
    made = graph("Wan2.2-T2V-A14B-Diffusers", WAN, 16, is_lora=True, experts=2, sampler="renoise")
    assert inputs(made, "KSamplerSelect") == [{"sampler_name": "lcm"}]
    first, second = inputs(made, "SamplerCustom")
    assert (first["noise_seed"], second["noise_seed"]) == (0, 1)  # or both draw the same noise
    assert (first["add_noise"], second["add_noise"]) == (True, False)


def test_a_lora_on_wan() -> None:
    made = graph("Wan2.1-T2V-1.3B-Diffusers", WAN, 16, is_lora=True)
    line = "1.00000000, 0.89999998, 0.75000000, 0.50000000, 0.00000000"
    nodes = [
        ("VAELoader", {"vae_name": "wan_2.1_vae.safetensors"}),
        ("UNETLoader", {"unet_name": "wan2.1_t2v_1.3B_fp16.safetensors", "weight_dtype": "default"}),
        ("LoraLoaderModelOnly", {"model": ["2", 0], "lora_name": "student-0.safetensors", "strength_model": 1.0}),
        (
            "CLIPLoader",
            {"clip_name": "umt5_xxl_fp8_e4m3fn_scaled.safetensors", "type": "wan", "device": "default"},
        ),
        ("CLIPTextEncode", {"clip": ["4", 0], "text": "a red kite"}),
        ("CLIPTextEncode", {"clip": ["4", 0], "text": ""}),
        ("EmptyHunyuanLatentVideo", {"width": 832, "height": 480, "length": 81, "batch_size": 1}),
        ("KSamplerSelect", {"sampler_name": "euler"}),
        ("ManualSigmas", {"sigmas": line}),
        (
            "SamplerCustom",
            {
                "model": ["3", 0], "positive": ["5", 0], "negative": ["6", 0], "sampler": ["8", 0], "sigmas": ["9", 0],
                "latent_image": ["7", 0], "add_noise": True, "noise_seed": 0, "cfg": 1.0,
            },
        ),
        ("VAEDecode", {"samples": ["10", 0], "vae": ["1", 0]}),
        ("CreateVideo", {"images": ["11", 0], "fps": 24.0}),
        (
            "SaveVideo",
            {
                "video": ["12", 0], "filename_prefix": "video/Wan2.1-T2V-1.3B-Diffusers-4steps-mine", "format": "auto",
                "codec": "auto",
            },
        ),
    ]  # fmt: skip
    assert made.api() == {
        str(number): {"class_type": kind, "inputs": values} for number, (kind, values) in enumerate(nodes, 1)
    }


def test_two_experts_share_the_levels() -> None:
    made = graph("Wan2.2-T2V-A14B-Diffusers", WAN, 16, is_lora=True, experts=2)
    bases, loras = inputs(made, "UNETLoader"), inputs(made, "LoraLoaderModelOnly")
    assert [each["unet_name"] for each in bases] == [
        "wan2.2_t2v_high_noise_14B_fp16.safetensors", "wan2.2_t2v_low_noise_14B_fp16.safetensors",
    ]  # fmt: skip
    assert [(each["model"], each["lora_name"]) for each in loras] == [
        (["2", 0], "student-0.safetensors"), (["4", 0], "student-1.safetensors"),
    ]  # fmt: skip
    (split,) = inputs(made, "SplitSigmas")
    assert split == {"sigmas": ["11", 0], "step": 2}
    first, second = inputs(made, "SamplerCustom")
    assert (first["model"], first["sigmas"], first["add_noise"], first["latent_image"]) == (
        ["3", 0],
        ["12", 0],
        True,
        ["9", 0],
    )
    assert (second["model"], second["sigmas"], second["add_noise"], second["latent_image"]) == (
        ["5", 0],
        ["12", 1],
        False,
        ["13", 0],
    )
    assert inputs(made, "VAEDecode") == [{"samples": ["14", 0], "vae": ["1", 0]}]


def test_wan_5b_and_whole_students() -> None:
    made = graph("Wan2.2-TI2V-5B-Diffusers", WAN, 48, is_lora=False)
    assert inputs(made, "UNETLoader") == [{"unet_name": "student-0.safetensors", "weight_dtype": "default"}]
    assert inputs(made, "LoraLoaderModelOnly") == []
    assert inputs(made, "VAELoader") == [{"vae_name": "wan2.2_vae.safetensors"}]
    assert inputs(made, "Wan22ImageToVideoLatent") == [
        {"vae": ["1", 0], "width": 832, "height": 480, "length": 81, "batch_size": 1}
    ]


@pytest.mark.parametrize(
    ("pipeline", "checkpoint"),
    [
        ("LTXPipeline", "ltx-video-2b-v0.9.safetensors"),
        ("LTXConditionPipeline", "ltx-video-2b-v0.9.5.safetensors"),
    ],
)
def test_ltx(pipeline: str, checkpoint: str) -> None:
    made = graph("LTX-Video", LTX, 128, is_lora=True, pipeline=pipeline)
    assert inputs(made, "CheckpointLoaderSimple") == [{"ckpt_name": checkpoint}]
    assert inputs(made, "UNETLoader") == []
    assert inputs(made, "LoraLoaderModelOnly")[0]["model"] == ["1", 0]
    assert inputs(made, "VAEDecode")[0]["vae"] == ["1", 2]
    assert inputs(made, "LTXVConditioning") == [{"positive": ["4", 0], "negative": ["5", 0], "frame_rate": 24.0}]
    (sampler,) = inputs(made, "SamplerCustom")
    assert (sampler["positive"], sampler["negative"]) == (["6", 0], ["6", 1])
    assert len(inputs(made, "EmptyLTXVLatentVideo")) == 1


def test_hunyuan_video_has_two_text_encoders_and_is_told_its_guidance() -> None:
    made = graph("HunyuanVideo", HUNYUAN, 16, is_lora=False, pipeline="HunyuanVideoPipeline", guidance_embeds=True)
    assert inputs(made, "DualCLIPLoader") == [
        {
            "clip_name1": "clip_l.safetensors", "clip_name2": "llava_llama3_fp8_scaled.safetensors",
            "type": "hunyuan_video", "device": "default",
        }
    ]  # fmt: skip
    assert inputs(made, "CLIPLoader") == []
    assert inputs(made, "VAELoader") == [{"vae_name": "hunyuan_video_vae_bf16.safetensors"}]
    assert inputs(made, "UNETLoader") == [{"unet_name": "student-0.safetensors", "weight_dtype": "default"}]
    assert inputs(made, "FluxGuidance") == [{"conditioning": ["4", 0], "guidance": 6.0}]
    (sampler,) = inputs(made, "SamplerCustom")
    assert (sampler["positive"], sampler["negative"], sampler["cfg"]) == (["6", 0], ["5", 0], 1.0)
    assert made.api()["7"]["class_type"] == "EmptyHunyuanLatentVideo"


FITTED = {"upscale_method": "bicubic", "width": 832, "height": 480, "crop": "center"}
SIZE = {"width": 832, "height": 480, "length": 81, "batch_size": 1}


def test_wan_from_a_picture_that_its_clip_sees() -> None:
    made = graph("Wan2.1-I2V-14B-480P-Diffusers", WAN, 16, is_lora=True, pictures=1, image_dim=1280)
    stem = "Wan2.1-I2V-14B-480P-Diffusers-4steps-mine"
    assert inputs(made, "LoadImage") == [{"image": f"{stem}-picture.png"}]
    assert inputs(made, "ImageScale") == [{"image": ["7", 0], **FITTED}]
    assert inputs(made, "CLIPVisionLoader") == [{"clip_name": "clip_vision_h.safetensors"}]
    assert inputs(made, "CLIPVisionEncode") == [{"clip_vision": ["9", 0], "image": ["8", 0], "crop": "center"}]
    assert inputs(made, "WanImageToVideo") == [
        {
            "positive": ["5", 0], "negative": ["6", 0], "vae": ["1", 0], "start_image": ["8", 0],
            "clip_vision_output": ["10", 0], **SIZE,
        }
    ]  # fmt: skip
    (sampler,) = inputs(made, "SamplerCustom")
    assert (sampler["positive"], sampler["negative"], sampler["latent_image"]) == (["11", 0], ["11", 1], ["11", 2])
    assert inputs(made, "EmptyHunyuanLatentVideo") == []


def test_wan_from_a_first_picture_to_a_last() -> None:
    made = graph("Wan2.2-I2V-A14B-Diffusers", WAN, 16, is_lora=False, experts=2, pictures=2)
    assert [each["image"].rpartition("-")[2] for each in inputs(made, "LoadImage")] == [
        "picture.png", "last_picture.png",
    ]  # fmt: skip
    assert inputs(made, "CLIPVisionEncode") == []
    (node,) = inputs(made, "WanFirstLastFrameToVideo")
    assert (node["start_image"], node["end_image"]) == (["8", 0], ["10", 0])


def test_the_picture_of_models_that_hold_it() -> None:
    made = graph("Wan2.2-TI2V-5B-Diffusers", WAN, 48, is_lora=True, pictures=1)
    assert inputs(made, "Wan22ImageToVideoLatent") == [{"vae": ["1", 0], "start_image": ["8", 0], **SIZE}]
    made = graph("LTX-Video", LTX, 128, is_lora=True, pipeline="LTXImageToVideoPipeline", pictures=1)
    assert inputs(made, "LTXVImgToVideo") == [
        {"positive": ["4", 0], "negative": ["5", 0], "vae": ["1", 2], "image": ["7", 0], **SIZE, "strength": 1.0}
    ]
    assert inputs(made, "LTXVConditioning") == [{"positive": ["8", 0], "negative": ["8", 1], "frame_rate": 24.0}]
    assert inputs(made, "SamplerCustom")[0]["latent_image"] == ["8", 2]


def test_the_page_shows_the_same_graph() -> None:
    made = graph("Wan2.2-T2V-A14B-Diffusers", WAN, 16, is_lora=False, experts=2)
    page, api = made.page(), made.api()
    nodes = {node["id"]: node for node in page["nodes"]}
    assert {number: node["type"] for number, node in nodes.items()} == {
        int(number): node["class_type"] for number, node in api.items()
    }
    for link, origin, slot, target, place, kind in page["links"]:
        output, taken = nodes[origin]["outputs"][slot], nodes[target]["inputs"][place]
        assert (output["type"], taken["type"], taken["link"]) == (kind, kind, link)
        assert link in output["links"]
        assert api[str(target)]["inputs"][taken["name"]] == [str(origin), slot]
    assert page["last_link_id"] == len(page["links"]) == sum(len(node["inputs"]) for node in nodes.values())
    widgets = [node["widgets_values"] for node in nodes.values() if node["type"] == "SamplerCustom"]
    assert widgets == [[True, 0, "fixed", 1.0], [False, 0, "fixed", 1.0]]
    assert len({tuple(node["pos"]) for node in nodes.values()}) == len(nodes)
