"""Metrics of a set of clips: its distance from real clips, and the diversity of clips of one prompt."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rats_video.evaluation.frechet import Gaussian, frechet_distance, jackknife, kernel_distance
from rats_video.evaluation.pictures import PSNR
from rats_video.evaluation.sound import MONITORS
from rats_video.evaluation.stats import Estimate, mean_ci95, paired_difference
from rats_video.evaluation.sweep import ArmScores
from rats_video.evaluation.tables import TEACHER, MetricValue

_KERNEL_UNITS = 1000.0  # the usual unit of KID
MOTION = "dynamic_degree"
_DIVERSITIES = {"features": "diversity", "pixels": "pixel_diversity"}


@dataclass(frozen=True)
class Reference:
    """The clips that the arms' clips are compared with.

    Args:
        features: `[M, D]`.
        prompts: M, of the clips.
        name: for people.
    """

    features: Tensor
    prompts: tuple[str, ...]
    name: str


def distances(
    features: Tensor, prompts: Sequence[str], reference: Reference, *, of_images: bool = False
) -> dict[str, Estimate]:
    """Frechet (`fvd`) and kernel distance (`kvd`, times 1000) to a reference, with intervals over prompts.

    The reference counts as given: it is the same for every arm. With fewer than two prompts on either side there is no
    result.

    Args:
        features: `[N, D]`.
        prompts: N.
        reference: the set to be near.
        of_images: calls them `fid` and `kid`.
    """
    if min(len(set(prompts)), len(set(reference.prompts))) < 2:
        return {}
    rows, real, whole = (
        features.double().cpu(),
        reference.features.double().cpu(),
        Gaussian.of(reference.features.cpu()),
    )

    def frechet(index: Tensor) -> float:
        return frechet_distance(Gaussian.of(rows[index]), whole)

    def kernel(index: Tensor) -> float:
        return _KERNEL_UNITS * kernel_distance(rows[index], real, [prompts[i] for i in index], reference.prompts)

    first, second = ("fid", "kid") if of_images else ("fvd", "kvd")
    return {first: jackknife(frechet, prompts), second: jackknife(kernel, prompts)}


def prompt_distances(features: Tensor, prompts: Sequence[str]) -> dict[str, float]:
    """Mean distance of two clips of a prompt, by prompt, from features `[N, D]`; prompts with one clip are skipped."""
    members: defaultdict[str, list[int]] = defaultdict(list)
    for index, prompt in enumerate(prompts):
        members[prompt].append(index)
    rows = features.double()
    return {
        prompt: float(torch.nn.functional.pdist(rows[index]).mean())
        for prompt, index in members.items()
        if len(index) > 1
    }


def diversity(ours: dict[str, float], theirs: dict[str, float]) -> Estimate | None:
    """Mean spread as a share of another model's on the same prompts, with its interval; None if the other has none.

    The interval is that of a ratio of paired means (the delta method): a prompt that leaves both models little room
    counts for neither.
    """
    base = math.fsum(theirs.values()) / len(theirs)
    if base == 0:
        return None
    ratio = math.fsum(ours.values()) / len(ours) / base
    rest = mean_ci95([(ours[prompt] - ratio * theirs[prompt]) / base for prompt in theirs])
    return Estimate(ratio, rest.ci95, rest.num)


def fill_sets(scores: Sequence[ArmScores], reference: Reference | None, *, of_images: bool = False) -> None:
    """Give every arm its metrics of sets, in place.

    Without a reference the teacher's clips are used, if it is among the arms; it is then not compared with itself.
    `diversity` and `pixel_diversity` are mean distances of two clips of a prompt; `diversity_share` and
    `pixel_diversity_share` are shares of the teacher's.
    """
    teacher = next((arm for arm in scores if arm.arm == TEACHER), None)
    if reference is None and teacher is not None and "features" in teacher.features:
        mine = teacher.features["features"][: len(teacher.prompts)]
        reference = Reference(mine, tuple(teacher.prompts), "the teacher's clips")
        compared = [arm for arm in scores if arm is not teacher]
    else:
        compared = list(scores)
    for arm in compared:
        if reference is not None and "features" in arm.features:
            rows, arm.reference = arm.features["features"][: len(arm.prompts)], reference.name
            found = distances(rows, arm.prompts, reference, of_images=of_images)
            arm.sets |= {name: MetricValue.of(value) for name, value in found.items()}
    for arm in scores:
        for kind, name in _DIVERSITIES.items():
            if kind in arm.features and (apart := prompt_distances(arm.features[kind], [*arm.prompts, *arm.again])):
                arm.spreads[name] = apart
                arm.sets[name] = MetricValue.of(mean_ci95(list(apart.values())))
    if teacher is not None:
        for arm in scores:
            fill_shares(arm, teacher)


def motion_share(arm: ArmScores, teacher: ArmScores) -> Estimate | None:
    """An arm's mean dynamic degree as a share of the teacher's on the same prompts; None where nothing was measured."""

    def by_prompt(scores: ArmScores) -> dict[str, float]:
        found = defaultdict(list)
        for prompt, value in zip(scores.prompts, scores.metrics[MOTION], strict=True):
            found[prompt].append(value)
        return {prompt: math.fsum(values) / len(values) for prompt, values in found.items()}

    if MOTION not in arm.metrics or MOTION not in teacher.metrics:
        return None
    return diversity(by_prompt(arm), by_prompt(teacher))


def fill_shares(arm: ArmScores, teacher: ArmScores) -> None:
    """Give an arm its diversity and motion as shares of the teacher's, and how its sound differs from that, in place.

    Both must have their `spreads`. Motion is of clips that start from pictures; the sound is compared clip by clip,
    where both have the same prompts.
    """
    if PSNR in arm.metrics and (share := motion_share(arm, teacher)):
        arm.sets["dynamic_degree_share"] = MetricValue.of(share)
    for name in MONITORS:
        if name in arm.metrics and name in teacher.metrics and arm.prompts == teacher.prompts:
            apart = paired_difference(arm.metrics[name], teacher.metrics[name], arm.prompts)
            arm.sets[f"{name}_difference"] = MetricValue.of(apart)
    for name, theirs in teacher.spreads.items():
        if name in arm.spreads and (share := diversity(arm.spreads[name], theirs)):
            arm.sets[f"{name}_share"] = MetricValue.of(share)


def set_notes(scores: Sequence[ArmScores]) -> list[str]:
    """Notes on the metrics of sets of these arms."""
    arm, notes = scores[-1], []
    for frechet, kernel in (("FVD", "KVD"), ("FID", "KID")):
        if frechet.lower() not in arm.sets:
            continue
        num, width = len(arm.prompts), arm.features["features"].shape[1]
        notes.append(
            f"{frechet} and {kernel}: distance to {arm.reference}, in {width} features a clip, N = {num} clips an arm;"
            f" {frechet} of few clips is too high by an amount that depends on N, {kernel} is not"
        )
        if num <= 2 * width:
            few = f"N = {num} is too few for a covariance of {width} features"
            notes.append(f"{few}: trust {kernel}, or take more clips")
    if "pixel_diversity" in arm.sets:
        count = len(arm.spreads["pixel_diversity"])
        notes.append(
            "Diversity: mean distance of two clips of a prompt, in features and in pixels, as a share of the teacher's;"
            f" over {count} prompts, with {len(arm.again)} more clips an arm"
        )
    return notes
