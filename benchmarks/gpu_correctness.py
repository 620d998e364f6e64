"""What the GPU computes against the CPU's float32, whose values are computed in the same run: a part of gpu.py.

In float32 (TF32 off) both must agree but for rounding. In bfloat16 the GPU may be twice as far off as the CPU is.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from functools import cache, partial
from pathlib import Path

import torch
from gpu_rows import Row, Rows, bar, main
from torch import Tensor

from rats_video.assets import resolve_folder
from rats_video.backbones.compute import LoraConfig
from rats_video.backbones.kinds import load_backbone
from rats_video.config.load import load_config
from rats_video.datasets.prompts.split import load_prompts
from rats_video.diffusion.rollout import rollout
from rats_video.distillation.method import build_rats
from rats_video.distillation.roles import build_backbone, build_roles
from rats_video.distillation.settings import DistillConfig
from rats_video.inference.sampler import SamplerSpec, clip_noise, sample_batch
from rats_video.seeds import seeded
from rats_video.training.loop import train_loop
from rats_video.training.metrics import read_metrics
from rats_video.training.run_folder import RunFolder

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "tests" / "fixtures"))

from contract import FAMILIES, PROMPTS  # noqa: E402  # the tests' families
from family import Family  # noqa: E402

Values = Mapping[str, Tensor]
TRACED = ("loss", "reward/student", "reward/teacher", "gate/weight", "shaping/0.900", "shaping/0.000", "grad_norm")
TRACE = (
    "guard=null", "training.steps=6", "training.batch_size=2", "training.optimizer.warmup_steps=2",
    "teacher.num_steps=8",
)  # fmt: skip
CLOSE, CLOSE_TRACE, HALF = 1e-4, 1e-2, 1e-2
"""Relative errors of norms: of one computation in float32, of six updates, and the least that bfloat16 may have."""


def correctness(rows: Rows, rehearse: bool) -> None:  # noqa: FBT001
    """A loss trace, samples and each family's contract on the GPU; last the golden trace on this machine's CPU."""
    torch.backends.cudnn.allow_tf32 = False
    device = torch.device("cpu" if rehearse else "cuda")
    checks: dict[str, tuple[Callable[[torch.device, torch.dtype], Values], float]] = {
        "loss trace of tiny": (trace, CLOSE_TRACE),
        "samples of tiny-wan": (samples, CLOSE),
    }
    with tempfile.TemporaryDirectory() as folder:
        for family in FAMILIES:
            checks[f"contract of {family.name}"] = (partial(contract, family, Path(folder) / family.name), CLOSE)
        for name, (compute, close) in checks.items():
            on_cpu = cache(partial(compute, torch.device("cpu")))
            rows.add(f"{name}, float32", partial(in_float32, compute, on_cpu, device, close))
            rows.add(f"{name}, bfloat16", partial(in_bfloat16, compute, on_cpu, device))
    rows.add("golden trace on the CPU", golden)


def golden() -> Row:
    """The test of the kept trace: it says that this machine's CPU values are the right ones."""
    test = "tests/methods/test_loss_trace.py"
    command = [sys.executable, "-P", "-m", "pytest", "-p", "no:cacheprovider", test]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)  # noqa: S603
    print(done.stdout, done.stderr)
    return {"bars": {"exit code": bar(done.returncode, at_most=0)}}


def in_float32(
    compute: Callable[[torch.device, torch.dtype], Values], on_cpu: Callable[[torch.dtype], Values],
    device: torch.device, close: float,
) -> Row:  # fmt: skip
    """Each value's relative error."""
    errors = off(compute(device, torch.float32), on_cpu(torch.float32))
    return {"bars": {name: bar(error, at_most=close) for name, error in errors.items()}}


def in_bfloat16(
    compute: Callable[[torch.device, torch.dtype], Values], on_cpu: Callable[[torch.dtype], Values],
    device: torch.device,
) -> Row:  # fmt: skip
    """Each value's relative error against float32, beside the CPU's own."""
    right = on_cpu(torch.float32)
    errors, usual = off(compute(device, torch.bfloat16), right), off(on_cpu(torch.bfloat16), right)
    return {"bars": {name: bar(error, at_most=max(2 * usual[name], HALF)) for name, error in errors.items()}}


def off(ours: Values, right: Values) -> dict[str, float]:
    """`||ours - right|| / ||right||` of each value; a NaN stays one, and keeps no bar."""
    return {
        name: float((ours[name].double().cpu() - value.double().cpu()).norm() / value.double().cpu().norm())
        for name, value in right.items()
    }


def trace(device: torch.device, dtype: torch.dtype) -> Values:
    """Six updates of the embedded model: what each step logs."""
    settings = (*TRACE, f"compute.dtype={str(dtype).removeprefix('torch.')}")
    cfg = load_config(DistillConfig, "tiny", group="distill", overrides=settings)
    rats = build_rats(cfg, *build_roles(cfg, build_backbone(cfg, device)))
    with tempfile.TemporaryDirectory() as folder:
        train_loop(rats, cfg, load_prompts(cfg.prompts).train, RunFolder(Path(folder)))
        logged = read_metrics(Path(folder) / "metrics.jsonl")
    assert len(logged) == cfg.training.steps
    return {key: torch.tensor([row[key] for row in logged]) for key in TRACED}


def samples(device: torch.device, dtype: torch.dtype) -> Values:
    """Four guided steps of the embedded teacher on two prompts."""
    cfg = load_config(DistillConfig, "tiny", group="distill")
    backbone = load_backbone(resolve_folder("tiny-wan", where="model"), device, dtype)
    noise = torch.cat([clip_noise(backbone, cfg.clip.spec, 0, index) for index in range(2)])
    videos, latents = sample_batch(backbone, PROMPTS, noise, SamplerSpec(4, cfg.shift, guidance_scale=2.0))
    return {"latents": latents, "pixels": videos}


def contract(family: Family, folder: Path, device: torch.device, dtype: torch.dtype) -> Values:
    """Text, velocity, a rollout, its pixels, and an adapter's gradient of a tiny random model of the family."""
    if not folder.exists():
        family.build(folder)
    backbone = load_backbone(folder, device, dtype)
    backbone.fps = family.clip.fps
    noise = backbone.sample_noise(2, family.clip, seeded(3))
    sigmas, text = backbone.sigmas(4, 3.0), backbone.encode_text(PROMPTS)
    with torch.no_grad():
        velocity = backbone.velocity(noise, sigmas[[1, 3]].to(device), text)
        x0 = rollout(backbone.velocity, noise, sigmas, text).x0
        pixels = backbone.decode(noise)  # of the same latents everywhere
    torch.manual_seed(0)
    student = backbone.with_adapter("student", LoraConfig(kind="lora", rank=2, alpha=2))
    for weight in student.weights.values():
        weight.data = torch.randn(weight.shape).mul(0.1).to(weight)
    student.velocity(noise, sigmas[[1, 3]].to(device), text).square().mean().backward()
    gradients = [weight.grad.flatten() for weight in student.weights.values() if weight.grad is not None]
    assert gradients
    return {
        "text": text.embeds.float(), "velocity": velocity, "latents": x0, "pixels": pixels,
        "gradient": torch.cat(gradients),
    }  # fmt: skip


if __name__ == "__main__":
    main(__doc__, {"correctness": correctness})
