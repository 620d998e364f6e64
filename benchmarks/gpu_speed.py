"""Seconds, TFLOP/s and memory of published shapes with random weights: the parts of gpu.py that measure speed."""

from __future__ import annotations

import re
import statistics
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from gpu_rows import Row, Rows, bar, main
from levers import SLOW_ON_CPU, on_device, training_step
from measure import interleaved, median_ratio, peak_bytes, seconds
from random_model import PROMPTS, RandomClipReward, hollow_model, random_model, random_parts, random_rats, stock_frames
from speed import SAMPLING_BAR, STEP_BAR, forward_flops, measure_step
from torch import Tensor

from rats_video.backbones.attention import used_attention
from rats_video.backbones.base import PipelineBackbone
from rats_video.config.load import load_config
from rats_video.diffusion.rollout import rollout
from rats_video.distillation.checks import check_compute
from rats_video.distillation.compute import move_to_device
from rats_video.distillation.run_rewards import loss_reward
from rats_video.distillation.settings import DistillConfig
from rats_video.inference.sampler import SamplerSpec, clip_noise, sample_batch
from rats_video.methods.rats import Rats
from rats_video.optim import build_optimizer
from rats_video.planning.devices import detect_device
from rats_video.planning.memory import GIB
from rats_video.planning.runs import PlanBuilder
from rats_video.training.batches import draw_batch
from rats_video.types import PromptBatch, Reward

SHARE_BAR, PLAN_BAR, OFFLOAD_BAR = 0.45, 0.15, 1.3
ONE_CLIP = ("training.batch_size=1", "teacher.reuse=1", "guard=null")
FOUR_STEPS = (*ONE_CLIP, "teacher.num_steps=4", "student.num_steps=[4]")
TWO_STEPS = (*ONE_CLIP, "teacher.num_steps=2", "student.num_steps=[2]")
REHEARSED = (
    "student.weights.kind=lora", "student.weights.rank=4", "compute.dtype=bfloat16", "compute.cache_text=true",
    "compute.activation_checkpointing=true", "compute.decode.checkpoint=true",
)  # fmt: skip
LEVERS = {
    "as shipped": (),
    "no checkpointing": ("compute.activation_checkpointing=false",),
    "offload by block": ("compute.offload=block",),
    "8-bit AdamW": ("training.optimizer.kind=adamw8bit",),
    "xformers attention": ("compute.attention=xformers",),
    "flash attention": ("compute.attention=flash",),
    "compile": ("compute.compile=true",),
}
"""The last ones may break a process: a kernel that was never run, and a compiler."""
MATRIX = re.compile(
    r"(?!.*ToN[ch])(.*)(gemm|nvjet|cutlass|xmma|flash|fmha|attention|conv(?!ert)|mm$|matmul)", re.IGNORECASE
)
"""Names of kernels of matrix products, convolutions and attention, without those that change a layout for them."""
Call = Callable[[], object]


class Bench:
    """Models for a part: in real shapes on the GPU, or the tests' tiny pipelines in a rehearsal."""

    def __init__(self, *, rehearse: bool) -> None:
        self.rehearse = rehearse
        self.device = torch.device("cpu" if rehearse else "cuda")

    def config(self, name: str, *overrides: str) -> DistillConfig:
        """A packaged configuration; in a rehearsal `tiny` with a tiny model of that family."""
        if self.rehearse:
            return load_config(
                DistillConfig, "tiny", group="distill", overrides=[f"model={tiny(name)}", *REHEARSED, *overrides]
            )
        return load_config(DistillConfig, name, group="distill", overrides=overrides)

    def rats(self, cfg: DistillConfig) -> Rats:
        """RATS on the configured shape, with a base in host memory where it is to be offloaded."""
        check_compute(cfg, self.device)
        base = random_model(cfg, self.device)
        if cfg.compute.offload != "none":
            for part in base.denoisers.values():
                part.to("cpu")
            move_to_device(cfg, base, self.device)
        return random_rats(cfg, base, self._reward(cfg, base))

    def _reward(self, cfg: DistillConfig, base: PipelineBackbone) -> Reward:
        if self.rehearse:
            return loss_reward(cfg, base)
        frames: Any = cfg.reward
        return RandomClipReward(self.device, frames.frames)

    def matmul_tflops(self) -> float:
        """TFLOP/s of a large bfloat16 matrix product of random numbers."""
        size = 256 if self.rehearse else 8192
        left, right = (torch.randn(size, size, device=self.device, dtype=torch.bfloat16) for _ in range(2))
        taken = interleaved({"product": lambda: left @ right}, 20)["product"]
        return 2 * size**3 / statistics.median(taken) / 1e12


