"""Train the shapes reward: words read from rendered and sampled clips, preferences for undamaged ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from rats_video.backbones.wan import WanBackbone
from rats_video.config.fields import (
    ClipConfig,
    NonNegativeFloat,
    NonNegativeInt,
    NumClips,
    PositiveFloat,
    PositiveInt,
    Seed,
    SolverSteps,
)
from rats_video.datasets.shapes.corruptions import corrupt
from rats_video.datasets.shapes.measure import read_shapes
from rats_video.datasets.shapes.render import ATTRIBUTES, WORDS, ShapeAttributes, split_combinations
from rats_video.diffusion.rollout import rollout
from rats_video.diffusion.schedule import sigma_grid
from rats_video.optim import OptimizerConfig, TrainStepsConfig, build_optimizer, set_learning_rate
from rats_video.pretraining.ranks import auc, rank_correlation
from rats_video.pretraining.resumable import resumable_steps
from rats_video.pretraining.reward_losses import anchor_loss, grainy, preference_loss, word_loss
from rats_video.pretraining.vae_clips import draw_shapes
from rats_video.progress import ProgressBar
from rats_video.rewards.word import WordReward
from rats_video.seeds import seeded


class RewardTrainConfig(TrainStepsConfig):
    """Root of `train reward`."""

    seed: Seed = 0
    clip: ClipConfig = ClipConfig()
    encoder: Literal["frames", "volume"] = Field(
        "frames", description="judge frame by frame, or with convolutions over time"
    )
    width: PositiveInt = Field(128, description="feature channels")
    model: str = Field("tiny-wan", description="pipeline whose samples and round trips the reward also learns from")
    sample_steps: tuple[SolverSteps, ...] = Field((2, 3, 4, 6, 10, 20), description="step counts of those samples")
    guidance_scales: tuple[PositiveFloat, ...] = Field((1.0, 3.0), description="of those samples, in turns")
    shift: PositiveFloat = Field(3.0, description="sigma grid shift of those samples")
    num_samples: NumClips = Field(3000, description="clips sampled from the model, labelled by measurement")
    num_round_trips: NumClips = Field(1000, description="rendered clips sent through the VAE and back")
    batch_size: NumClips = Field(24, description="clips a step")
    steps: PositiveInt = Field(3000, description="updates of the reward")
    word_steps: NonNegativeInt = Field(
        300, description="first steps, on rendered clips and words alone; samples too early only confuse"
    )
    preference_weight: NonNegativeFloat = Field(0.3, description="of the preferences beside the words")
    optimizer: OptimizerConfig
    label_smoothing: float = Field(0.05, ge=0, lt=0.5, description="keeps log-odds, and so the score, bounded")
    eval_clips: NumClips = Field(256, description="held-out clips that it is measured on")


_PREFERENCE_MARGIN = 0.1  # smoothness + constancy, each in [0, 1]


class ClipTargets(NamedTuple):
    """Contents of N clips: words `[N, V]` and, frame by frame, `[N, T, V]`, each 0 or 1; `craft` `[N]` in [0, 2].

    Craft is smoothness + constancy. A frame's colour and shape are its own, so that every frame set right counts; its
    other words are the clip's.
    """

    words: Tensor
    frame_words: Tensor
    craft: Tensor


@dataclass(frozen=True)
class ClipPool:
    """Clips `[N, T, 3, H, W]` kept as bytes, with what they measurably show and the prompts they were drawn for."""

    videos: Tensor
    targets: ClipTargets
    prompts: list[str]

    def take(self, index: Tensor, device: torch.device) -> tuple[Tensor, ClipTargets]:
        """Videos in [0, 1] and targets of some clips."""
        return self.videos[index].to(device).float() / 255, ClipTargets(*(t[index].to(device) for t in self.targets))


def measured_targets(videos: Tensor) -> ClipTargets:
    """The measured contents of clips; all words of an attribute that cannot be read are 0."""
    readings = read_shapes(videos)
    clip, frames = [], []
    for name in ATTRIBUTES:
        index = torch.arange(len(WORDS[name]), device=videos.device)
        words = readings.words[name][:, None].expand(-1, videos.shape[1])
        clip.append((readings.words[name][:, None] == index).float())
        frames.append((readings.frame_words.get(name, words)[..., None] == index).float())
    return ClipTargets(torch.cat(clip, dim=-1), torch.cat(frames, dim=-1), readings.smoothness + readings.constancy)


def _pool(videos: Tensor, prompts: list[str]) -> ClipPool:
    targets = ClipTargets(*(target.cpu() for target in measured_targets(videos)))
    return ClipPool((videos * 255).round().byte().cpu(), targets, prompts)


def _joined(targets: Sequence[ClipTargets]) -> ClipTargets:
    return ClipTargets(*(torch.cat(parts) for parts in zip(*targets, strict=True)))


def _concatenate(pools: Sequence[ClipPool]) -> ClipPool:
    return ClipPool(
        videos=torch.cat([pool.videos for pool in pools]),
        targets=_joined([pool.targets for pool in pools]),
        prompts=[prompt for pool in pools for prompt in pool.prompts],
    )


@torch.no_grad()
def sample_pool(
    backbone: WanBackbone, cfg: RewardTrainConfig, combinations: list[ShapeAttributes], num_clips: int, stream: int
) -> ClipPool:
    """Clips sampled from the model at all step counts and guidance scales in turn."""
    pools: list[ClipPool] = []
    batch = 40
    negative = backbone.encode_text([""])
    settings = [(steps, scale) for steps in cfg.sample_steps for scale in cfg.guidance_scales]
    with ProgressBar("sample clips", num_clips) as progress:
        for start in range(0, num_clips, batch):
            generator = seeded(cfg.seed, stream, start)
            chosen = torch.randint(len(combinations), (batch,), generator=generator).tolist()
            prompts = [combinations[i].prompt for i in chosen]
            steps, scale = settings[start // batch % len(settings)]
            noise = backbone.sample_noise(batch, cfg.clip.spec, generator)
            sigmas, text = sigma_grid(steps, cfg.shift), backbone.encode_text(prompts)
            clips = rollout(
                backbone.velocity,
                noise,
                sigmas,
                text,
                negative=negative,
                guidance_scale=scale,
                guide=backbone.guidance(),
            )
            pools.append(_pool(backbone.decode(clips.x0), prompts))
            progress.advance(batch)
    return _concatenate(pools)


def _round_trip_pool(backbone: WanBackbone, cfg: RewardTrainConfig, combinations: list[ShapeAttributes]) -> ClipPool:
    pools: list[ClipPool] = []
    with ProgressBar("VAE round trips", cfg.num_round_trips) as progress:
        for start in range(0, cfg.num_round_trips, 40):
            videos, attributes = draw_shapes(combinations, 40, cfg.clip.spec, (cfg.seed, 12, start), backbone.device)
            with torch.no_grad():
                videos = backbone.decode(backbone.encode(videos))
            pools.append(_pool(videos, [a.prompt for a in attributes]))
            progress.advance(40)
    return _concatenate(pools)


def train_reward(cfg: RewardTrainConfig, backbone: WanBackbone, folder: Path) -> tuple[WordReward, dict[str, float]]:
    """Train on rendered, round-tripped and sampled clips of the training combinations.

    Its checkpoints are kept in `folder/checkpoints`, from which an interrupted training goes on; clips are made anew.

    Returns:
        The reward, and its accuracy on samples for held-out prompts, attribute by attribute.
    """
    torch.manual_seed(cfg.seed)
    device = backbone.device
    train, heldout = split_combinations()
    reward = WordReward([word for words in WORDS.values() for word in words], cfg.encoder, cfg.width).to(device)
    samples = sample_pool(backbone, cfg, train, cfg.num_samples, stream=11)
    trips = _round_trip_pool(backbone, cfg, train)
    optimizer = build_optimizer(cfg.optimizer, reward.parameters())
    weights = dict(reward.named_parameters())
    for step, progress in resumable_steps("train reward", cfg.steps, folder / "checkpoints", weights, optimizer):
        set_learning_rate(optimizer, cfg.optimizer, step, cfg.steps)
        if step < cfg.word_steps:
            losses = word_losses(reward, cfg, train, step)
        else:
            losses = reward_losses(reward, cfg, train, trips, samples, step)
        loss = sum(losses.values(), torch.zeros((), device=device))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(reward.parameters(), cfg.optimizer.max_grad_norm)
        optimizer.step()
        progress.advance(**{name: float(value.detach()) for name, value in losses.items()})
    reward.eval()
    return reward, evaluate_reward(reward, sample_pool(backbone, cfg, heldout, cfg.eval_clips, stream=13))


def word_losses(
    reward: WordReward, cfg: RewardTrainConfig, combinations: list[ShapeAttributes], step: int
) -> dict[str, Tensor]:
    """Cross-entropy of each word's presence, by clip and by frame, on as many rendered clips as a whole step sees."""
    generator, device = seeded(cfg.seed, 16, step), next(reward.parameters()).device
    videos, attributes = draw_shapes(combinations, 3 * cfg.batch_size, cfg.clip.spec, (cfg.seed, 17, step), device)
    words = reward.mentioned_words([a.prompt for a in attributes]).to(videos)
    clip, frames = reward.logits(grainy(videos, generator))
    return {
        "words": word_loss(clip, frames, words, words[:, None].expand(-1, frames.shape[1], -1), cfg.label_smoothing)
    }


