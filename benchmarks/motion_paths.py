"""Whether a few-step student still follows the motion path it is given: FlashMotion's question (arXiv 2603.12146).

    python benchmarks/motion_paths.py [--arms NAME ...] [--work runs/motion_paths] [--clips 256] [--jobs 1]
                                      [--set key=value ...]

Teaches the embedded default to follow paths (`rats-video train paths`), distills it by imitation, by reward alone and
by RATS (`--config tiny-paths`), skipping what is done, and measures all on held-out captions and paths from the same
noise. The reward does not look at how things move. The arms `_pulled` have one that does, and wants what the captions
say: a straight line at an even pace, against the path. Two arms say what no control at all would give: the teacher's
clips held against another path of the same caption, and the teacher without a path. Writes
benchmarks/results/motion_paths.json and docs/motion_paths.png.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from commands import run_all, sets
from measure import write_result
from torch import Tensor

from rats_video.commands.device import pick_device
from rats_video.commands.runs import load_run
from rats_video.commands.students import LoadedStudent, load_student
from rats_video.datasets.prompts.split import load_prompts
from rats_video.datasets.shapes.measure import read_paths
from rats_video.datasets.shapes.paths import measure_paths
from rats_video.distillation.measures import build_measures
from rats_video.distillation.settings import DistillConfig
from rats_video.evaluation.stats import mean_ci95, paired_difference
from rats_video.inference.sampler import SamplerSpec, sample_videos
from rats_video.motion_path import split_path
from rats_video.types import Backbone, ClipSpec

CONFIG = "tiny-paths"
STEPS = 4
PULLED = "reward.blind_to=[]"
REFL = "method={kind: refl, last_steps: 1}"
ARMS: dict[str, tuple[str, ...]] = {
    "imitation": ("method={kind: imitation, shaping: {motion_weight: 0.5}}",),
    "rats": (),
    "rats_x4": ("method.alpha=4",),
    "refl": (REFL,),
    "rats_pulled": (PULLED,),
    "refl_pulled": (REFL, PULLED),
}
PAIRS = (
    ("rats", "teacher"), ("rats", "imitation"), ("rats", "refl"), ("rats_x4", "rats"), ("rats_x4", "refl"),
    ("rats_pulled", "refl_pulled"),
)  # fmt: skip
SHOWN = ("path_distance", "on_path", "look", "reward", "heldout_reward")
DRAWN = ("teacher", "base", "imitation", "rats", "rats_x4", "refl")
NUM_DRAWN = 5
PICTURE = Path(__file__).parents[1] / "docs" / "motion_paths.png"


def make_models(options: argparse.Namespace) -> None:
    """Train the base and distill the arms that are not done, as a user would."""
    base = options.work / "base"
    if not (base / "training.json").is_file():
        run_all([["train", "paths", "--config", "tiny", "--output", str(base)]], jobs=1)
    missing = [arm for arm in options.arms if not (options.work / arm / "student" / "rats.json").is_file()]
    # The teacher's rollouts are computed once and shared; without guard, every arm's student is its last one.
    shared = [f"model={base}", f"teacher.cache={options.work / 'teacher'}", "guard=null", *options.set]
    run_all(
        [
            ["distill", "--config", CONFIG, "--output", str(options.work / arm), *sets((*shared, *ARMS[arm]))]
            for arm in missing
        ],
        jobs=options.jobs,
    )


@dataclass
class Judged:
    """What an arm made: values of each metric, one a clip, and the first clips."""

    nfe: int
    metrics: dict[str, list[float]] = field(default_factory=dict)
    videos: list[Tensor] = field(default_factory=list)

    def add(self, values: dict[str, Tensor]) -> None:
        """Measures of some more clips."""
        for name, found in values.items():
            self.metrics.setdefault(name, []).extend(found.tolist())


class Judge:
    """Samples arms on the same prompts and noise, and measures them."""

    def __init__(self, cfg: DistillConfig, clip: ClipSpec, prompts: Sequence[str], seed: int) -> None:
        self.cfg, self.clip, self.prompts, self.seed = cfg, clip, list(prompts), seed
        self.measures = build_measures(cfg, pick_device("auto"))

    def judge(self, model: Backbone, spec: SamplerSpec, given: Sequence[str], keep: int = NUM_DRAWN) -> Judged:
        """Clips of the prompts `given`, measured by the prompts with their paths; the first `keep` are kept."""
        print(f"judging {spec.num_steps} steps", flush=True)
        judged = Judged(spec.nfe)
        asked = iter(self.prompts)
        batch = self.cfg.evaluation.batch_size
        with torch.no_grad():
            for samples in sample_videos(model, given, self.clip, spec, seed=self.seed, batch_size=batch):
                prompts = [next(asked) for _ in samples.prompts]
                found: dict[str, Tensor] = {}
                for measure in self.measures:
                    found |= measure(samples.videos, prompts)
                # How it moves is the path's to say: what is left of adherence is how it looks.
                found["look"] = torch.stack([found[name] for name in ("color", "shape", "background")]).mean(0)
                judged.add(found | measure_paths(samples.videos, prompts))
                judged.videos += [video.clone() for video in samples.videos[: keep - len(judged.videos)]]
        return judged

    def swapped(self, judged: Judged) -> Judged:
        """The same clips held against the next path of the same caption."""
        captions = [split_path(prompt)[0] for prompt in self.prompts]
        others = [next(i for i in around(index, len(captions)) if captions[i] == captions[index])
                  for index in range(len(captions))]  # fmt: skip
        made = Judged(judged.nfe)
        made.add(measure_paths(torch.stack(judged.videos), [self.prompts[i] for i in others]))
        return made


def around(index: int, count: int) -> list[int]:
    """All other indices, the next one first, and last of all itself."""
    return [(index + step) % count for step in range(1, count + 1)]


def summary(judged: Judged, captions: Sequence[str]) -> dict[str, Any]:
    """Means with 95% intervals over captions; clips without any shape have no distance, and are counted."""
    row: dict[str, Any] = {"nfe": judged.nfe, "num_clips": len(captions)}
    for name in (name for name in SHOWN if name in judged.metrics):
        pairs = [(v, c) for v, c in zip(judged.metrics[name], captions, strict=True) if math.isfinite(v)]
        estimate = mean_ci95([value for value, _ in pairs], [caption for _, caption in pairs])
        row[name] = {"mean": estimate.mean, "ci95": estimate.ci95}
    row["clips without a shape"] = sum(map(math.isnan, judged.metrics["path_distance"]))
    return row


def difference(ours: Judged, theirs: Judged, captions: Sequence[str]) -> dict[str, dict[str, float]]:
    """Paired differences, clip by clip."""
    found = {}
    for name in SHOWN:
        rows = zip(ours.metrics[name], theirs.metrics[name], captions, strict=True)
        one, other, groups = zip(*((a, b, c) for a, b, c in rows if math.isfinite(a + b)), strict=True)
        estimate = paired_difference(one, other, groups)
        found[name] = {"mean": estimate.mean, "ci95": estimate.ci95}
    return found


def draw(prompts: Sequence[str], arms: dict[str, Judged], file: Path) -> None:
    """A row a prompt, a column an arm: the last frame, the asked path in black on white, the made one in magenta."""
    from matplotlib import patheffects
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(len(prompts), len(arms), figsize=(1.5 * len(arms), 1.62 * len(prompts)), squeeze=False)
    outline = [patheffects.withStroke(linewidth=3, foreground="white")]
    for row, prompt in enumerate(prompts):
        asked = torch.tensor(split_path(prompt)[1])
        for axis, (name, judged) in zip(axes[row], arms.items(), strict=True):
            video = judged.videos[row]
            size = torch.tensor([video.shape[-1], video.shape[-2]])
            made, seen = (part[0] for part in read_paths(video[None].cpu()))
            axis.imshow(video[-1].permute(1, 2, 0).cpu().numpy(), extent=(0, size[0], size[1], 0))
            axis.plot(*(asked * size).T.numpy(), "o-", color="black", ms=3, lw=1, path_effects=outline)
            axis.plot(*(made * size)[seen].T.numpy(), ".-", color="magenta", ms=3, lw=1)
            axis.set(xticks=[], yticks=[], xlim=(0, size[0]), ylim=(size[1], 0))
            if row == 0:
                axis.set_title(f"{name}, {judged.nfe} calls", fontsize=7)
    figure.tight_layout(pad=0.3)
    figure.savefig(file, dpi=80)
    plt.close(figure)


def table(rows: dict[str, dict[str, Any]]) -> str:
    """One line an arm."""
    lines = [f"| arm | NFE | {' | '.join(SHOWN)} |", f"| --- | ---: |{' ---: |' * len(SHOWN)}"]
    for name, row in rows.items():
        cells = [f"{row[m]['mean']:.3f} ± {row[m]['ci95']:.3f}" if m in row else "" for m in SHOWN]
        lines.append(f"| {name} | {row['nfe']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse, train, distill, judge, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("runs/motion_paths"))
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS), help="rats must be among them")
    parser.add_argument("--clips", type=int, default=256)
    parser.add_argument("--seed", type=int, default=1, help="of the evaluation noise")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    options = parser.parse_args(arguments)
    make_models(options)

    device = pick_device("auto")
    students: dict[str, LoadedStudent] = {arm: load_student(options.work / arm, device) for arm in options.arms}
    first, (_, cfg) = students["rats"], load_run(options.work / "rats")
    prompts = load_prompts(cfg.prompts).heldout[: options.clips]
    captions = [split_path(prompt)[0] for prompt in prompts]
    teacher = SamplerSpec(cfg.evaluation.teacher_steps, cfg.shift, cfg.evaluation.guidance_scale)
    judge = Judge(cfg, first.clip, prompts, options.seed)
    arms = {
        "teacher": judge.judge(first.base, teacher, prompts, keep=len(prompts)),
        "base": judge.judge(first.base, SamplerSpec(STEPS, cfg.shift), prompts),
        **{arm: judge.judge(loaded.student, loaded.spec(STEPS), prompts) for arm, loaded in students.items()},
    }
    controls = {
        "teacher, another path": judge.swapped(arms["teacher"]),
        "teacher, no path": judge.judge(first.base, teacher, captions),
    }
    rows = {name: summary(judged, captions) for name, judged in {**arms, **controls}.items()}
    pairs = {
        f"{one} - {other}": difference(arms[one], arms[other], captions)
        for one, other in PAIRS
        if {one, other} <= {*arms}
    }
    write_result("motion_paths", {"training steps": cfg.training.steps, "arms": rows, "pairs": pairs})
    draw(prompts[:NUM_DRAWN], {name: arms[name] for name in DRAWN if name in arms}, PICTURE)
    print(table(rows))


if __name__ == "__main__":
    main()