def tiny(name: str) -> str:
    """The folder of a tiny pipeline of the configuration's family."""
    if name.startswith("wan21"):
        return "tiny-wan"
    sys.path.append(str(Path(__file__).parents[1] / "tests" / "fixtures"))
    from ltx_family import LTX_FAMILIES
    from wan22_family import WAN22_FAMILIES

    families = {family.name: family for family in (*LTX_FAMILIES, *WAN22_FAMILIES)}
    folder = Path(tempfile.mkdtemp()) / name
    families["ltx" if name == "ltx_video" else "wan22-5b"].build(folder)
    return str(folder)


def wan(rows: Rows, rehearse: bool) -> None:  # noqa: FBT001
    """Wan 2.1 1.3B: sampling against the stock pipeline, a step by part, its peak against the plan."""
    bench = Bench(rehearse=rehearse)
    cfg = bench.config("wan21_1b", *FOUR_STEPS)
    longer = bench.config("wan21_1b", *FOUR_STEPS, *(() if rehearse else ("clip.num_frames=81",)))
    rows.add("49 frames, sampling of 4 calls", lambda: sampling(bench, cfg, decode=True))
    rows.add("49 frames, one call", lambda: one_call(bench, cfg))
    rows.add("49 frames, step by part", lambda: step_by_part(bench, cfg))
    update_and_plan(rows, bench, "49 frames", cfg)
    rows.add("81 frames, sampling of 4 calls", lambda: sampling(bench, longer, decode=False))
    rows.add("81 frames, one call", lambda: one_call(bench, longer))


def step_by_part(bench: Bench, cfg: DistillConfig) -> Row:
    """A RATS step against its network, decode and reward calls made alone."""
    rats = bench.rats(cfg)
    measured: Row = measure_step(rats, draw_batch(rats.student, cfg, PROMPTS[:1], 0), 1)
    bars = {"step over its calls": bar(measured["ratio"], at_most=STEP_BAR)}
    return {**measured, "attention": used_attention(rats.student.denoiser), "bars": bars}


def sampling(bench: Bench, cfg: DistillConfig, *, decode: bool) -> Row:
    """Our sampler and diffusers' pipeline with the same weights, text and noise, to latents and to pixels."""
    from diffusers import FlowMapEulerDiscreteScheduler, WanPipeline

    base, clip, spec = random_model(cfg, bench.device), cfg.clip.spec, SamplerSpec(4, cfg.shift)
    parts = random_parts(hollow_model(cfg), bench.device)  # untouched by our own kernels
    pipe = WanPipeline(
        tokenizer=None, text_encoder=None, scheduler=FlowMapEulerDiscreteScheduler(shift=cfg.shift), **parts
    )
    pipe.set_progress_bar_config(disable=True)
    noise, text = clip_noise(base, clip, 0, 0), base.encode_text(PROMPTS[:1])
    embeds = torch.nn.functional.pad(text.embeds, (0, 0, 0, 512 - text.embeds.shape[1]))

    def stock(kind: str) -> Tensor:
        return stock_frames(pipe, noise, clip, spec.num_steps, kind, prompt_embeds=embeds)

    @torch.no_grad()
    def ours() -> Tensor:
        return rollout(base.velocity, noise, base.sigmas(spec.num_steps, spec.shift), text).x0

    calls: dict[str, Call] = {"ours, latents": ours, "stock, latents": lambda: stock("latent")}
    if decode:
        calls |= {"ours": lambda: sample_batch(base, PROMPTS[:1], noise, spec), "stock": lambda: stock("pt")}
    taken = interleaved(calls, 2)
    theirs = stock("latent").float()
    row: Row = {f"{name} s": round(statistics.median(each), 3) for name, each in taken.items()}
    row["latents differ by"] = round(float((ours() - theirs).norm() / theirs.norm()), 5)
    pairs = [("ours, latents", "stock, latents"), ("ours", "stock")][: 2 if decode else 1]
    row["bars"] = {
        f"{mine} over {other}": bar(median_ratio(taken[mine], taken[other]), at_most=SAMPLING_BAR)
        for mine, other in pairs
    }
    return row