def reward_losses(
    reward: WordReward,
    cfg: RewardTrainConfig,
    combinations: list[ShapeAttributes],
    trips: ClipPool,
    samples: ClipPool,
    step: int,
) -> dict[str, Tensor]:
    """Losses of one step on `batch_size` clips of each kind: rendered or round-tripped, their damaged twins, sampled.

    `words`: cross-entropy of each word's presence, by clip and by frame. `preference`: Bradley-Terry on (undamaged,
    damaged) pairs and on sampled pairs of unequal craft; `anchor` pins its level (a preference alone has none).
    """
    generator, device = seeded(cfg.seed, 14, step), next(reward.parameters()).device
    half = cfg.batch_size // 2
    rendered, _ = draw_shapes(combinations, half, cfg.clip.spec, (cfg.seed, 15, step), device)
    tripped, tripped_targets = trips.take(_choose(len(trips.prompts), half, generator), device)
    clean = torch.cat([rendered, tripped])
    damaged, damaged_frames = corrupt(clean, generator)
    sampled, sampled_targets = samples.take(_choose(len(samples.prompts), cfg.batch_size, generator), device)
    targets = _joined([measured_targets(rendered), tripped_targets, measured_targets(damaged), sampled_targets])

    clip, frames = reward.logits(grainy(torch.cat([clean, damaged, sampled]), generator))
    good, bad = clip[: len(clean), -1], clip[len(clean) : 2 * len(clean), -1]
    good_frames, bad_frames = frames[: len(clean), :, -1], frames[len(clean) : 2 * len(clean), :, -1]
    quality = clip[2 * len(clean) :, -1]
    left, right = quality.chunk(2)
    left_craft, right_craft = sampled_targets.craft.chunk(2)
    decided = (left_craft - right_craft).abs() > _PREFERENCE_MARGIN
    sign = torch.sign(left_craft - right_craft)
    preference = (
        preference_loss(good, bad)
        + preference_loss(good_frames, bad_frames, damaged_frames)
        + preference_loss(sign * left, sign * right, decided)
    )
    anchor = anchor_loss(good, bad, cfg.label_smoothing) + anchor_loss(good_frames, bad_frames, cfg.label_smoothing)
    return {
        "words": word_loss(clip, frames, targets.words, targets.frame_words, cfg.label_smoothing),
        "preference": cfg.preference_weight * preference,
        "anchor": 0.1 * anchor,
    }


