"""Every arm of a study distilled with the same seed, prompts and noise, then judged on the same held-out clips.

    python benchmarks/proof.py [proof | long | teachers | policy] [--config tiny] [--work runs/proof] [--clips 1024]
                               [--jobs 2] [--set key=value ...]

Distills the study's students (skipping those that are done), samples them beside the teacher and the base model, and
writes benchmarks/results/STUDY.json, STUDY.md and STUDY_pairs.json. A frozen teacher's rollouts are computed once and
shared. `proof` asks whether RATS and its gate help, `long` what three times the training does, `teachers` which teacher
serves best, `policy` what a reward without gradient, the measured adherence itself, can teach. Give each study a --work
folder of its own.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path

from commands import run_all, sets

RESULTS = Path(__file__).parent / "results"

LONG = "training.steps=900"
FLOOR = "method.gate.floor=0.2"  # the default when `long` and `teachers` were made
EMA = ("teacher.kind=ema", "teacher.decay=0.98", FLOOR)
SHORT = "training.steps=120"
IMITATION = ("method.gate.kind=constant", "method.gate.weight=1", "method.reward_weight=0")
MEASURED = "reward={kind: custom, target: 'examples.measured_adherence:adherence'}"
POLICY = ("method.policy={samples: 8, noise: 0.5}", MEASURED)
NO_GUARD = "guard=null"  # every arm's student is its last one

# What each arm of a study changes in the configuration; everything else is the same.
STUDIES: dict[str, dict[str, tuple[str, ...]]] = {
    "proof": {
        "imitation": IMITATION,
        "reward_only": ("method.alpha=0",),
        "no_gate": ("method.gate.kind=constant", "method.gate.weight=1"),
        "rats_clip": ("method.gate.level=clip",),
        "rats_frame": ("method.gate.level=frame",),
    },
    "long": {
        "reward_only": ("method.alpha=0", LONG),
        "rats_frame": (LONG, FLOOR),
    },
    "teachers": {
        "rats_frame": (FLOOR,),  # with a frozen teacher
        "ema_guided": (*EMA, "teacher.guidance_scale=2", "teacher.guidance_end=2"),
        "ema_fading": (*EMA, "teacher.guidance_scale=2", "teacher.guidance_end=1", "teacher.guidance_fade_steps=100"),
        "ema_unguided": (*EMA, "teacher.guidance_scale=1", "teacher.guidance_end=1"),
    },
    "policy": {
        "imitation": (*IMITATION, SHORT),
        "policy": (*POLICY, SHORT),
    },
}
BASE_NFE = (3, 4, 5, 8)
STUDENT_NFE = 4
# Each pair's difference is estimated clip by clip, on the same prompt and noise.
PAIRS = {
    "proof": (
        ("rats_frame", "teacher"),
        ("rats_clip", "teacher"),
        ("rats_frame", "imitation"),
        ("rats_frame", "reward_only"),
        ("rats_frame", "no_gate"),
        ("rats_frame", "rats_clip"),
    ),
    "long": (("rats_frame", "teacher"), ("rats_frame", "reward_only")),
    "teachers": tuple(("rats_frame", ema) for ema in ("ema_guided", "ema_fading", "ema_unguided")),
    "policy": (("policy", "imitation"), ("policy", "teacher")),
}


def distill_command(arm: str, options: argparse.Namespace) -> list[str]:
    """The command that a user would type for this arm."""
    changes = STUDIES[options.study][arm]
    cache = [] if "teacher.kind=ema" in changes else [f"teacher.cache={options.work / 'teacher'}"]
    overrides = sets([NO_GUARD, *cache, *options.set, *changes])
    return ["distill", "--config", options.config, "--output", str(options.work / arm), *overrides]


def distill_arms(options: argparse.Namespace) -> None:
    """Distill all arms that are not done, `jobs` at a time."""
    missing = [arm for arm in STUDIES[options.study] if not (options.work / arm / "student" / "rats.json").is_file()]
    commands = [distill_command(arm, options) for arm in missing]
    run_all(commands, options.jobs, RATS_VIDEO_TRUST_CODE="1")  # the code is our own example


def judge(options: argparse.Namespace) -> None:
    """Score teacher, base and all students on the same prompts and noise; write the table and the raw rows."""
    from rats_video.commands.device import pick_device
    from rats_video.commands.evaluate import score_arms
    from rats_video.commands.runs import load_run
    from rats_video.commands.students import load_student
    from rats_video.datasets.prompts.split import load_prompts
    from rats_video.evaluation.stats import paired_difference
    from rats_video.evaluation.sweep import EvaluatedModel
    from rats_video.evaluation.tables import headline, markdown_table, write_rows
    from rats_video.inference.sampler import SamplerSpec

    device = pick_device("auto")
    students = {arm: load_student(options.work / arm, device) for arm in STUDIES[options.study]}
    name, first = next(iter(students.items()))
    _, cfg = load_run(options.work / name)
    teacher = SamplerSpec(cfg.evaluation.teacher_steps, cfg.shift, cfg.evaluation.guidance_scale)
    arms = [EvaluatedModel("teacher", first.base, teacher)]
    arms += [EvaluatedModel("base", first.base, SamplerSpec(nfe, cfg.shift)) for nfe in BASE_NFE]
    arms += [EvaluatedModel(name, loaded.student, loaded.spec(STUDENT_NFE)) for name, loaded in students.items()]
    heldout = load_prompts(cfg.prompts).heldout
    prompts = [heldout[i % len(heldout)] for i in range(options.clips)]
    scores = score_arms(cfg, arms, prompts, first.clip, seed=options.seed)

    rows = [arm.row() for arm in scores]
    write_rows(rows, RESULTS / f"{options.study}.json")
    table = markdown_table([headline(row) for row in rows])
    (RESULTS / f"{options.study}.md").write_text(table + "\n", encoding="utf-8")
    by_name = {arm.arm: arm for arm in scores if arm.arm != "base"}
    pairs = {}
    for ours, theirs in PAIRS[options.study]:
        names = by_name[ours].metrics
        estimates = {
            name: paired_difference(by_name[ours].metrics[name], by_name[theirs].metrics[name], by_name[ours].prompts)
            for name in names
        }
        pairs[f"{ours} - {theirs}"] = {n: {"mean": e.mean, "ci95": e.ci95} for n, e in estimates.items()}
    (RESULTS / f"{options.study}_pairs.json").write_text(json.dumps(pairs, indent=2) + "\n")
    print(table)


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse, distill, judge."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", nargs="?", choices=STUDIES, default="proof")
    parser.add_argument("--config", default="tiny")
    parser.add_argument("--work", type=Path, default=Path("runs/proof"))
    parser.add_argument("--clips", type=int, default=1024)
    parser.add_argument("--seed", type=int, default=1, help="of the evaluation noise")
    parser.add_argument("--jobs", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    options = parser.parse_args(arguments)
    distill_arms(options)
    judge(options)


if __name__ == "__main__":
    main()
