"""What each lever saves and costs: peak memory and seconds of a training step, as ratios to the step without it.

    python benchmarks/levers.py [--repeats 3] [--device cpu]             5 million weights -> results/levers.json
    python benchmarks/levers.py --model wan21_1b --random --device cuda  -> results/levers_wan21_1b.json

The step is whole: teacher and student rollout, decode, reward, backward, optimizer, average. On a CPU memory is the
bytes of live tensors, weights, adapters and moments included, without what `compute.offload` keeps in host memory; on a
GPU it is what the allocator says. Also: the roles' memory against plain LoRA fine-tuning (see roles_memory.py).
"""

from __future__ import annotations

import argparse
import gc
import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml
from measure import interleaved, model_parser, peak_bytes, run_model, write_result
from random_model import OPTIONS, PROMPTS, RandomClipReward, random_model, random_rats
from roles_memory import compare, wide
from speed import machine
from torch import Tensor

from rats_video.assets import resolve_folder
from rats_video.backbones.base import PipelineBackbone
from rats_video.backbones.kinds import load_backbone
from rats_video.config.load import load_config
from rats_video.datasets.prompts.split import load_prompts
from rats_video.distillation.checks import check_compute
from rats_video.distillation.compute import describe, move_to_device
from rats_video.distillation.method import build_rats
from rats_video.distillation.roles import build_backbone, build_roles
from rats_video.distillation.settings import DistillConfig
from rats_video.errors import UserError
from rats_video.methods.rats import Rats
from rats_video.optim import build_optimizer
from rats_video.pretraining.flow import save_pipeline
from rats_video.training.batches import draw_batch
from rats_video.training.update import accumulate_gradient

LEVERS: dict[str, tuple[str, ...]] = {
    "one clip at a time": ("training.micro_batch_size=1",),
    "activation checkpointing": ("compute.activation_checkpointing=true",),
    "gradient of 1 step": ("student.grad_steps=1",),
    "decode checkpoint": ("compute.decode.checkpoint=true",),
    "decode window 2": ("compute.decode.window=2",),
    "bfloat16 base": ("compute.dtype=bfloat16",),
    "int8 base": ("compute.quantization=int8",),
    "nf4 base": ("compute.quantization=nf4",),
    "block inputs on the host": ("compute.activation_checkpointing=true", "compute.activation_offload=true"),
    "cached text": ("compute.cache_text=true",),
    "8-bit AdamW": ("training.optimizer.kind=adamw8bit",),
    "offload by block": ("compute.offload=block",),
    "offload by leaf": ("compute.offload=leaf",),
    "full weights": ("student.weights.kind=full",),
    "compile": ("compute.compile=true",),
    "math attention": ("compute.attention=_native_math",),
    "xformers attention": ("compute.attention=xformers",),
    "flash attention": ("compute.attention=flash",),
}
"""Against a step with none of them; the last rows cost memory, or cost or save time."""
TINY = (
    "teacher.kind=ema", "teacher.num_steps=4", "teacher.guidance_scale=1", "student.weights.kind=lora",
    "student.weights.rank=16", "student.weights.alpha=16", "training.batch_size=2",
)  # fmt: skip
SLOW_ON_CPU = {"compile"}
WAN_LEVERS = [
    "int8 base", "nf4 base", "offload by block", "8-bit AdamW", "xformers attention", "flash attention", "compile",
]  # fmt: skip
Build = Callable[[DistillConfig], tuple[Rats, Sequence[str]]]


def training_step(rats: Rats, cfg: DistillConfig, prompts: Sequence[str]) -> tuple[Callable[[], None], list[Tensor]]:
    """One whole step as a call, and the optimizer's moments once it has run."""
    weights = rats.student.weights
    optimizer = build_optimizer(cfg.training.optimizer, weights.values())
    batch = draw_batch(rats.student, cfg, prompts, 0)
    updates = 0

    def step() -> None:
        nonlocal updates
        optimizer.zero_grad(set_to_none=True)
        accumulate_gradient(
            rats.step, replace(batch, index=updates), cfg.training.num_micro_batches(len(batch.prompts))
        )
        optimizer.step()
        updates += 1
        rats.teacher.update_ema(rats.student, updates)
        optimizer.zero_grad(set_to_none=True)

    step()
    return step, [value for state in optimizer.state.values() for value in state.values() if torch.is_tensor(value)]


def on_device(cfg: DistillConfig, roles: Sequence[PipelineBackbone], reward: object) -> list[Tensor]:
    """The weights that are on the device for good."""
    modules = {id(part): part for role in roles for part in role.parts.values() if isinstance(part, torch.nn.Module)}
    modules[id(reward)] = reward  # type: ignore[assignment]
    named = [item for module in modules.values() for item in module.named_parameters()]
    return [
        weight
        for name, weight in named
        if cfg.compute.offload == "none" or ".lora_" in name or not name.startswith("blocks.")
    ]