def _choose(total: int, batch: int, generator: torch.Generator) -> Tensor:
    return torch.randint(total, (batch,), generator=generator)


@torch.no_grad()
def evaluate_reward(reward: WordReward, pool: ClipPool) -> dict[str, float]:
    """On sampled clips, by attribute: how often the prompted word is shown, and how well the reward tells where it is.

    `auc_*` is the share of pairs (a clip that shows the word, one that does not) that the reward ranks rightly, 0.5 by
    guessing; for colour and shape by frame as well, since few clips may show a shape throughout. It is left out where
    all clips are alike. `rank_correlation` is Spearman's, of score and measured adherence.
    """
    device = next(reward.parameters()).device
    logits, frame_logits, scores = [], [], []
    for index in torch.arange(len(pool.prompts)).split(64):
        videos, _ = pool.take(index, device)
        clip, frames = reward.logits(videos)
        logits.append(clip[:, :-1].cpu())
        frame_logits.append(frames[..., :-1].cpu())
        scores.append(reward(videos, [pool.prompts[i] for i in index]).clip.cpu())
    said, said_by_frame = torch.cat(logits), torch.cat(frame_logits)
    shown, shown_by_frame = pool.targets.words > 0, pool.targets.frame_words > 0
    mentioned = reward.mentioned_words(pool.prompts)
    metrics: dict[str, float] = {}
    start = 0
    for name, words in WORDS.items():
        place = torch.arange(mentioned.shape[1])
        columns = mentioned & (place >= start) & (place < start + len(words))  # one in each row
        start += len(words)
        metrics[f"shown_{name}"] = float(shown[columns].float().mean())
        metrics |= _named_auc(f"auc_{name}", said[columns], shown[columns])
        if name in {"color", "shape"}:
            by_frame = columns[:, None].expand_as(said_by_frame)
            metrics |= _named_auc(f"auc_{name}_by_frame", said_by_frame[by_frame], shown_by_frame[by_frame])
    adherence = (shown & mentioned).sum(dim=1).float()
    metrics["rank_correlation"] = rank_correlation(torch.cat(scores), adherence)
    return metrics


def _named_auc(name: str, scores: Tensor, truth: Tensor) -> dict[str, float]:
    share = auc(scores, truth)
    return {} if share is None else {name: share}