def one_call(bench: Bench, cfg: DistillConfig) -> Row:
    """The denoiser's TFLOP/s in one call without gradient, against a plain matrix product's."""
    rats = bench.rats(cfg)
    batch = draw_batch(rats.student, cfg, PROMPTS[:1], 0)
    peak, flops = bench.matmul_tflops(), forward_flops(rats, batch)
    taken = statistics.median(interleaved({"call": denoise(rats, batch, gradient=False)}, 3)["call"])
    rate = flops / taken / 1e12
    return {
        "TFLOP": round(flops / 1e12, 4), "s": round(taken, 4), "TFLOP/s": round(rate, 2),
        "matrix product TFLOP/s": round(peak, 2), "bars": {"share of it": bar(rate / peak, at_least=SHARE_BAR)},
    }  # fmt: skip


def denoise(rats: Rats, batch: PromptBatch, *, gradient: bool) -> Call:
    """One call of the student's denoiser."""
    text, sigma = rats.student.encode_text(batch.prompts), batch.noise.new_full((len(batch.noise),), 0.7)

    def call() -> None:
        with torch.set_grad_enabled(gradient):
            latents = batch.noise.clone().requires_grad_(gradient)  # as every step but the first
            out = rats.student.velocity(latents, sigma, text)
        if gradient:
            out.backward(torch.ones_like(out))

    return call


def update_and_plan(rows: Rows, bench: Bench, name: str, cfg: DistillConfig) -> None:
    """Seconds and peak of a whole update, then what `plan` says of it."""
    measured = rows.add(f"{name}, update", lambda: update(bench, cfg))
    rows.add(f"{name}, plan", lambda: planned(bench, cfg, measured.get("peak GiB")))


def update(bench: Bench, cfg: DistillConfig) -> Row:
    """The second update of a run, optimizer and average included."""
    rats = bench.rats(cfg)
    step, moments = training_step(rats, cfg, PROMPTS[:1])
    roles: Any = (rats.student, rats.teacher.backbone)
    taken: list[float] = []
    peak = peak_bytes(lambda: taken.append(seconds(step)), [*on_device(cfg, roles, rats.reward), *moments])
    return {"s": round(taken[0], 3), "peak GiB": round(peak / GIB, 4)}


def planned(bench: Bench, cfg: DistillConfig, measured: float | None) -> Row:
    """The plan's peak and seconds, and how far its peak is off, where it was measured."""
    device = detect_device(bench.device)
    plan = PlanBuilder(cfg, device, 1).plan(cfg, device).as_json()
    peak = plan["peak_bytes"] / GIB
    bars = {} if measured is None else {"off the measured peak by": bar(abs(peak / measured - 1), at_most=PLAN_BAR)}
    return {"planned GiB": round(peak, 4), "planned s": round(plan["seconds_per_step"], 3), "bars": bars}


def levers(rows: Rows, rehearse: bool) -> None:  # noqa: FBT001
    """The student's denoiser with and without gradient under each lever, and its optimizer."""
    bench = Bench(rehearse=rehearse)
    names = [name for name in LEVERS if not rehearse or name not in SLOW_ON_CPU]
    shipped = rows.add(names[0], lambda: under_lever(bench, (), {}))
    for name in names[1:]:
        rows.add(name, lambda settings=LEVERS[name]: under_lever(bench, settings, shipped))


