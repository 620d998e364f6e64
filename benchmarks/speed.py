"""How fast a RATS step and a sampling are, against what they cannot do without.

    python benchmarks/speed.py [--repeats 5] [--device cpu]              tiny-wan -> results/speed.json
    python benchmarks/speed.py --model wan21_1b --random --device cuda   -> results/speed_wan21_1b.json

Bars: a step takes at most 1.10 times its network, decode and reward calls made alone; sampling at 4 calls at most 1.02
times diffusers' own pipeline with guidance off. All are medians of interleaved repeats. On a GPU: Wan 2.1 1.3B of
random weights at 480 x 832 x 81, for native and xformers attention.
"""

from __future__ import annotations

import argparse
import itertools
import platform
import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from measure import interleaved, median_ratio, model_parser, peak_bytes, run_model, write_result
from random_model import OPTIONS, PROMPTS, RandomClipReward, random_model, random_rats, stock_frames
from torch import Tensor

from rats_video.assets import resolve_folder
from rats_video.backbones.attention import check_attention, used_attention
from rats_video.backbones.base import PipelineBackbone
from rats_video.backbones.compute import LoraConfig
from rats_video.backbones.kinds import load_backbone
from rats_video.condition import Condition
from rats_video.config.load import load_config
from rats_video.datasets.prompts.split import load_prompts
from rats_video.diffusion.rollout import rollout
from rats_video.distillation.method import build_rats
from rats_video.distillation.roles import build_backbone, build_roles
from rats_video.distillation.settings import DistillConfig
from rats_video.errors import UserError
from rats_video.inference.sampler import SamplerSpec, clip_noise, sample_videos
from rats_video.methods.rats import Rats, rats_step
from rats_video.training.batches import draw_batch
from rats_video.types import PromptBatch

STEP_BAR, SAMPLING_BAR = 1.10, 1.02
PEAK_TFLOPS = {"H100": 989.0, "H200": 989.0, "A100": 312.0}  # dense bfloat16, from NVIDIA's data sheets
Call = Callable[[], object]


@dataclass(frozen=True)
class Alone:
    """The calls of one RATS step, each made by itself with tensors of the step's shapes."""

    rats: Rats
    batch: PromptBatch
    texts: tuple[Condition, Condition]  # the student's; the teacher's, with the negatives under guidance
    videos: Tensor

    @classmethod
    def of(cls, rats: Rats, batch: PromptBatch) -> Alone:
        """Encode and decode once, outside what is measured."""
        text = rats.student.encode_text(batch.prompts)
        both = text
        if rats.teacher.guidance_scale != 1.0:
            both = Condition.cat([text, *[rats.student.encode_text([""])] * len(text)])
        with torch.no_grad():
            return cls(rats, batch, (text, both), rats.student.decode(batch.noise))

    def parts(self) -> dict[str, Call]:
        """The calls by part."""
        return {
            "teacher network": self.teacher_network,
            "student network": self.student_network,
            "teacher decode": lambda: self._without_gradient(self.rats.teacher.backbone.decode, self.batch.noise),
            "student decode": lambda: self._with_gradient(
                lambda latents: self.rats.student.decode(latents, self.batch.grad_frames), self.batch.noise
            ),
            "teacher reward": lambda: self._without_gradient(self._reward, self.videos),
            "student reward": lambda: self._with_gradient(self._reward, self.videos),
        }

    def teacher_network(self) -> None:
        """Each solver step's call, both branches of guidance in one."""
        text, noise = self.texts[1], self.batch.noise
        latents = noise if len(text) == len(noise) else torch.cat([noise, noise])
        sigma = noise.new_full((len(text),), 0.7)
        with torch.no_grad():
            for _ in range(self.rats.teacher.cfg.num_steps):
                self.rats.teacher.backbone.velocity(latents, sigma, text)

    def student_network(self) -> None:
        """Each solver step's call; those of the step that carry gradient carry it here."""
        noise, steps = self.batch.noise, self.batch.num_steps
        with_grad = self.rats.student_config.gradient_steps(steps)
        sigma = noise.new_full((len(noise),), 0.7)
        for step in range(steps):
            latents = noise.clone().requires_grad_(step > min(with_grad, default=steps))  # the first gets none back
            with torch.set_grad_enabled(step in with_grad):
                out = self.rats.student.velocity(latents, sigma, self.texts[0])
            if step in with_grad:
                out.backward(torch.ones_like(out))

    def _reward(self, videos: Tensor) -> Tensor:
        return self.rats.reward(videos, self.batch.prompts).clip

    @staticmethod
    def _without_gradient(call: Callable[[Tensor], Tensor], inputs: Tensor) -> None:
        with torch.no_grad():
            call(inputs)

    @staticmethod
    def _with_gradient(call: Callable[[Tensor], Tensor], inputs: Tensor) -> None:
        call(inputs.clone().requires_grad_()).sum().backward()


