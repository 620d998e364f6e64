"""The plan and its parts: what is counted of an operator, parameters of real models, FLOPs by hand, levers."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from rats_video.backbones.architecture import find_architecture, preset_names, read_preset
from rats_video.config.load import load_config
from rats_video.datasets.prompts.split import load_prompts
from rats_video.distillation.roles import build_backbone, build_roles
from rats_video.distillation.settings import DistillConfig
from rats_video.errors import UserError
from rats_video.planning.devices import GPUS, Device, find_device
from rats_video.planning.estimate import Plan, guard_seconds
from rats_video.planning.memory_options import MemoryOption, cheapest, useful_options, without_conflicts
from rats_video.planning.memory_tracker import MemoryTracker
from rats_video.planning.runs import PlanBuilder
from rats_video.planning.trace import DENOISER, TRAINED, at_full_depth
from rats_video.rewards.reward import reward_on_meta
from rats_video.training.plan_check import PlanCheck, compared

pytestmark = pytest.mark.pipeline

CPU = Device("cpu", 0, 0.1, 0.1, 0.1, 0.5)
LORA = ("student.weights.kind=lora", "student.weights.rank=4")
MakeConfig = Callable[..., DistillConfig]


def planned(cfg: DistillConfig, device: Device = CPU, gpus: int = 1) -> Plan:
    return PlanBuilder(cfg, device, gpus).plan(cfg, device)


# ---------------------------------------------------------------------------------------------------------- memory


CHECKPOINTS = ("compute.activation_checkpointing=true", "compute.decode.checkpoint=true")


def test_saved_tensors_count_until_they_are_used() -> None:
    ledger = MemoryTracker()
    weight = torch.empty(100, 100, device="meta", requires_grad=True)
    ledger.own("weights", [weight])
    with ledger:
        ledger.enter_phase("forward")
        hidden = (weight @ weight).relu()
        ledger.enter_phase("backward")
        ledger.backward(hidden.sum())
        ledger.enter_phase("after")
    assert ledger.phases["forward"].peak == {"weights": 40_000, "forward": 80_000}  # product and relu
    assert ledger.phases["forward"].flops == 2 * 100**3
    assert ledger.phases["backward"].flops == 4 * 100**3
    assert ledger.phases["after"].start == {"weights": 40_000, "forward": 40_000, "backward": 40_000}  # + gradient


def test_attention_stores_no_square_and_is_computed_again_when_checkpointed() -> None:
    tokens = torch.empty(1, 2, 1000, 8, device="meta", requires_grad=True)

    def attend(query: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(query, query, query)

    ledger = MemoryTracker()
    with ledger:
        ledger.enter_phase("forward")
        out = checkpoint(attend, tokens, use_reentrant=False)
        ledger.enter_phase("backward")
        ledger.backward(out.sum())
    assert ledger.phases["forward"].flops == 4 * 2 * 1000**2 * 8
    assert ledger.phases["backward"].flops == (4 + 10) * 2 * 1000**2 * 8
    assert ledger.phases["backward"].peak.total() < 1000**2 * 4


def test_shallow_models_tell_of_deep_ones(make_config: MakeConfig) -> None:
    cfg = make_config("model=tiny-wan", "clip.num_frames=17")
    runs = PlanBuilder(cfg, CPU, 1)
    deep = runs._step(cfg)
    assert read_depth(cfg) == 4
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rats_video.planning.runs.at_full_depth", lambda measure, depths: measure(depths))
        exact = PlanBuilder(cfg, CPU, 1)._step(cfg)
    phases = {phase for phase, _ in exact}
    for phase in phases - {"weights", "parameters", "start"}:
        sums = [
            sum(
                size for (name, owner), size in found.items() if name == phase and ":" not in owner and owner != "flops"
            )
            for found in (deep, exact)
        ]
        assert sums[0] == pytest.approx(sums[1], rel=0.05), phase  # the fullest moment may move
        assert deep[phase, "flops"] == exact[phase, "flops"]
    assert [deep[kind, TRAINED] for kind in ("weights", "parameters")] == [
        exact[kind, TRAINED] for kind in ("weights", "parameters")
    ]


def read_depth(cfg: DistillConfig) -> int:
    return find_architecture(cfg.model, None).depths["num_layers"]


def test_depths_are_independent() -> None:
    def measure(depths: Any) -> dict[tuple[str, str], float]:
        return {("step", "bytes"): 5 + 7 * depths["num_layers"] + 3 * depths["num_single_layers"]}

    assert at_full_depth(measure, {"num_layers": 20, "num_single_layers": 40}) == {("step", "bytes"): 265}
    assert at_full_depth(measure, {"num_layers": 1, "num_single_layers": 2}) == {("step", "bytes"): 18}


# ------------------------------------------------------------------------------------------------------ parameters


def test_parameters_are_the_loaded_models(make_config: MakeConfig) -> None:
    cfg = make_config(*LORA, "model=tiny-wan", "clip.num_frames=17")
    plan = planned(cfg)
    backbone = build_backbone(cfg, torch.device("cpu"))
    base = sum(weight.numel() for weight in backbone.denoiser.parameters())
    student, _ = build_roles(cfg, backbone)
    assert plan.parameters[DENOISER] == base
    assert plan.parameters[TRAINED] == sum(weight.numel() for weight in student.weights.values())
    for name, part in (("VAE", "vae"), ("text encoder", "text_encoder")):
        assert plan.parameters[name] == sum(weight.numel() for weight in backbone.parts[part].parameters())


def test_bfloat16_leaves_in_float32_what_loading_does(make_config: MakeConfig) -> None:
    cfg = make_config(*LORA, "compute.dtype=bfloat16")
    backbone = build_backbone(cfg, torch.device("cpu"))
    network = backbone.denoiser
    loaded = sum(each.nbytes for each in (*network.parameters(), *network.buffers()))
    assert planned(cfg).memory.held[DENOISER] == loaded


TOTALS = {
    "wan21_1b": 1.42e9, "wan21_14b": 14.3e9, "wan22_5b": 5.0e9, "wan22_a14b": 2 * 14.3e9, "ltx_video": 1.92e9,
    "hunyuan_video": 12.8e9, "cogvideox_5b": 5.57e9, "cogvideox15_5b": 5.57e9, "wan21_i2v_14b": 16.4e9,
    "wan22_i2v_a14b": 2 * 14.3e9, "flux1_dev": 11.9e9, "sd35_medium": 2.24e9, "qwen_image": 20.43e9,
    "flux2_klein_4b": 3.88e9, "ltx2": 18.9e9,
}  # fmt: skip


@pytest.mark.parametrize("name", TOTALS)
def test_presets_have_the_published_number_of_parameters(name: str) -> None:
    preset = read_preset(name)
    kind = preset.family.component_classes()["transformer"]
    with torch.device("meta"):
        networks = [kind.from_config(dict(preset.parts[part])) for part in preset.denoiser_parts]
    count = sum(weight.numel() for network in networks for weight in network.parameters())
    assert count == pytest.approx(TOTALS[name], rel=0.01)


def test_every_preset_is_checked_and_has_its_configuration() -> None:
    assert preset_names() == sorted(TOTALS)
    named = [load_config(DistillConfig, name, group="distill").architecture for name in TOTALS]
    assert named == list(TOTALS)


@pytest.mark.parametrize(("kind", "millions"), [
    ("pickscore", 986.1), ("clip_score", 427.6),  # CLIP ViT-H/14, L/14
    ("video_align", 2209.0), ("hpsv3", 7750.1),  # Qwen2-VL-2B and -7B without the matrix of logits, and their heads
])  # fmt: skip
def test_rewards_that_are_not_there_yet_are_the_usual_ones(make_config: MakeConfig, kind: str, millions: float) -> None:
    cfg = make_config(f"reward.kind={kind}", "reward.path=/not/downloaded")
    reward = reward_on_meta(cfg.reward, where="reward", clip=cfg.clip.spec)
    assert isinstance(reward, nn.Module)
    assert sum(weight.numel() for weight in reward.parameters()) / 1e6 == pytest.approx(millions, abs=0.1)


# ------------------------------------------------------------------------------------------- network calls and FLOPs


def test_tflops_of_the_denoiser_by_hand(make_config: MakeConfig) -> None:
    cfg = make_config("teacher.num_steps=12")
    plan = planned(cfg)
    width, hidden, tokens, rows = 16, 32, 2 * 4 * 4 // 4, 2  # [4, 2, 4, 4] latents in patches of 1 x 2 x 2, two clips
    text = text_rows(cfg)
    linear = 2 * tokens * (6 * width**2 + 2 * width * hidden) + 2 * text * 2 * width**2  # q, k, v, out, q, out; k, v
    attention = 4 * width * (tokens**2 + tokens * text)
    outside = 2 * tokens * (2 * 16 * width) + 2 * text * (width**2 * 2) + 2 * (256 * width + width**2 + 6 * width**2)
    call = rows * (2 * (linear + attention) + outside)
    assert plan.tflops["student rollout"] * 1e12 == pytest.approx(4 * call, rel=0.01)
    assert plan.tflops["teacher rollout"] * 1e12 == pytest.approx(24 * call, rel=0.01)
    recomputed = planned(make_config("teacher.num_steps=12", CHECKPOINTS[0]))
    blocks = 4 * rows * 2 * (linear + attention) / 1e12
    more = recomputed.tflops["student backward"] - plan.tflops["student backward"]
    assert more == pytest.approx(blocks, rel=0.01)  # each block is computed once more


def text_rows(cfg: DistillConfig) -> int:
    backbone = build_backbone(cfg, torch.device("cpu"))
    return backbone.encode_text([max(load_prompts(cfg.prompts).train, key=len)]).embeds.shape[1]


def test_seconds_are_work_over_speed(make_config: MakeConfig) -> None:
    plan = planned(make_config("training.steps=7200"), Device("toy", 8, half=4, conv=2, single=1, utilisation=0.5))
    assert plan.seconds["student rollout"] == pytest.approx(plan.tflops["student rollout"] / 0.5)
    assert plan.seconds["student decode"] == pytest.approx(plan.tflops["student decode"] / 1.0)
    rounded = planned(make_config("compute.decode.dtype=bfloat16"), plan.device)
    assert rounded.seconds["decode backward"] == pytest.approx(plan.seconds["decode backward"] / 2)
    assert plan.hours == pytest.approx(plan.seconds_per_step * 2)
    assert find_device("h100") is GPUS["h100"]


def test_the_guards_looks_by_hand(make_config: MakeConfig) -> None:
    watched = ("guard={every: 10, num_clips: 6}", "training.steps=25", "teacher.reuse=2")
    # Looks at steps 0, 10, 20 and 25, with 4 calls of 2 s each, and one at the teacher with 16; each seen in 4 s.
    assert guard_seconds(make_config(*watched), call=2, seen=4, gpus=1) == 6 * ((4 * 4 + 16) * 2 + 5 * 4)
    assert guard_seconds(make_config(*watched), call=2, seen=4, gpus=4) == 2 * ((4 * 4 + 16) * 2 + 5 * 4)
    assert guard_seconds(make_config("guard=null"), call=2, seen=4, gpus=1) == 0


def test_gpus_share_a_batch_and_sharded_weights(make_config: MakeConfig) -> None:
    cfg = make_config("training.batch_size=8", "parallel.shard=true")
    alone, shared = planned(cfg), planned(cfg, gpus=4)
    assert (alone.clips, shared.clips) == (8, 2)
    assert shared.memory.held["optimizer"] == alone.memory.held["optimizer"] / 4
    assert shared.tflops["student decode"] == pytest.approx(alone.tflops["student decode"] / 4)


# -------------------------------------------------------------------------------------------------------- horizons


def test_horizons_name_the_teachers_noise_levels(make_config: MakeConfig) -> None:
    rows = planned(make_config("student.num_steps=[4, 3]")).horizons
    nested, others = rows[:4], rows[4:]
    assert [row["student"] for row in nested] == pytest.approx([0.9, 0.75, 0.5, 0.0])
    assert [row["teacher"] for row in nested] == [[pytest.approx(row["student"])] for row in nested]
    assert [len(row["teacher"]) for row in others] == [2, 2, 1]  # 8 steps do not nest 3
    for row in others[:2]:
        assert row["teacher"][0] > row["student"] > row["teacher"][1]
        assert row["residual"] > 1e-3


# ---------------------------------------------------------------------------------------------------------- levers


def lever(name: str) -> MemoryOption:
    return MemoryOption(name, "")


@pytest.mark.parametrize(
    ("budget", "expected"),
    [(100, []), (95, ["a"]), (80, ["b"]), (75, ["a", "b"]), (50, ["c"]), (39, ["b", "c"]), (25, [*"abc"]), (24, None)],
)  # fmt: skip
def test_the_cheapest_levers_that_fit(budget: float, expected: list[str] | None) -> None:
    saves = {"a": 5, "b": 20, "c": 50}  # by price: one of c costs more than a and b together
    levers = [lever(name) for name in saves]

    def fits(chosen: Sequence[MemoryOption]) -> bool:
        return 100 - sum(saves[each.setting] for each in chosen) <= budget

    found = cheapest(levers, fits)
    assert (None if found is None else [each.setting for each in found]) == expected


def test_levers_that_are_pulled_or_idle_are_not_offered(make_config: MakeConfig) -> None:
    settings = [each.setting for each in useful_options(make_config(), 1)]
    assert "parallel.shard=true" not in settings
    assert "compute.cache_text=true" in settings
    pulled = make_config(*LORA, "compute.cache_text=true", "student.grad_steps=2")
    left = [each.setting for each in useful_options(pulled, 8)]
    assert not {"student.weights.kind=lora", "compute.cache_text=true", "student.grad_steps=2"} & set(left)
    assert {"student.grad_steps=1", "parallel.shard=true", "compute.offload=block"} <= set(left)


def test_one_builder_plans_each_setting_as_a_fresh_one_does(make_config: MakeConfig) -> None:
    settings = ("compute.decode.small=models/taehv", "compute.decode.dtype=bfloat16", "seed=1")
    one = PlanBuilder(make_config(), CPU, 1)
    for setting in settings:  # a search tries many: nothing of one may stay for the next
        cfg = make_config(setting)
        assert one.plan(cfg, CPU).memory == planned(cfg).memory


def test_levers_that_need_another_wait_for_it(make_config: MakeConfig) -> None:
    few, fewer = lever("compute.quantization=int8"), lever("compute.quantization=nf4")
    assert without_conflicts([few, fewer], make_config()) == []
    assert without_conflicts([few, fewer], make_config(*LORA)) == [fewer]
    inputs, blocks = lever("compute.activation_offload=true"), lever("compute.activation_checkpointing=true")
    assert without_conflicts([inputs], make_config()) == []
    assert without_conflicts([blocks, inputs], make_config()) == [blocks, inputs]
    offload, lora = lever("compute.offload=block"), lever("student.weights.kind=lora")
    host, again = lever("compute.decode.offload=true"), lever("compute.decode.checkpoint=true")
    assert without_conflicts([offload, host], make_config()) == []
    assert without_conflicts([offload], make_config(*LORA, "parallel.shard=true")) == []
    split, rounded = lever("parallel.shard=true"), lever("method.fake_score.optimizer.kind=adamw8bit")
    assert without_conflicts([rounded], make_config("method.kind=dmd2")) == [rounded]
    assert without_conflicts([split, rounded], make_config("method.kind=dmd2")) == [split]
    assert without_conflicts([split, lora, offload], make_config()) == [split, lora]
    assert without_conflicts([offload, lora, host, again], make_config()) == [offload, lora, host, again]


# ------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("architecture=wan21_1",), "architecture: no such preset: wan21_1 (did you mean wan21_1b?)"),
        (("model=/nowhere",), "model: no such folder: /nowhere (or set architecture to one of: cogvideox15_5b, "),
        (("clip.num_frames=6",), "clip.num_frames: must be 1 + a multiple of"),
        ((*LORA, "student.weights.targets=[nope]"), "student.weights.targets: no layer of the denoiser is called nope"),
    ],
)
def test_mistakes_are_named(make_config: MakeConfig, overrides: tuple[str, ...], message: str) -> None:
    with pytest.raises(UserError) as caught:
        planned(make_config(*overrides))
    assert str(caught.value).startswith(message)


# --------------------------------------------------------------------------------------------------- the first steps


def test_the_first_steps_are_compared_with_the_plan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "plan.json"
    path.write_text(json.dumps({"seconds_per_step": 2.0, "peak_bytes": 2**30}))
    check = PlanCheck(path, torch.device("cpu"), steps=100)
    for seconds in (9.0, 3.0, 4.0, 5.0):
        check.step_done(seconds)
    assert json.loads(path.read_text())["measured"] == {"seconds": [9.0, 3.0, 4.0], "peak_bytes": None}
    assert capsys.readouterr().err.splitlines() == [
        "plan: 2 s a step expected, 3 s measured; peak memory is not measured on a CPU"
    ]
    assert compared(2.0, 3 * 2**30, 2.5, 4 * 2**30).endswith("peak 3.00 GiB expected, 4.00 GiB measured (-25%)")


def test_a_run_without_plan_compares_nothing(tmp_path: Path) -> None:
    check = PlanCheck(tmp_path / "plan.json", torch.device("cpu"), steps=1)
    check.step_done(1.0)
    assert list(tmp_path.iterdir()) == []