def under_lever(bench: Bench, settings: Sequence[str], shipped: Row) -> Row:
    """Seconds and peak of one call, and of the optimizer."""
    cfg = bench.config("wan21_1b", *FOUR_STEPS, *settings)
    rats = bench.rats(cfg)
    batch = draw_batch(rats.student, cfg, PROMPTS[:1], 0)
    both = denoise(rats, batch, gradient=True)
    taken = interleaved({"forward": denoise(rats, batch, gradient=False), "forward and backward": both}, 3)
    peak = peak_bytes(both)
    optimizer = build_optimizer(cfg.training.optimizer, rats.student.weights.values())
    taken |= interleaved({"optimizer": optimizer.step}, 3)
    state = [value for each in optimizer.state.values() for value in each.values() if torch.is_tensor(value)]
    row: Row = {
        **{f"{name} s": round(statistics.median(each), 4) for name, each in taken.items()},
        "peak GiB": round(peak / GIB, 4),
        "optimizer GiB": round(sum(value.nbytes for value in state) / GIB, 4),
        "attention": used_attention(rats.student.denoiser),
    }
    if "forward and backward s" in shipped:
        row["time ratio"] = round(row["forward and backward s"] / shipped["forward and backward s"], 3)
    if cfg.compute.offload != "none" and "time ratio" in row:
        row["bars"] = {"time ratio": bar(row["time ratio"], at_most=OFFLOAD_BAR)}
    return row


def where(rows: Rows, rehearse: bool) -> None:  # noqa: FBT001
    """The kernels that a denoiser call and a decode with gradient spend their time in."""
    bench = Bench(rehearse=rehearse)
    cfg = bench.config("wan21_1b", *FOUR_STEPS)
    rats = bench.rats(cfg)
    batch = draw_batch(rats.student, cfg, PROMPTS[:1], 0)

    def decode() -> None:
        rats.student.decode(batch.noise.clone().requires_grad_(), batch.grad_frames).sum().backward()

    for name, call in {"denoiser": denoise(rats, batch, gradient=True), "decode": decode}.items():
        rows.add(name, lambda call=call: kernels(call, bench.device))


def kernels(call: Call, device: torch.device) -> Row:
    """Share of matrix products and attention, and the 20 longest kernels that are neither."""
    call()  # warms up
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    on_gpu = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]) as profiled:
        call()
        if on_gpu:
            torch.cuda.synchronize()
    taken: Mapping[str, tuple[float, int]] = {
        event.key: ((event.self_device_time_total if on_gpu else event.self_cpu_time_total) / 1e3, event.count)
        for event in profiled.key_averages()
        if (event.device_type == DeviceType.CUDA) == on_gpu
    }
    total = sum(milliseconds for milliseconds, _ in taken.values())
    others = sorted(((key, *each) for key, each in taken.items() if not MATRIX.match(key)), key=lambda one: -one[1])
    return {
        "kernels ms": round(total, 2),
        "share of matrix products": round(1 - sum(one[1] for one in others) / total, 3),
        "longest others": [{"kernel": key[:160], "ms": round(ms, 2), "calls": calls} for key, ms, calls in others[:20]],
    }


def wan14b(rows: Rows, rehearse: bool) -> None:  # noqa: FBT001
    """Wan 2.1 14B with LoRA at 33 frames: does it fit as planned."""
    bench = Bench(rehearse=rehearse)
    update_and_plan(rows, bench, "33 frames", bench.config("wan21_14b", *TWO_STEPS))


def shapes(rows: Rows, rehearse: bool) -> None:  # noqa: FBT001
    """The other families that fit: LTX-Video, and Wan 2.2 5B (the text-to-video side of an image-to-video model)."""
    bench = Bench(rehearse=rehearse)
    for name in ("ltx_video", "wan22_5b"):
        update_and_plan(rows, bench, name, bench.config(name, *TWO_STEPS))


if __name__ == "__main__":
    main(__doc__, {"wan": wan, "levers": levers, "where": where, "wan14b": wan14b, "shapes": shapes})
