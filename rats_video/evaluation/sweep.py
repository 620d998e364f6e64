"""The comparison: every arm on the same held-out prompts from the same noise."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, TypeVar

import torch
from torch import Tensor

from rats_video.evaluation.pictures import picture_measure
from rats_video.evaluation.stats import mean_ci95
from rats_video.evaluation.tables import ArmRow, MetricValue
from rats_video.inference.sampler import SamplerSpec, Samples, sample_videos
from rats_video.methods.scoring import score_pixels
from rats_video.motion_path import MARK
from rats_video.runtime import interleave
from rats_video.sound import Sound, hears
from rats_video.types import Backbone, ClipSpec, Reward

T = TypeVar("T")
Measure = Callable[[Tensor, Sequence[str]], Mapping[str, Tensor]]
"""`(videos, prompts) -> named scores [B]`; `tables.better` gives their direction. One that `hears` is also given the
clips' sound, or None."""
FeatureFn = Callable[[Tensor], Tensor]
"""`videos -> features [B, D]` that clips are compared by."""


@dataclass(frozen=True)
class EvaluatedModel:
    """One row of the table: a model and its sampler."""

    name: str
    backbone: Backbone
    spec: SamplerSpec


@dataclass
class ArmScores:
    """Raw scores of an arm, clip by clip.

    Args:
        arm: its name.
        spec: its sampler.
        prompts: of the N clips.
        seconds: wall time of each.
        metrics: N values a name.
        again: prompts of M more clips, of which only features are kept.
        features: `[N + M, D]` a name.
        sets: metrics of all clips together (see `sets.fill_sets`).
        spreads: by measure of diversity, the mean distance of clips of each prompt.
        reference: name of the set that features are compared with.
    """

    arm: str
    spec: SamplerSpec
    prompts: list[str] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    metrics: dict[str, list[float]] = field(default_factory=dict)
    again: list[str] = field(default_factory=list)
    features: dict[str, Tensor] = field(default_factory=dict)
    sets: dict[str, MetricValue] = field(default_factory=dict)
    spreads: dict[str, dict[str, float]] = field(default_factory=dict)
    reference: str = ""

    @staticmethod
    def together(shares: Sequence[ArmScores]) -> ArmScores:
        """The scores of all clips from the shares of the processes; the first share holds the first clip."""

        def every(values: Callable[[ArmScores], list[T]]) -> list[T]:
            return interleave([part for share in shares if (part := values(share))])

        first = shares[0]
        return ArmScores(
            first.arm,
            first.spec,
            every(lambda s: s.prompts),
            every(lambda s: s.seconds),
            {name: every(lambda s: s.metrics[name]) for name in first.metrics},  # noqa: B023  # used at once
            every(lambda s: s.prompts + s.again)[sum(len(s.prompts) for s in shares) :],  # split as one list
            {name: torch.stack(every(lambda s: list(s.features[name]))) for name in first.features},  # noqa: B023
        )

    def row(self) -> ArmRow:
        """Means with 95% intervals over prompts, then the metrics of the set."""
        return ArmRow(
            arm=self.arm,
            num_steps=self.spec.num_steps,
            nfe=self.spec.nfe,
            num_clips=len(self.prompts),
            seconds_per_clip=sum(self.seconds) / len(self.seconds),
            metrics={name: MetricValue.of(mean_ci95(v, self.prompts)) for name, v in self.metrics.items()} | self.sets,
        )


@dataclass(frozen=True)
class RewardMeasure:
    """A reward's clip score as a metric, and the scores of its parts if `with_parts`.

    It is a `Measure`, and takes the sound of clips that have one.
    """

    hears: ClassVar[bool] = True

    name: str
    reward: Reward
    with_parts: bool = False

    def __call__(self, videos: Tensor, prompts: Sequence[str], sound: Sound | None = None) -> Mapping[str, Tensor]:
        """Scores `[B]` by name."""
        found = score_pixels(self.reward, videos, prompts, sound)
        parts = found.parts if self.with_parts else {}
        return {self.name: found.clip} | {f"{self.name}/{part}": values for part, values in parts.items()}