def measure_lever(cfgs: Mapping[str, DistillConfig], build: Build, repeats: int) -> dict[str, Any]:
    """Peak bytes and seconds `off` and `on`, measured one after the other: two models at once would count double."""
    peaks: dict[str, int] = {}
    taken: dict[str, float] = {}
    used = ""
    for name, cfg in cfgs.items():
        rats, prompts = build(cfg)
        roles: tuple[Any, Any] = (rats.student, rats.teacher.backbone)
        step, moments = training_step(rats, cfg, prompts)
        taken[name] = statistics.median(interleaved({"step": step}, repeats)["step"])
        peaks[name] = peak_bytes(step, [*on_device(cfg, roles, rats.reward), *moments])
        used = describe(cfg, roles[0])["attention"]
        del rats, roles, step, moments
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return {
        "memory ratio": round(peaks["on"] / peaks["off"], 3),
        "time ratio": round(taken["on"] / taken["off"], 3),
        "peak MB": {name: round(peak / 1e6, 2) for name, peak in peaks.items()},
        "seconds": {name: round(each, 4) for name, each in taken.items()},
        "attention in use": used,
    }


def run(config: str, base: Sequence[str], build: Build, options: argparse.Namespace) -> dict[str, Any]:
    """All levers, one after the other; one that is not to be had here gives its own line."""
    rows: dict[str, Any] = {}
    device = torch.device(options.device)
    off = load_config(DistillConfig, config, group="distill", overrides=base)
    for name, settings in LEVERS.items():
        if (options.only and name not in options.only) or (device.type == "cpu" and name in SLOW_ON_CPU):
            continue
        on = load_config(DistillConfig, config, group="distill", overrides=[*base, *settings])
        try:
            check_compute(on, device)
            rows[name] = {"settings": settings, **measure_lever({"off": off, "on": on}, build, options.repeats)}
        except UserError as error:
            rows[name] = {"settings": settings, "not here": str(error)}
        print(name, rows[name], flush=True)
    return rows


def tiny(options: argparse.Namespace) -> None:
    """A Wan whose weights are large beside its activations, with the embedded text encoder, VAE and reward."""
    device = torch.device(options.device)
    base = wide(load_backbone(resolve_folder("tiny-wan", where="model")))  # type: ignore[arg-type]

    def build(cfg: DistillConfig) -> tuple[Rats, Sequence[str]]:
        return build_rats(cfg, *build_roles(cfg, build_backbone(cfg, device))), load_prompts(cfg.prompts).train

    with tempfile.TemporaryDirectory() as folder:
        save_pipeline(base, Path(folder) / "wide", shift=3.0)
        rows = run("tiny", (*TINY, f"model={folder}/wide"), build, options)
    noise = torch.randn(1, base.latent_channels, 5, 16, 16, device=device)
    write_result("levers", {"machine": machine(device), "levers": rows, "lora roles": roles_rows(base, noise)})


def roles_rows(base: PipelineBackbone, noise: Tensor) -> dict[str, Any]:
    """Memory of student and average as adapters against plain LoRA fine-tuning; the bar is 1.15."""
    rows = {}
    for grad_steps in (1, 4):
        rats, plain = compare(base, noise, grad_steps=grad_steps)
        rows[f"gradient of {grad_steps}"] = {
            "rats MB": round(rats / 1e6, 2), "plain MB": round(plain / 1e6, 2), "ratio": round(rats / plain, 4),
        }  # fmt: skip
    return rows


def wan21_1b(options: argparse.Namespace) -> None:
    """Wan 2.1 1.3B of random weights at 480 x 832 x 81, against a step with the levers that it needs to fit."""
    device = torch.device(options.device)

    def build(cfg: DistillConfig) -> tuple[Rats, Sequence[str]]:
        base = random_model(cfg, torch.device("cpu") if cfg.compute.offload != "none" else device)
        move_to_device(cfg, base, device)
        return random_rats(cfg, base, RandomClipReward(device)), PROMPTS[:1]

    options.only = options.only or WAN_LEVERS
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "wan.yaml"
        file.write_text(yaml.safe_dump(OPTIONS))
        rows = run(str(file), (), build, options)
        base = random_model(load_config(DistillConfig, str(file), group="distill"), device)
    noise = torch.randn(1, 16, 21, 60, 104, device=device)
    content = {"machine": machine(device), "options": OPTIONS, "levers": rows, "lora roles": roles_rows(base, noise)}
    write_result("levers_wan21_1b", content)


def main() -> None:
    """Measure and write the results."""
    parser = model_parser(__doc__, repeats=3)
    parser.add_argument("--only", action="append", default=[], choices=list(LEVERS), help="some levers")
    run_model(parser, tiny=tiny, wan21_1b=wan21_1b)


if __name__ == "__main__":
    main()
