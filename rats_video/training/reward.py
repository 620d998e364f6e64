"""Train the shapes reward: words read from rendered and sampled clips, preferences for undamaged ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from rats_video.backbones.wan import WanBackbone
from rats_video.config.pretrain import RewardTrainConfig
from rats_video.datasets.corruptions import corrupt
from rats_video.datasets.shapes import ATTRIBUTES, WORDS, ShapeAttributes, split_combinations
from rats_video.datasets.shapes_measure import read_shapes
from rats_video.diffusion.rollout import rollout
from rats_video.diffusion.schedule import sigma_grid
from rats_video.rewards.word_reward import WordReward
from rats_video.seeds import seeded
from rats_video.training.optim import cosine_lr
from rats_video.training.progress import ProgressBar
from rats_video.training.vae import draw_shapes

_PREFERENCE_MARGIN = 0.1  # smoothness + constancy, each in [0, 1]


@dataclass(frozen=True)
class ClipPool:
    """Clips kept as bytes, with what they measurably show and the prompts they were drawn for.

    `videos` is `[N, T, 3, H, W]` uint8, `words` `[N, V]`, `craft` `[N]` smoothness + constancy, in [0, 2].
    """

    videos: Tensor
    words: Tensor
    craft: Tensor
    prompts: list[str]

    def take(self, index: Tensor, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Videos in [0, 1], words and craft of some clips."""
        return self.videos[index].to(device).float() / 255, self.words[index].to(device), self.craft[index].to(device)


def word_targets(videos: Tensor) -> tuple[Tensor, Tensor]:
    """What clips measurably show: words `[B, V]` (0 / 1, all words of an unreadable attribute are 0), craft `[B]`."""
    readings = read_shapes(videos)
    targets = [
        (readings.words[name][:, None] == torch.arange(len(WORDS[name]), device=videos.device)).float()
        for name in ATTRIBUTES
    ]
    return torch.cat(targets, dim=1), readings.smoothness + readings.constancy


def _pool(videos: Tensor, prompts: list[str]) -> ClipPool:
    words, craft = word_targets(videos)
    return ClipPool((videos * 255).round().byte().cpu(), words.cpu(), craft.cpu(), prompts)


