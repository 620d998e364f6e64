"""What a latent reward saves, and what it costs: seconds and memory of a step, and the student's measured adherence.

    python benchmarks/latent_reward.py [--latent shapes-latent-reward] [--steps 300] [--clips 256] [--repeats 5]
                                       [--work runs/latent] [--pixel-student FOLDER] -> results/latent_reward.json

Two arms of `--config tiny` without a guard, the same but for the reward: `pixel` (shapes-reward) and `latent`, which
imitates it. Steps
are measured in turn, in seconds of the process's own computing, and the fastest of each is taken: whatever else runs
only adds to them. With --pixel-student that arm is not distilled again; tiny-wan-student had 300 steps and seed 0.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from measure import peak_bytes, write_result
from speed import machine, step_call

from rats_video.assets import resolve_folder
from rats_video.commands.evaluate import score_arms
from rats_video.commands.students import load_student
from rats_video.config.load import load_config
from rats_video.datasets.prompts.split import load_prompts
from rats_video.distillation.method import build_rats
from rats_video.distillation.roles import build_backbone, build_roles
from rats_video.distillation.settings import DistillConfig
from rats_video.evaluation.stats import paired_difference
from rats_video.evaluation.sweep import EvaluatedModel
from rats_video.inference.sampler import SamplerSpec
from rats_video.methods.rats import Rats, rats_step
from rats_video.training.batches import draw_batch
from rats_video.types import PromptBatch

MEMORY_STEPS = 3
NFE = 4


def arms(latent: str) -> dict[str, tuple[str, ...]]:
    """What each arm changes."""
    return {"pixel": ("reward.kind=word",), "latent": ("reward.kind=latent", f"reward.path={latent}")}


def later_call(rats: Rats, batch: PromptBatch) -> Callable[[], None]:
    """A step whose teacher rollout is there already, as with `teacher.cache` in a second run, or `teacher.reuse`."""

    def call() -> None:
        loss, _ = rats_step(rats, batch)
        loss.backward()
        for weight in rats.student.weights.values():
            weight.grad = None

    return call


def measure_steps(cfgs: Mapping[str, DistillConfig], repeats: int) -> dict[str, Any]:
    """CPU seconds of the fastest step and most bytes of live tensors beyond the weights, by arm, and their ratios."""
    calls: dict[str, Callable[[], object]] = {}
    for name, cfg in cfgs.items():
        rats = build_rats(cfg, *build_roles(cfg, build_backbone(cfg, torch.device("cpu"))))
        batch = draw_batch(rats.student, cfg, load_prompts(cfg.prompts).train, 0)
        calls[f"{name}: step"] = step_call(rats, batch)
        apart = replace(rats, teacher=copy.copy(rats.teacher))  # or the other call's rollouts would replace its own
        calls[f"{name}: step, teacher stored"] = later_call(apart, batch)
    taken = dict.fromkeys(calls, float("inf"))
    for _ in range(repeats + 1):  # the first warms up
        for name, call in calls.items():
            began = time.process_time()
            call()
            taken[name] = min(taken[name], time.process_time() - began)
    peaks = {name: peak_bytes(call) for name, call in calls.items()}
    return {
        "repeats": repeats,
        "fastest CPU seconds": {name: round(each, 4) for name, each in taken.items()},
        "time ratio": compared(taken, 3),
        "peak MB beyond weights": {name: round(peak / 1e6, 1) for name, peak in peaks.items()},
        "memory ratio": compared(peaks, 3),
    }


def compared(values: Mapping[str, float], digits: int) -> dict[str, float]:
    """Latent over pixel."""
    return {
        what: round(values[f"latent: {what}"] / values[f"pixel: {what}"], digits)
        for what in ("step", "step, teacher stored")
    }


def distill(options: argparse.Namespace, changes: tuple[str, ...], output: Path) -> float:
    """Distill as a user would; peak resident MB of the process."""
    overrides = ["guard=null", f"teacher.cache={options.work / 'teacher'}", *changes]
    flags = [item for override in overrides for item in ("--set", override)]
    command = ["rats-video", "distill", "--config", "tiny", "--output", str(output), *flags]
    print("+", *command, flush=True)
    process = subprocess.Popen([*command, *(["--resume"] if output.exists() else [])])  # noqa: S603  # our own command
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"distilling {output.name} failed")
    return usage.ru_maxrss / 1e3


def measure_resident(options: argparse.Namespace) -> dict[str, float]:
    """Peak resident MB of a short `rats-video distill` of each arm, Python and libraries included."""
    with tempfile.TemporaryDirectory() as folder:
        return {
            name: round(distill(options, (*changes, f"training.steps={MEMORY_STEPS}"), Path(folder) / name), 1)
            for name, changes in arms(options.latent).items()
        }


def measure_adherence(cfg: DistillConfig, options: argparse.Namespace) -> dict[str, Any]:
    """Both students on the same held-out prompts and noise; the difference is clip by clip, latent - pixel."""
    folders = {}
    for name, changes in arms(options.latent).items():
        folders[name] = options.work / name
        if name == "pixel" and options.pixel_student:
            folders[name] = resolve_folder(options.pixel_student, where="--pixel-student")
        elif not (options.work / name / "student" / "rats.json").is_file():
            distill(options, (*changes, f"training.steps={options.steps}"), options.work / name)
    students = {name: load_student(folder, torch.device("cpu")) for name, folder in folders.items()}
    heldout = load_prompts(cfg.prompts).heldout
    prompts = [heldout[i % len(heldout)] for i in range(options.clips)]
    models = [
        EvaluatedModel(name, loaded.student, SamplerSpec(NFE, loaded.card.shift)) for name, loaded in students.items()
    ]
    scored = score_arms(cfg, models, prompts, students["pixel"].clip, seed=options.seed)
    by_name = {arm.arm: arm for arm in scored}
    pixel, latent = by_name["pixel"], by_name["latent"]
    pairs = {
        name: paired_difference(latent.metrics[name], pixel.metrics[name], pixel.prompts) for name in pixel.metrics
    }
    return {
        "steps": options.steps, "clips": options.clips, "pixel student": options.pixel_student or "distilled here",
        "arms": {name: arm.row().model_dump() for name, arm in by_name.items()},
        "latent - pixel": {name: {"mean": pair.mean, "ci95": pair.ci95} for name, pair in pairs.items()},
    }  # fmt: skip


def main() -> None:
    """Measure and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--latent", default="shapes-latent-reward")
    parser.add_argument("--pixel-student", default=None)
    parser.add_argument("--work", type=Path, default=Path("runs/latent"))
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--clips", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seed", type=int, default=1, help="of the evaluation noise")
    options = parser.parse_args()
    cfgs = {
        name: load_config(DistillConfig, "tiny", group="distill", overrides=changes)
        for name, changes in arms(options.latent).items()
    }
    record = json.loads((resolve_folder(options.latent, where="--latent") / "training.json").read_text())
    write_result("latent_reward", {
        "machine": machine(torch.device("cpu")),
        "agreement with the pixel reward": record["metrics"],
        "step": measure_steps(cfgs, options.repeats),
        "peak resident MB of a run": measure_resident(options),
        "adherence": measure_adherence(cfgs["pixel"], options),
    })  # fmt: skip


if __name__ == "__main__":
    main()