def reward_measure(name: str, reward: Reward) -> Measure:
    """A reward's clip score as a metric."""
    return RewardMeasure(name, reward)


def motion_measure(videos: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:  # noqa: ARG001  # not read
    """Metrics of any clip from its pixels alone: temporal measures and saturation."""
    from rats_video.rewards import temporal

    measures = (temporal.flicker, temporal.motion_smoothness, temporal.dynamic_degree, temporal.saturation)
    return {measure.__name__: measure(videos).clip for measure in measures}


def shapes_measure(videos: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
    """Metrics read back from a shapes clip: adherence, smoothness, constancy and each attribute."""
    from rats_video.datasets.shapes.measure import measure_shapes

    measures = measure_shapes(videos, prompts)
    return {
        "adherence": measures.adherence,
        "smoothness": measures.smoothness,
        "constancy": measures.constancy,
        **{name: values.float() for name, values in measures.attributes.items()},
    }


def path_measure(videos: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
    """The share of frames on the prompts' motion paths; nothing if prompts have none."""
    from rats_video.datasets.shapes.paths import measure_paths

    return {"on_path": measure_paths(videos, prompts)["on_path"]} if all(MARK in p for p in prompts) else {}


@torch.no_grad()
def score_arm(
    arm: EvaluatedModel,
    prompts: Sequence[str],
    clip: ClipSpec,
    measures: Sequence[Measure],
    *,
    seed: int,
    batch_size: int,
    latent_measures: Sequence[Measure] = (),
    looks: Mapping[str, FeatureFn] | None = None,
    again: Sequence[str] = (),
    share: Sequence[int] | None = None,
    made: Callable[[int, int, float], None] = lambda *_: None,
) -> ArmScores:
    """Sample one clip a prompt and measure it; `made` is told of each batch, see `ClipBar.made`.

    `latent_measures` are given clean latents in place of videos. The features of `looks` are kept, also of one more
    clip for each prompt in `again`. `share` limits the clips to those indices, first of `prompts`, then of `again`.
    """
    scores = ArmScores(arm.name, arm.spec)
    features: dict[str, list[Tensor]] = {name: [] for name in looks or {}}
    all_prompts = [*prompts, *again]
    share = range(len(all_prompts)) if share is None else share
    for is_measured in (True, False):
        chosen = [index for index in share if (index < len(prompts)) is is_measured]
        batches = sample_videos(
            arm.backbone, all_prompts, clip, arm.spec, seed=seed, batch_size=batch_size, share=chosen
        )
        for samples in batches:
            if is_measured:
                _measure(scores, samples, measures, latent_measures)
            else:
                scores.again += samples.prompts
            for name, rows in features.items():
                rows.append((looks or {})[name](samples.videos).cpu())
            made(arm.spec.nfe * len(samples.prompts), len(samples.prompts), samples.seconds_in_calls)
    scores.features = {name: torch.cat(rows) for name, rows in features.items() if rows}
    return scores


def _measure(
    scores: ArmScores, samples: Samples, measures: Sequence[Measure], latent_measures: Sequence[Measure]
) -> None:
    """Add a batch's scores."""
    scores.prompts += samples.prompts
    scores.seconds += [samples.seconds_per_clip] * len(samples.prompts)
    found = measure_samples(samples, measures)
    for measure in latent_measures:
        found |= measure(samples.latents, samples.prompts)
    for name, values in found.items():
        scores.metrics.setdefault(name, []).extend(values.tolist())


def measure_samples(samples: Samples, measures: Sequence[Measure]) -> dict[str, Tensor]:
    """All measures of clips' pixels, and how they keep to the pictures that they start from."""
    found: dict[str, Tensor] = {}
    for measure in measures:
        heard = (samples.sound,) if hears(measure) else ()
        found |= measure(samples.videos, samples.prompts, *heard)
    if samples.first is None:
        return found
    return found | picture_measure(samples.videos, samples.first, samples.prompts)