def _concatenate(pools: Sequence[ClipPool]) -> ClipPool:
    return ClipPool(
        videos=torch.cat([pool.videos for pool in pools]),
        words=torch.cat([pool.words for pool in pools]),
        craft=torch.cat([pool.craft for pool in pools]),
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
            clips = rollout(backbone.velocity, noise, sigmas, text, negative=negative, guidance_scale=scale)
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


def train_reward(cfg: RewardTrainConfig, backbone: WanBackbone) -> tuple[WordReward, dict[str, float]]:
    """Train on rendered, round-tripped and sampled clips of the training combinations.

    Returns:
        The reward, and its accuracy on samples for held-out prompts, attribute by attribute.
    """
    torch.manual_seed(cfg.seed)
    device = backbone.device
    train, heldout = split_combinations()
    reward = WordReward([word for words in WORDS.values() for word in words], cfg.encoder, cfg.width).to(device)
    samples = sample_pool(backbone, cfg, train, cfg.num_samples, stream=11)
    trips = _round_trip_pool(backbone, cfg, train)
    optimizer = torch.optim.AdamW(reward.parameters(), lr=cfg.optimizer.lr, weight_decay=cfg.optimizer.weight_decay)
    with ProgressBar("train reward", cfg.steps) as progress:
        for step in range(cfg.steps):
            for group in optimizer.param_groups:
                group["lr"] = cosine_lr(step, cfg.steps, cfg.optimizer.lr, warmup=cfg.optimizer.warmup_steps)
            losses = reward_losses(reward, cfg, train, trips, samples, step)
            loss = sum(losses.values(), torch.zeros((), device=device))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(reward.parameters(), cfg.optimizer.max_grad_norm)
            optimizer.step()
            progress.advance(**{name: float(value.detach()) for name, value in losses.items()})
    reward.eval()
    return reward, evaluate_reward(reward, sample_pool(backbone, cfg, heldout, cfg.eval_clips, stream=13))


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
    rendered, attributes = draw_shapes(combinations, half, cfg.clip.spec, (cfg.seed, 15, step), device)
    rendered_words = reward.mentioned_words([a.prompt for a in attributes]).to(rendered)
    tripped, tripped_words, _ = trips.take(_choose(len(trips.prompts), half, generator), device)
    clean, clean_words = torch.cat([rendered, tripped]), torch.cat([rendered_words, tripped_words])
    damaged, damaged_frames = corrupt(clean, generator)
    sampled, sampled_words, craft = samples.take(_choose(len(samples.prompts), cfg.batch_size, generator), device)
    damaged_words, _ = word_targets(damaged)

    videos = torch.cat([clean, damaged, sampled])
    videos = videos + 0.02 * torch.randn(videos.shape, generator=generator).to(device)
    clip, frames = reward.logits(videos)
    words = torch.cat([clean_words, damaged_words, sampled_words])
    words = words * (1 - 2 * cfg.label_smoothing) + cfg.label_smoothing
    is_whole = torch.cat([torch.ones(len(clean)), torch.zeros(len(damaged)), torch.ones(len(sampled))]).to(device)
    frame_loss = F.binary_cross_entropy_with_logits(
        frames[..., :-1], words[:, None].expand(-1, frames.shape[1], -1), reduction="none"
    ).mean(dim=(1, 2))

    good, bad = clip[: len(clean), -1], clip[len(clean) : 2 * len(clean), -1]
    good_frames, bad_frames = frames[: len(clean), :, -1], frames[len(clean) : 2 * len(clean), :, -1]
    quality = clip[2 * len(clean) :, -1]
    left, right = quality.chunk(2)
    left_craft, right_craft = craft.chunk(2)
    decided = (left_craft - right_craft).abs() > _PREFERENCE_MARGIN
    sign = torch.sign(left_craft - right_craft)
    anchor = _anchor(good, bad, cfg.label_smoothing) + _anchor(good_frames, bad_frames, cfg.label_smoothing)
    return {
        "words": F.binary_cross_entropy_with_logits(clip[:, :-1], words) + 0.5 * (frame_loss * is_whole).mean(),
        "preference": -F.logsigmoid(good - bad).mean()
        - (F.logsigmoid(good_frames - bad_frames) * damaged_frames).sum() / damaged_frames.sum().clamp(min=1)
        - (F.logsigmoid(sign * (left - right)) * decided).sum() / decided.sum().clamp(min=1),
        "anchor": 0.1 * anchor,
    }  # fmt: skip


def _choose(total: int, batch: int, generator: torch.Generator) -> Tensor:
    return torch.randint(total, (batch,), generator=generator)


def _anchor(good: Tensor, bad: Tensor, smoothing: float) -> Tensor:
    logits = torch.cat([good, bad])
    targets = torch.cat([torch.full_like(good, 1 - smoothing), torch.full_like(bad, smoothing)])
    return F.binary_cross_entropy_with_logits(logits, targets)


@torch.no_grad()
def evaluate_reward(reward: WordReward, pool: ClipPool) -> dict[str, float]:
    """On sampled clips: balanced accuracy of "the prompted word is shown" by attribute, and what ranks by adherence."""
    device = next(reward.parameters()).device
    logits, scores = [], []
    for index in torch.arange(len(pool.prompts)).split(64):
        videos, _, _ = pool.take(index, device)
        logits.append(reward.logits(videos)[0][:, :-1].cpu())
        scores.append(reward(videos, [pool.prompts[i] for i in index]).clip.cpu())
    predicted = torch.cat(logits) > 0
    mentioned = reward.mentioned_words(pool.prompts)
    metrics: dict[str, float] = {}
    start = 0
    for name, words in WORDS.items():
        columns = slice(start, start + len(words))
        start += len(words)
        said = (predicted[:, columns] & mentioned[:, columns]).any(dim=1)
        shown = (pool.words[:, columns].bool() & mentioned[:, columns]).any(dim=1)
        rates = [(said == shown)[shown == truth].float().mean() for truth in (True, False) if (shown == truth).any()]
        metrics[f"accuracy_{name}"] = float(torch.stack(rates).mean())
        metrics[f"shown_{name}"] = float(shown.float().mean())
    adherence = (pool.words.bool() & mentioned).sum(dim=1).float()
    ranks = torch.stack([_ranks(torch.cat(scores)), _ranks(adherence)])
    metrics["rank_correlation"] = float(torch.corrcoef(ranks)[0, 1])
    return metrics


def _ranks(values: Tensor) -> Tensor:
    """Ranks from 0, ties sharing their mean rank, as Spearman's correlation wants them."""
    return (values[:, None] > values).sum(dim=1) + ((values[:, None] == values).sum(dim=1) - 1) / 2
