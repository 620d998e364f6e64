"""The proof: every arm distilled with the same seed, prompts and noise, then judged on the same held-out clips.

    python benchmarks/proof.py [--config tiny] [--work runs/proof] [--clips 256] [--jobs 2] [--set key=value ...]

Distills five students (skipping those that are done), samples them beside the teacher and the base model, and writes
benchmarks/results/proof.json, proof.md and proof_pairs.json. A frozen teacher's rollouts are computed once and shared.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

RESULTS = Path(__file__).parent / "results"

# What each arm changes in the configuration; everything else is the same.
ARMS: dict[str, tuple[str, ...]] = {
    "imitation": ("method.gate.kind=constant", "method.gate.weight=1", "method.reward_weight=0"),
    "reward_only": ("method.alpha=0",),
    "no_gate": ("method.gate.kind=constant", "method.gate.weight=1"),
    "rats_clip": ("method.gate.level=clip",),
    "rats_frame": ("method.gate.level=frame",),
}
BASE_NFE = (3, 4, 5, 8)
STUDENT_NFE = 4
PAIRS = (
    ("rats_frame", "teacher"),
    ("rats_clip", "teacher"),
    ("rats_frame", "imitation"),
    ("rats_frame", "reward_only"),
    ("rats_frame", "no_gate"),
    ("rats_frame", "rats_clip"),
)


def distill_command(arm: str, options: argparse.Namespace) -> list[str]:
    """The command that a user would type for this arm."""
    overrides = [f"teacher.cache={options.work / 'teacher'}", *options.set, *ARMS[arm]]
    flags = [item for override in overrides for item in ("--set", override)]
    return ["rats-video", "distill", "--config", options.config, "--output", str(options.work / arm), *flags]


def distill_arms(options: argparse.Namespace) -> None:
    """Distill all arms that are not done, `jobs` at a time, the first alone where a teacher's rollouts are shared."""
    waiting = [arm for arm in ARMS if not (options.work / arm / "student" / "rats.json").is_file()]
    threads = {**os.environ, "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // options.jobs))}
    running: dict[str, subprocess.Popen[bytes]] = {}
    while waiting or running:
        while waiting and len(running) < options.jobs:
            arm = waiting.pop(0)
            command = distill_command(arm, options)
            if (options.work / arm).exists():
                command.append("--resume")
            print("+", *command, flush=True)
            running[arm] = subprocess.Popen(command, env=threads)  # noqa: S603  # our own command
        arm = next(iter(running))
        if running.pop(arm).wait() != 0:
            sys.exit(f"distilling {arm} failed")


def judge(options: argparse.Namespace) -> None:
    """Score teacher, base and all students on the same prompts and noise; write the table and the raw rows."""
    from rats_video.build.common import pick_device
    from rats_video.build.inference import load_run, load_student, score_arms
    from rats_video.datasets.prompts import load_prompts
    from rats_video.evaluation.stats import paired_difference
    from rats_video.evaluation.sweep import Arm
    from rats_video.evaluation.tables import headline, markdown_table, write_rows
    from rats_video.inference.sampler import SamplerSpec

    device = pick_device("auto")
    students = {arm: load_student(options.work / arm, device) for arm in ARMS}
    _, cfg = load_run(options.work / "rats_frame")
    first = students["rats_frame"]
    teacher = SamplerSpec(cfg.evaluation.teacher_steps, cfg.shift, cfg.evaluation.guidance_scale)
    arms = [Arm("teacher", first.base, teacher)]
    arms += [Arm("base", first.base, SamplerSpec(nfe, cfg.shift)) for nfe in BASE_NFE]
    arms += [Arm(name, loaded.student, loaded.spec(STUDENT_NFE)) for name, loaded in students.items()]
    heldout = load_prompts(cfg.prompts).heldout
    prompts = [heldout[i % len(heldout)] for i in range(options.clips)]
    scores = score_arms(cfg, arms, prompts, first.clip, seed=options.seed)

    rows = [arm.row() for arm in scores]
    write_rows(rows, RESULTS / "proof.json")
    table = markdown_table([headline(row) for row in rows])
    (RESULTS / "proof.md").write_text(table + "\n", encoding="utf-8")
    by_name = {arm.arm: arm for arm in scores if arm.arm != "base"}
    pairs = {}
    for ours, theirs in PAIRS:
        names = by_name[ours].metrics
        estimates = {
            name: paired_difference(by_name[ours].metrics[name], by_name[theirs].metrics[name], by_name[ours].prompts)
            for name in names
        }
        pairs[f"{ours} - {theirs}"] = {n: {"mean": e.mean, "ci95": e.ci95} for n, e in estimates.items()}
    (RESULTS / "proof_pairs.json").write_text(json.dumps(pairs, indent=2) + "\n")
    print(table)


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse, distill, judge."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="tiny")
    parser.add_argument("--work", type=Path, default=Path("runs/proof"))
    parser.add_argument("--clips", type=int, default=256)
    parser.add_argument("--seed", type=int, default=1, help="of the evaluation noise")
    parser.add_argument("--jobs", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    options = parser.parse_args(arguments)
    distill_arms(options)
    judge(options)


if __name__ == "__main__":
    main()