def step_call(rats: Rats, batch: PromptBatch) -> Call:
    """A whole step with its backward pass; each call is a batch of its own, so that no rollout is reused."""
    counter = itertools.count()

    def call() -> None:
        loss, _ = rats_step(rats, replace(batch, index=next(counter)))
        loss.backward()
        for weight in rats.student.weights.values():
            weight.grad = None

    return call


def measure_step(rats: Rats, batch: PromptBatch, repeats: int) -> dict[str, object]:
    """Seconds of a step and of its calls alone, and their ratio."""
    parts = Alone.of(rats, batch).parts()
    taken = interleaved({"step": step_call(rats, batch), **parts}, repeats)
    step = taken.pop("step")
    alone = [sum(turn) for turn in zip(*taken.values(), strict=True)]
    return {
        "step seconds": round(statistics.median(step), 4),
        "calls alone seconds": round(statistics.median(alone), 4),
        "parts seconds": {name: round(statistics.median(each), 4) for name, each in taken.items()},
        "ratio": round(median_ratio(step, alone), 4),
        "bar": STEP_BAR,
    }


def measure_sampling(cfg: DistillConfig, backbone: PipelineBackbone, prompts: list[str], repeats: int) -> object:
    """Our sampler and the stock pipeline on the same prompts and noise, with decode and to the latents only."""
    from diffusers import FlowMapEulerDiscreteScheduler, WanPipeline

    pipe = WanPipeline.from_pretrained(resolve_folder(cfg.model, where="model")).to(backbone.device)
    pipe.scheduler = FlowMapEulerDiscreteScheduler(shift=cfg.shift)
    pipe.set_progress_bar_config(disable=True)
    clip, spec = cfg.clip.spec, SamplerSpec(4, cfg.shift)
    noise = torch.cat([clip_noise(backbone, clip, 0, i) for i in range(len(prompts))])

    def stock(output_type: str) -> Tensor:
        return stock_frames(pipe, noise, clip, spec.num_steps, output_type, prompt=prompts)

    def ours() -> Tensor:
        (samples,) = sample_videos(backbone, prompts, clip, spec, seed=0, batch_size=len(prompts))
        return samples.videos

    @torch.no_grad()
    def ours_latents() -> Tensor:
        sigmas = backbone.sigmas(spec.num_steps, spec.shift)
        return rollout(backbone.velocity, noise, sigmas, backbone.encode_text(prompts)).x0

    difference = float((stock("pt").to(noise.device) - ours()).abs().max())
    calls = {"ours": ours, "stock": lambda: stock("pt")}
    latents = {"our latents": ours_latents, "stock latents": lambda: stock("latent")}
    taken = interleaved({**calls, **latents}, repeats)
    return {
        "clips": len(prompts), "nfe": spec.nfe, "largest pixel difference": difference,
        "seconds": {name: round(statistics.median(each), 4) for name, each in taken.items()},
        "ratio": round(median_ratio(taken["ours"], taken["stock"]), 4),
        "ratio to latents": round(median_ratio(taken["our latents"], taken["stock latents"]), 4),
        "bar": SAMPLING_BAR,
    }  # fmt: skip


