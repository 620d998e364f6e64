"""What prevents reward hacking: the same distillation with each remedy, over seeds, the best student beside the last.

    python benchmarks/guard.py [--judge blind | sighted] [--arms NAME ...] [--seeds 0 1 2] [--work runs/guard]
                               [--clips 256] [--jobs 1] [--set key=value ...]

Distills every arm with every seed (skipping those that are done) and measures each run's two students, the one that
the guard kept and the last one, on the same held-out clips as the 50-step teacher. Writes guard_JUDGE.json and .md into
benchmarks/results, beside what they hold of the same clips already. `sighted` is the default reward. `blind` is the
same reward told to ignore colours: a judge with a blind spot, so that what the student does behind its back can be
measured. The held-out reward sees everything, and is in no loss but those of the arms that say so.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from commands import run_all, sets

RESULTS = Path(__file__).parent / "results"
ATTRIBUTES = ("speed", "color", "shape", "direction", "background")
SHOWN = ("adherence", "color", "reward", "heldout_reward")
STUDENT_NFE = 4

COLORS = "[red,green,blue,yellow,purple,cyan]"
JUDGES = {"sighted": {"path": "shapes-reward"}, "blind": {"path": "shapes-reward", "blind_to": COLORS}}

# What each arm changes in the configuration; TRAINED and HELDOUT stand for the two rewards.
SUM = "reward={kind: sum, terms: {trained: {weight: %s, reward: TRAINED}, heldout: {weight: %s, reward: HELDOUT}}}"
CONSTANT = ("method.gate.kind=constant", "method.gate.weight=1")
ARMS: dict[str, tuple[str, ...]] = {
    "reward_only": ("method.alpha=0",),
    "published_gate": ("method.gate.floor=0",),
    "floor_0.2": ("method.gate.floor=0.2",),
    "floor_0.5": ("method.gate.floor=0.5",),
    "constant": CONSTANT,
    "constant_x4": (*CONSTANT, "method.alpha=4"),
    "margin": ("method.gate.floor=0.2", "method.reward_margin=0.1"),
    "drift": ("method.gate.floor=0.2", "method.drift_weight=0.3"),
    "small_steps": ("method.gate.floor=0", "training.optimizer.lr=1e-4"),
    "heldout_gate": (SUM % (1, 0), "method.gate.floor=0", "method.gate.part=heldout"),
    "ensemble": (SUM % (0.5, 0.5), "method.gate.floor=0"),
    "strengthen": ("method.gate.floor=0.2", "guard.on_alarm=shape"),
}
"""`heldout_gate` and `ensemble` use up the held-out reward: theirs is no longer held out."""


def overrides(arm: str, judge: str) -> list[str]:
    """The `--set` values of an arm."""
    trained = _flow({"kind": "word", **JUDGES[judge]})
    heldout = _flow({"kind": "word", "path": "shapes-reward-heldout"})
    changes = [change.replace("TRAINED", trained).replace("HELDOUT", heldout) for change in ARMS[arm]]
    return [f"reward={trained}", *changes]


def _flow(reward: Mapping[str, str]) -> str:
    return "{" + ", ".join(f"{key}: {value}" for key, value in reward.items()) + "}"


def run_folder(options: argparse.Namespace, arm: str, seed: int) -> Path:
    """Where a run lies."""
    return Path(options.work) / options.judge / f"{arm}-{seed}"


def distill_all(options: argparse.Namespace) -> None:
    """Distill all that is not done, `jobs` at a time."""
    folders = {(arm, seed): run_folder(options, arm, seed) for seed in options.seeds for arm in options.arms}
    cache = f"teacher.cache={Path(options.work) / 'teacher'}"
    commands = [
        ["distill", "--config", options.config, "--seed", str(seed), "--output", str(folder),
         *sets([cache, *options.set, *overrides(arm, options.judge)])]
        for (arm, seed), folder in folders.items()
        if not (folder / "student" / "rats.json").is_file()
    ]  # fmt: skip
    run_all(commands, options.jobs)


def measure(options: argparse.Namespace) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """The teacher's means, and a row for each run's best and last student; what is measured already is read again."""
    from rats_video.commands.device import pick_device
    from rats_video.commands.evaluate import score_arms
    from rats_video.commands.runs import load_run
    from rats_video.commands.students import load_student
    from rats_video.datasets.prompts.split import load_prompts
    from rats_video.evaluation.sweep import EvaluatedModel
    from rats_video.inference.sampler import SamplerSpec
    from rats_video.training.checkpoint import list_checkpoints, steps_done
    from rats_video.training.restore import load_student_weights

    device, rows = pick_device("auto"), []
    teacher_file = Path(options.work) / options.judge / f"teacher-{options.clips}.json"
    for arm in options.arms:
        for seed in options.seeds:
            folder = run_folder(options, arm, seed)
            measured = folder / f"measured-{options.clips}.json"
            if not measured.is_file() or not teacher_file.is_file():
                loaded, (_, cfg) = load_student(folder, device), load_run(folder)
                heldout = load_prompts(cfg.prompts).heldout
                prompts = [heldout[i % len(heldout)] for i in range(options.clips)]

                def scores(arm: EvaluatedModel) -> dict[str, float]:
                    (scored,) = score_arms(cfg, [arm], prompts, loaded.clip, seed=options.seed)  # noqa: B023
                    return {name: value.mean for name, value in scored.row().metrics.items()}

                if not teacher_file.is_file():
                    guided = SamplerSpec(cfg.evaluation.teacher_steps, cfg.shift, cfg.evaluation.guidance_scale)
                    teacher_file.write_text(json.dumps(scores(EvaluatedModel("teacher", loaded.base, guided))))
                best = {
                    "step": loaded.card.steps,
                    **scores(EvaluatedModel("best", loaded.student, loaded.spec(STUDENT_NFE))),
                }
                newest = list_checkpoints(folder / "checkpoints")[-1]
                last = {**best, "step": steps_done(newest)}
                if last["step"] != best["step"]:
                    load_student_weights(newest, loaded.student.weights)
                    last |= scores(EvaluatedModel("last", loaded.student, loaded.spec(STUDENT_NFE)))
                measured.write_text(json.dumps({"best": best, "last": last}))
            for which, metrics in json.loads(measured.read_text()).items():
                step = metrics.pop("step")
                rows.append({"arm": arm, "seed": seed, "student": which, "step": step, "metrics": metrics})
    return json.loads(teacher_file.read_text()), rows


def worst_change(row: Mapping[str, Any], teacher: Mapping[str, float]) -> tuple[float, str]:
    """The attribute that fell most under the teacher's, and by how much."""
    return min((row["metrics"][name] - teacher[name], name) for name in ATTRIBUTES)


