"""What every packaged configuration of a real model needs on H100 GPUs of 80 GB, as `rats-video plan` says.

    python benchmarks/plans.py [NAME ...]

Writes benchmarks/results/plans.json and plans.md. With names, those rows only.
A GPU is not needed: a plan is a dry run of about 20 s.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from rats_video.commands.plan import run_plan
from rats_video.config.load import load_config
from rats_video.distillation.settings import DistillConfig
from rats_video.planning.memory import GIB

RESULTS = Path(__file__).parent / "results"
BUDGET, DEVICE = 80.0, "h100"
GPUS = {  # as each configuration says it is meant for
    "wan21_1b": 1, "wan21_14b": 1, "wan22_5b": 1, "wan22_a14b": 2, "ltx_video": 1, "hunyuan_video": 1,
    "cogvideox_5b": 1, "cogvideox15_5b": 1, "wan21_i2v_14b": 1, "wan22_i2v_a14b": 2, "wan22_5b_i2v": 1,
    "ltx_video_i2v": 1, "flux1_dev": 1, "sd35_medium": 1, "qwen_image": 1, "flux2_klein_4b": 1,
    "ltx2": 1,
}  # fmt: skip


def planned(name: str, gpus: int) -> dict[str, Any]:
    """The plan of a configuration as it is shipped."""
    cfg = load_config(DistillConfig, name, group="distill")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "plan.json"
        run_plan(
            config=name, overrides=[], gpu_memory=BUDGET, gpus=gpus, device_name=DEVICE, utilisation=None, output=path
        )
        plan = json.loads(path.read_text())
    return {
        "clip": cfg.clip.model_dump(), "gpus": gpus, "clips_a_step": cfg.training.batch_size,
        "needed_gib": plan["needed_bytes"] / GIB, "fits": plan["fits"], "levers": plan["levers"],
        "peak_phase": plan["peak_phase"], "tflops_a_step_and_gpu": sum(plan["tflops"].values()),
        "seconds_a_step": plan["seconds_per_step"], "steps": plan["steps"], "hours": plan["hours"],
        "utilisation": plan["device"]["utilisation"],
    }  # fmt: skip


def table(rows: dict[str, dict[str, Any]]) -> str:
    """The rows as Markdown."""
    lines = [
        "| configuration | clip | GPUs | clips a step | GiB needed | fullest in | TFLOPs/step | s/step | hours |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        clip = "{num_frames} x {height} x {width}".format(**row["clip"])
        lines.append(
            f"| {name} | {clip} | {row['gpus']} | {row['clips_a_step']} | {row['needed_gib']:.1f} "
            f"| {row['peak_phase']} | {row['tflops_a_step_and_gpu']:,.0f} | {row['seconds_a_step']:.0f} "
            f"| {row['hours']:.1f} ({row['steps']} steps) |"
        )
    share = next(iter(rows.values()))["utilisation"]
    note = f"Expected, not measured; TFLOPs of one GPU. An H100 is taken to reach {share:.0%} of its dense peak."
    return "\n".join([*lines, "", note, ""])


def main() -> None:
    """Plan those named, or all, and write both files."""
    path = RESULTS / "plans.json"
    known = json.loads(path.read_text()) if path.exists() else {}
    asked = sys.argv[1:] or list(GPUS)
    rows = {}
    for name, gpus in GPUS.items():
        rows[name] = planned(name, gpus) if name in asked else known[name]
        print(name, f"{rows[name]['needed_gib']:.1f} GiB", rows[name]["levers"], flush=True)
    path.write_text(json.dumps(rows, indent=2) + "\n")
    (RESULTS / "plans.md").write_text(table(rows))


if __name__ == "__main__":
    main()