def measure_switch(backbone: PipelineBackbone, repeats: int) -> dict[str, object]:
    """Milliseconds to go from student to teacher and back, ours and peft's."""
    lora = LoraConfig(kind="lora", rank=8, alpha=8)
    student, teacher = backbone.with_adapter("student", lora), backbone.with_adapter("teacher", lora)
    network, adapters = student.denoiser, student.adapters
    assert adapters is not None
    assert teacher.adapters is adapters

    def ours() -> None:
        for _ in range(100):
            adapters.use("teacher")
            adapters.use("student")

    def peft() -> None:
        network.set_adapter("teacher")  # type: ignore[operator]
        network.set_adapter("student")  # type: ignore[operator]

    taken = interleaved({"ours": ours, "peft": peft}, repeats)
    return {
        "layers": len(adapters._layers),  # noqa: SLF001
        "ours ms": round(statistics.median(taken["ours"]) / 100 * 1e3, 4),
        "peft set_adapter ms": round(statistics.median(taken["peft"]) * 1e3, 4),
    }


def tiny(options: argparse.Namespace) -> None:
    """The embedded model: the two bars and the cost of a switch."""
    cfg = load_config(DistillConfig, "tiny", group="distill", overrides=options.set)
    device = torch.device(options.device)
    backbone = build_backbone(cfg, device)
    rats = build_rats(cfg, *build_roles(cfg, backbone))
    prompts = load_prompts(cfg.prompts)
    batch = draw_batch(backbone, cfg, prompts.train, 0)
    write_result("speed", {
        "machine": machine(device),
        "step": measure_step(rats, batch, options.repeats),
        "sampling": measure_sampling(cfg, backbone, list(prompts.heldout[:4]), options.repeats),
        "role switch": measure_switch(load_backbone(resolve_folder(cfg.model, where="model"), device), options.repeats),
    })  # fmt: skip


def wan21_1b(options: argparse.Namespace) -> None:
    """Wan 2.1 1.3B at full size: seconds by part, TFLOP/s and share of peak, peak GB, by attention kernel."""
    device = torch.device(options.device)
    results: dict[str, object] = {}
    for attention in ("native", "xformers"):
        cfg = DistillConfig.model_validate(OPTIONS)
        cfg = cfg.model_copy(update={"compute": cfg.compute.model_copy(update={"attention": attention})})
        try:
            check_attention(attention, device, cfg.compute.dtype)
        except UserError as error:
            results[attention] = str(error)
            continue
        rats = random_rats(cfg, random_model(cfg, device), RandomClipReward(device))
        batch = draw_batch(rats.student, cfg, PROMPTS[:1], 0)
        flops = forward_flops(rats, batch)
        measured = measure_step(rats, batch, options.repeats)
        parts = measured["parts seconds"]
        assert isinstance(parts, dict)
        rate = flops * cfg.teacher.num_steps / parts["teacher network"] / 1e12
        peak = next(
            (tflops for name, tflops in PEAK_TFLOPS.items() if name in torch.cuda.get_device_name(device)), None
        )
        results[attention] = {
            **measured,
            "attention in use": used_attention(rats.student.denoiser),
            "TFLOP a forward call": round(flops / 1e12, 2),
            "TFLOP/s of the teacher's calls": round(rate, 1),
            "share of the GPU's peak": None if peak is None else round(rate / peak, 3),
            "peak GB": round(peak_bytes(step_call(rats, batch)) / 1e9, 2),
        }
        del rats
        torch.cuda.empty_cache()
    write_result("speed_wan21_1b", {"machine": machine(device), "options": OPTIONS, **results})


def forward_flops(rats: Rats, batch: PromptBatch) -> int:
    """Floating point operations of one forward call on the batch."""
    from torch.utils.flop_counter import FlopCounterMode

    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        rats.student.velocity(batch.noise, batch.noise.new_full((len(batch.noise),), 0.7),
                              rats.student.encode_text(batch.prompts))  # fmt: skip
    return int(counter.get_total_flops())


def machine(device: torch.device) -> str:
    """What it was measured on."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.machine()} CPU"
    return f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}"


def main() -> None:
    """Measure and write the results."""
    parser = model_parser(__doc__, repeats=5)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="changes the tiny config")
    run_model(parser, tiny=tiny, wan21_1b=wan21_1b)


if __name__ == "__main__":
    main()