def table(teacher: Mapping[str, float], rows: Sequence[Mapping[str, Any]]) -> str:
    """One line an arm and kind of student: means over seeds, and the worst that happened to any attribute."""
    lines = [
        "| arm | student | seeds | step | adherence | colour | worst change | trained reward | held-out reward |",
        "| --- | --- | ---: | ---: | ---: | ---: | --- | ---: | ---: |",
        "| teacher | 50 steps | | | " + " | ".join(f"{teacher[n]:.3f}" for n in SHOWN[:2])
        + " | | " + " | ".join(f"{teacher[n]:.3f}" for n in SHOWN[2:]) + " |",
    ]  # fmt: skip
    for arm, which in dict.fromkeys((row["arm"], row["student"]) for row in rows):
        group = [row for row in rows if (row["arm"], row["student"]) == (arm, which)]
        mean = {name: sum(row["metrics"][name] for row in group) / len(group) for name in SHOWN}
        change, attribute = min(worst_change(row, teacher) for row in group)
        steps = ", ".join(str(row["step"]) for row in group)
        lines.append(
            f"| {arm} | {which} | {len(group)} | {steps} | {mean['adherence']:.3f} | {mean['color']:.3f} "
            f"| {change:+.3f} {attribute} | {mean['reward']:.3f} | {mean['heldout_reward']:.3f} |"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse, distill, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--judge", choices=JUDGES, default="blind")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--config", default="tiny")
    parser.add_argument("--work", type=Path, default=Path("runs/guard"))
    parser.add_argument("--clips", type=int, default=256)
    parser.add_argument("--seed", type=int, default=1, help="of the evaluation noise")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    options = parser.parse_args(arguments)
    distill_all(options)
    teacher, measured = measure(options)
    results = RESULTS / f"guard_{options.judge}.json"
    before = json.loads(results.read_text()) if results.is_file() else {}
    rows = [*(before["rows"] if before.get("teacher") == teacher else []), *measured]
    rows = list({(row["arm"], row["seed"], row["student"]): row for row in rows}.values())
    content = {"judge": options.judge, "clips": options.clips, "teacher": teacher, "rows": rows}
    results.write_text(json.dumps(content, indent=2) + "\n")
    shown = table(teacher, rows)
    (RESULTS / f"guard_{options.judge}.md").write_text(shown + "\n")
    print(shown)


if __name__ == "__main__":
    main()
