"""Scores teacher and untrained student for `calibrate`, and scales a sum's terms by what they score."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rats_video.distillation.run_rewards import RunRewards
from rats_video.distillation.settings import DistillConfig
from rats_video.errors import UserError
from rats_video.evaluation.calibration import (
    ScoreGap,
    compare,
    significant,
    unit_weights,
)
from rats_video.inference.sampler import SamplerSpec, sample_videos
from rats_video.methods.rats import Rats
from rats_video.methods.scoring import call_reward
from rats_video.progress import ClipBar
from rats_video.rewards.sum import SumReward, add_up
from rats_video.seeds import seeded
from rats_video.types import Backbone, Reward, RewardScores

Scored = Mapping[str, RewardScores]


@dataclass(frozen=True)
class CalibrationScores:
    """The scores of both arms by name: the reward's or those of a sum's terms, and the held-out reward's."""

    prompts: tuple[str, ...]
    teacher: Scored
    base: Scored

    def comparisons(self) -> dict[str, ScoreGap]:
        """Every score and part compared."""
        teacher, base = dict(_all_scores(self.teacher)), dict(_all_scores(self.base))
        return {name: compare(teacher[name], base[name], self.prompts) for name in teacher}


def score_arms(
    cfg: DistillConfig, rats: Rats, rewards: RunRewards, prompts: Sequence[str], num_prompts: int
) -> CalibrationScores:
    """Both arms from the same noise, on prompts drawn by the run's seed."""
    order = torch.randperm(len(prompts), generator=seeded(cfg.seed, 7))[:num_prompts].tolist()
    chosen = tuple(prompts[i] for i in order)
    scorers: dict[str, Reward] = {"reward": rewards.trained}
    if isinstance(rewards.trained, SumReward):
        scorers = {f"reward/{name}": term.reward for name, term in rewards.trained.terms.items()}
    if rewards.heldout is not None:
        scorers["heldout_reward"] = rewards.heldout
    specs = {
        rats.teacher.backbone: cfg.teacher_spec,
        rats.student: SamplerSpec(min(cfg.student.num_steps), cfg.shift, sampler=cfg.student.sampler),
    }
    calls = sum(spec.nfe for spec in specs.values()) * len(chosen)
    with ClipBar("calibrate", calls, len(specs) * len(chosen)) as progress:
        teacher, base = (_score_arm(cfg, backbone, spec, scorers, chosen, progress) for backbone, spec in specs.items())
    return CalibrationScores(chosen, teacher, base)


@torch.no_grad()
def _score_arm(
    cfg: DistillConfig,
    backbone: Backbone,
    spec: SamplerSpec,
    scorers: Mapping[str, Reward],
    prompts: Sequence[str],
    progress: ClipBar,
) -> Scored:
    found: dict[str, list[RewardScores]] = {name: [] for name in scorers}
    size = cfg.evaluation.batch_size
    for samples in sample_videos(backbone, prompts, cfg.clip.spec, spec, seed=cfg.seed, batch_size=size):
        for name, scorer in scorers.items():
            found[name].append(call_reward(scorer, samples.videos, samples.prompts, samples.sound))
        count = len(samples.prompts)
        progress.made(spec.nfe * count, count, samples.seconds_in_calls)
    return {name: _join_batches(batches) for name, batches in found.items()}


def _join_batches(batches: Sequence[RewardScores]) -> RewardScores:
    frames = [scores.frames for scores in batches if scores.frames is not None]
    return RewardScores(
        torch.cat([scores.clip for scores in batches]).cpu(),
        torch.cat(frames).cpu() if frames else None,
        {name: torch.cat([scores.parts[name] for scores in batches]).cpu() for name in batches[0].parts},
        {name: torch.cat([scores.judged[name] for scores in batches]).cpu() for name in batches[0].judged},
    )


def _all_scores(scored: Scored) -> Iterator[tuple[str, Tensor]]:
    for name, scores in scored.items():
        yield name, scores.clip
        yield from ((f"{name}/{part}", values) for part, values in scores.parts.items())


def scaled_sum(reward: SumReward, arms: CalibrationScores) -> SumReward:
    """The sum with every term brought to mean 0 and spread 1, and the weights to a sum of spread 1."""
    unit = {}
    for name, key in _term_keys(reward):
        found = compare(arms.teacher[key].clip, arms.base[key].clip, arms.prompts)
        if found.spread == 0:
            raise UserError(
                "scores every clip alike: it has no scale", where=f"reward.terms.{name}", fix="leave it out"
            )
        mean, spread = significant(found.mean, 4), significant(found.spread)
        unit[name] = replace(reward.terms[name], weight=1.0, mean=mean, spread=spread)
    both = {name: torch.cat([arms.teacher[key].clip, arms.base[key].clip]) for name, key in _term_keys(reward)}
    weights = {name: term.weight for name, term in reward.terms.items()}
    shares = unit_weights(weights, {name: unit[name].count(scores) for name, scores in both.items()})
    return SumReward({name: replace(term, weight=significant(shares[name])) for name, term in unit.items()})


def _term_keys(reward: SumReward) -> list[tuple[str, str]]:
    return [(name, f"reward/{name}") for name in reward.terms]


def with_sum(reward: SumReward, arms: CalibrationScores) -> CalibrationScores:
    """The arms with the sum's own score before its terms."""

    def add(scored: Scored) -> Scored:
        total = add_up(reward.terms, {name: scored[key] for name, key in _term_keys(reward)})
        return {"reward": replace(total, parts={}), **scored}

    return replace(arms, teacher=add(arms.teacher), base=add(arms.base))
