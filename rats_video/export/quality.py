"""The cost of eight bits: the same measures on the student's clips and on its quantised copy's, clip by clip."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from rats_video.evaluation.stats import mean_ci95, paired_difference
from rats_video.evaluation.sweep import Measure
from rats_video.evaluation.tables import aligned, metric_title
from rats_video.export.base import Clips
from rats_video.sound import Sound, hears

Scores = Mapping[str, Sequence[float]]


@torch.no_grad()
def score(measures: Sequence[Measure], clips: Clips, prompts: Sequence[str], device: torch.device) -> Scores:
    """Scores by name of clips, made one clip at a time."""
    scores: dict[str, list[float]] = {}
    sounds: list[Sound | None] = [Sound(sound.waves.to(device), sound.rate) for sound in clips.sounds]
    sounds = sounds or [None] * len(prompts)
    for clip, sound, prompt in zip(clips.videos.split(1), sounds, prompts, strict=True):
        for measure in measures:
            heard = (sound,) if hears(measure) else ()
            for name, value in measure(clip.to(device), [prompt], *heard).items():
                scores.setdefault(name, []).extend(value.tolist())
    return scores


def loss_table(kind: str, before: Scores, after: Scores, prompts: Sequence[str]) -> list[str]:
    """A Markdown table of means, and of the paired change with its 95% interval over prompts."""
    table = [["measure", "student", kind, "change"]]
    for name, old in before.items():
        change = paired_difference(after[name], old, prompts)
        means = [f"{mean_ci95(values, prompts).mean:.3f}" for values in (old, after[name])]
        table.append([metric_title(name), *means, f"{change.mean:+.3f} ± {change.ci95:.3f}"])
    return aligned(table)
