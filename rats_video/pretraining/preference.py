"""Train a reward on prepared clips: which of two is the better one, and the words of their captions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from rats_video.config.fields import NonNegativeFloat, NonNegativeInt, NumClips, PositiveInt, Seed
from rats_video.evaluation.stats import share_ci95
from rats_video.optim import OptimizerConfig, TrainStepsConfig, build_optimizer, set_learning_rate
from rats_video.pretraining.comparisons import PairBatch, PairSource
from rats_video.pretraining.ranks import auc
from rats_video.pretraining.resumable import resumable_steps
from rats_video.pretraining.reward_losses import anchor_loss, grainy, preference_loss, word_loss
from rats_video.rewards.reward import RewardConfig
from rats_video.rewards.temporal import MotionSmoothnessConfig
from rats_video.rewards.word import WordReward
from rats_video.seeds import seeded
from rats_video.types import Reward


class PreferenceTrainConfig(TrainStepsConfig):
    """Root of `train reward --data`: a reward of prepared clips, from pairs of which one is the better.

    Sources are split three ways, none in two parts: to train on, to choose the best weights by, to validate on.
    """

    seed: Seed = 0
    data: str | None = Field(None, description="folder of clips that `rats-video prepare` wrote, as --data says")
    preferences: str | None = Field(
        None,
        description="JSONL of preferred and rejected clips; null learns from damaged copies, as --preferences says",
    )
    model: str = Field("tiny-wan", description="pipeline whose VAE made the latents, to decode them with")
    encoder: Literal["frames", "volume"] = Field(
        "frames", description="judge frame by frame, or with convolutions over time"
    )
    width: PositiveInt = Field(128, description="feature channels")
    num_words: NonNegativeInt = Field(64, description="most frequent words of the captions that are scored; 0 for none")
    word_count: PositiveInt = Field(8, description="clips that a word must be said of")
    quality_weight: NonNegativeFloat = Field(1.0, description="of log P(the better one) in the score, beside the words")
    num_pairs: NumClips = Field(2000, description="pairs, or clips to damage, that are used at most")
    validation_pairs: NumClips = Field(
        200, description="pairs, or clips to damage, to validate on, if there are enough"
    )
    validation_share: Annotated[float, Field(ge=0, le=0.5)] = Field(
        0.2,
        description="of all pairs that is enough; likewise what the best weights are chosen by, of the others; "
        "0 trains on all that `prepare` did not hold out",
    )
    batch_size: NumClips = Field(12, description="pairs a step")
    steps: PositiveInt = Field(2000, description="updates of the reward")
    look_every: PositiveInt = Field(
        50, description="steps between looks at the pairs that the best weights are chosen by"
    )
    word_weight: NonNegativeFloat = Field(1.0, description="of the words beside the preferences")
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = Field(
        0.05,
        description="share of the pairs taken to be the other way round; keeps log-odds, and so the score, bounded",
    )
    optimizer: OptimizerConfig
    baseline: RewardConfig | None = Field(
        MotionSmoothnessConfig(kind="motion_smoothness"),
        description="a reward whose accuracy is shown beside this one's",
    )


_LOSS = "loss"  # of the best weights, kept beside them in the checkpoint
ALL = "all"


@dataclass(frozen=True)
class Accuracy:
    """The share of pairs whose better clip a reward scores higher; a tie is half right.

    Args:
        share: of the pairs that are ranked right.
        low: where its 95% interval begins; sources are what is counted, as their pairs are not independent.
        high: where it ends.
        margin: mean score difference of a pair.
        num_pairs: pairs behind it.
        num_sources: sources behind it.
    """

    share: float
    low: float
    high: float
    margin: float
    num_pairs: int
    num_sources: int

    @property
    def beats_chance(self) -> bool:
        """True if the interval lies above a half."""
        return self.low > 0.5  # of two, one


def train_preference(
    cfg: PreferenceTrainConfig, reward: WordReward, train: PairSource, choosing: PairSource | None, folder: Path
) -> WordReward:
    """Train in place on `train`, and end with the weights of the least loss on `choosing`, or else with the last.

    Checkpoints are kept in `folder/checkpoints`, from which an interrupted training goes on.
    """
    optimizer = build_optimizer(cfg.optimizer, reward.parameters())
    weights = dict(reward.named_parameters())
    device = next(reward.parameters()).device
    best = {name: weight.detach().clone() for name, weight in weights.items()}
    best[_LOSS] = torch.tensor(math.inf)
    for step, progress in resumable_steps(
        "train reward", cfg.steps, folder / "checkpoints", weights, optimizer, average=best
    ):
        set_learning_rate(optimizer, cfg.optimizer, step, cfg.steps)
        generator = seeded(cfg.seed, 21, step)
        losses = preference_losses(reward, cfg, train.draw(cfg.batch_size, generator), generator)
        optimizer.zero_grad(set_to_none=True)
        sum(losses.values(), torch.zeros((), device=device)).backward()
        torch.nn.utils.clip_grad_norm_(reward.parameters(), cfg.optimizer.max_grad_norm)
        optimizer.step()
        if (step + 1) % cfg.look_every == 0 or step + 1 == cfg.steps:
            loss = -math.inf if choosing is None else _mean_loss(reward, cfg, choosing)
            if loss <= best[_LOSS]:
                best[_LOSS].fill_(loss)
                for name, weight in weights.items():
                    best[name].copy_(weight.detach())
        progress.advance(**{name: float(value.detach()) for name, value in losses.items()}, best=float(best[_LOSS]))
    reward.load_state_dict({name: best[name] for name in weights})
    return reward.eval()


def preference_losses(
    reward: WordReward, cfg: PreferenceTrainConfig, pairs: PairBatch, generator: torch.Generator
) -> dict[str, Tensor]:
    """`preference`: Bradley-Terry on the quality column, by clip and by frame.

    By frame it is asked of the frames that show damage; of people's preferences, whose reason may be anywhere, of the
    mean of all. `anchor` pins the column's level. `words`: cross-entropy of each caption word's presence.
    """
    clip, frames = reward.logits(grainy(torch.cat([pairs.good, pairs.bad]), generator))
    good, bad = clip[:, -1].chunk(2)
    good_frames, bad_frames = frames[..., -1].chunk(2)
    if pairs.damaged is None:
        by_frame = preference_loss(good_frames.mean(dim=1), bad_frames.mean(dim=1), smoothing=cfg.label_smoothing)
    else:
        by_frame = preference_loss(good_frames, bad_frames, pairs.damaged, cfg.label_smoothing)
    losses = {
        "preference": preference_loss(good, bad, smoothing=cfg.label_smoothing) + by_frame,
        "anchor": 0.1 * (anchor_loss(good, bad, cfg.label_smoothing)
                         + anchor_loss(good_frames, bad_frames, cfg.label_smoothing)),
    }  # fmt: skip
    if reward.words:
        told = len(pairs.captions)  # the good ones, and the bad ones if their captions still hold
        words = reward.mentioned_words(pairs.captions).to(clip)
        by_frame_words = words[:, None].expand(-1, frames.shape[1], -1)
        losses["words"] = cfg.word_weight * word_loss(
            clip[:told], frames[:told], words, by_frame_words, cfg.label_smoothing
        )
    return losses


@torch.no_grad()
def _mean_loss(reward: WordReward, cfg: PreferenceTrainConfig, pairs: PairSource) -> float:
    total, num = 0.0, 0
    for batch in pairs.fixed(cfg.batch_size):
        good, bad = _quality(reward, batch.good), _quality(reward, batch.bad)
        total += len(good) * float(preference_loss(good, bad, smoothing=cfg.label_smoothing))
        num += len(good)
    return total / num


def _quality(reward: WordReward, videos: Tensor) -> Tensor:
    return reward.logits(videos)[0][:, -1]


@torch.no_grad()
def measure(reward: Reward, pairs: PairSource, batch_size: int) -> dict[str, Accuracy]:
    """The accuracy of any reward, by what makes the difference; `all` is of all together where there are several."""
    seen: list[tuple[str, float, str]] = []  # kind, margin, source
    for batch in pairs.fixed(batch_size):
        margins = reward(batch.good, batch.prompts).clip - reward(batch.bad, batch.prompts).clip
        seen += zip([batch.kind] * len(margins), margins.tolist(), batch.sources, strict=True)
    kinds = list(dict.fromkeys(kind for kind, _, _ in seen))
    found = {ALL: accuracy([margin for _, margin, _ in seen], [source for _, _, source in seen])}
    for kind in kinds if len(kinds) > 1 else ():
        of_kind = [(margin, source) for which, margin, source in seen if which == kind]
        found[kind] = accuracy(*zip(*of_kind, strict=True))
    return found


def accuracy(margins: Sequence[float], sources: Sequence[str]) -> Accuracy:
    """The accuracy of score differences, better minus worse, of pairs from these sources."""
    right = [1.0 if margin > 0 else 0.5 if margin == 0 else 0.0 for margin in margins]
    share, num_sources = math.fsum(right) / len(right), len(set(sources))
    low, high = share_ci95(share, num_sources)
    return Accuracy(share, low, high, math.fsum(margins) / len(margins), len(margins), num_sources)


@torch.no_grad()
def calibration(reward: WordReward, pairs: PairSource, batch_size: int) -> dict[str, float]:
    """The quality column's confidence, and how often it is right: `quality_confidence` and `quality_accuracy`.

    The first is the mean of the greater probability that it gives to one of two clips; above the second it is too sure.
    """
    margins = torch.cat([_quality(reward, one.good) - _quality(reward, one.bad) for one in pairs.fixed(batch_size)])
    return {
        "quality_accuracy": float(((margins > 0).float() + 0.5 * (margins == 0)).mean()),
        "quality_confidence": float(margins.abs().sigmoid().mean()),
        "quality_margin": float(margins.mean()),
    }


@torch.no_grad()
def word_accuracy(reward: WordReward, pairs: PairSource, batch_size: int) -> float | None:
    """Mean over words of the share of (a good clip whose caption has the word, one without) that are told apart.

    None where no word is in some captions and not in others.
    """
    logits, said = [], []
    for batch in pairs.fixed(batch_size):
        if batch.kind in {"preference", "noise"}:  # the other kinds have the same good clips
            logits.append(reward.logits(batch.good)[0][:, :-1].cpu())
            said.append(reward.mentioned_words(batch.captions[: len(batch.good)]))
    columns = zip(torch.cat(logits).T, torch.cat(said).T, strict=True)
    shares = [share for scores, present in columns if (share := auc(scores, present)) is not None]
    return math.fsum(shares) / len(shares) if shares else None
