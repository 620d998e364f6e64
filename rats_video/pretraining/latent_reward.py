"""Train a latent reward: the sketch of a clip by which the pixel reward judges as it would by the decoded clip."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from rats_video.backbones.base import PipelineBackbone
from rats_video.diffusion.causal import pool_to_latent_frames
from rats_video.optim import build_optimizer, set_learning_rate
from rats_video.pretraining.latent_pool import (
    Change,
    LatentRewardTrainConfig,
    LatentSampler,
    ScoredLatents,
    corrupt_latents,
)
from rats_video.pretraining.ranks import rank_correlation
from rats_video.pretraining.resumable import resumable_steps
from rats_video.rewards.latent import LatentReward, LatentSpace
from rats_video.seeds import seeded

POOL = "pool.safetensors"
_NOT_OF_POOL = {"init", "width", "blocks", "rounds", "num_climbed", "climb", "batch_size", "steps", "sketch_steps",
                "score_weight", "contrast_weight", "optimizer", "student", "eval_clips"}  # fmt: skip
_CLIMB_STEPS = 8
_PREDICT_BATCH = 64
_HUBER = 0.3  # of the scores' own spread: nearer is squared, farther is linear


def ascend_reward(reward: LatentReward, longest: float) -> Change:
    """Moves latents up the latent reward's own gradient, each clip by up to `longest` (root mean square)."""

    @torch.enable_grad()
    def change(latents: Tensor, prompts: list[str], generator: Generator) -> Tensor:
        distance = longest * torch.rand(len(latents), generator=generator).view(-1, 1, 1, 1, 1).to(latents.device)
        for _ in range(_CLIMB_STEPS):
            here = latents.requires_grad_()
            (slope,) = torch.autograd.grad(reward.score_latents(here, prompts).clip.sum(), here)
            size = slope.square().mean(dim=(1, 2, 3, 4), keepdim=True).sqrt()
            latents = (here + distance / _CLIMB_STEPS * slope / size.clamp(min=1e-12)).detach()
        return latents

    return change


def train_latent_reward(
    cfg: LatentRewardTrainConfig, studio: LatentSampler, space: LatentSpace, folder: Path, init: Path | None = None
) -> LatentReward:
    """Learn to draw clips of the training prompts, and in rounds those that were climbed on the reward so far.

    With `init` that folder's sketch goes on learning, whatever its shape. Making the clips takes much of the time:
    until the end they are kept in `folder`, beside checkpoints.
    """
    torch.manual_seed(cfg.seed)
    made_from = f"{space} {cfg.model_dump_json(exclude=_NOT_OF_POOL)}"
    pool = _found_or_made(folder / POOL, made_from, lambda: training_pool(studio))
    device = studio.backbone.device
    if init is None:
        shape = {"width": cfg.width, "blocks": cfg.blocks, "coarse": cfg.coarse}
        reward = LatentReward(space, cfg.reward, studio.reward, **shape).to(device)
    else:
        reward = LatentReward.load(init, device, lambda _: studio.reward, space)
    reward.sketch.requires_grad_()
    optimizer = build_optimizer(cfg.optimizer, reward.sketch.parameters())
    rounds = {cfg.steps * (turn + 1) // (cfg.rounds + 1): turn for turn in range(cfg.rounds if cfg.num_climbed else 0)}
    weights = dict(reward.sketch.named_parameters())
    for step, progress in resumable_steps("train latent reward", cfg.steps, folder / "checkpoints", weights, optimizer):
        while rounds and min(rounds) <= step:  # of one that is behind, only what was climbed then is found again
            turn = rounds.pop(min(rounds))
            change = ascend_reward(reward, cfg.climb)
            make = partial(studio.changed, "climbed clips", cfg.num_climbed, 25 + turn, pool, change)
            climbed = _found_or_made(folder / f"climbed-{turn}.safetensors", cfg.model_dump_json(), make)
            pool = ScoredLatents.cat([pool, climbed])
        set_learning_rate(optimizer, cfg.optimizer, step, cfg.steps)
        generator = seeded(cfg.seed, 24, step)
        chosen = torch.randint(len(pool), (cfg.batch_size,), generator=generator)
        column = int(torch.randint(pool.prompts.shape[1], (), generator=generator))
        sketch = reward.sketch(pool.latents[chosen].to(device))
        losses = {"pixels": pixel_loss(sketch, pool.small[chosen].to(device), cfg.contrast_weight)}
        if step >= cfg.sketch_steps:
            losses["scores"] = score_loss(reward, sketch, pool, chosen, studio.prompts, column)
        loss = losses["pixels"] + cfg.score_weight * losses.get("scores", 0)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(reward.sketch.parameters(), cfg.optimizer.max_grad_norm)
        optimizer.step()
        progress.advance(**{name: float(value.detach()) for name, value in losses.items()})
    reward.save(folder)
    for path in (folder / POOL, *folder.glob("climbed-*.safetensors")):
        path.unlink()
    return reward.requires_grad_(requires_grad=False).eval()


def _found_or_made(path: Path, identity: str, make: Callable[[], ScoredLatents]) -> ScoredLatents:
    found = ScoredLatents.find(path, identity)
    if found is None:
        found = make()
        found.save(path, identity)
    return found


def training_pool(studio: LatentSampler) -> ScoredLatents:
    """Samples at all settings, damaged ones, and rendered clips where they are asked for."""
    cfg = studio.cfg
    pools = [studio.sampled(studio.backbone, cfg.num_samples, 21, _settings(cfg))]
    if cfg.num_damaged:
        pools.append(studio.changed("damaged clips", cfg.num_damaged, 22, pools[0], corrupt_latents))
    if cfg.num_rendered:
        pools.append(studio.rendered(cfg.num_rendered, 23))
    return ScoredLatents.cat(pools)


def _settings(cfg: LatentRewardTrainConfig) -> list[tuple[int, float]]:
    return [(steps, scale) for steps in cfg.sample_steps for scale in cfg.guidance_scales]


def pixel_loss(sketch: Tensor, small: Tensor, contrast_weight: float) -> Tensor:
    """Mean distance of sketches to small clips (bytes); pixels that stand off their frame's mean count more."""
    wanted = small / 255
    contrast = (wanted - wanted.mean(dim=(-2, -1), keepdim=True)).norm(dim=2, keepdim=True)
    loss: Tensor = ((1 + contrast_weight * contrast) * (sketch - wanted).abs()).mean()
    return loss


def score_loss(
    reward: LatentReward, sketch: Tensor, pool: ScoredLatents, chosen: Tensor, prompts: Sequence[str], column: int
) -> Tensor:
    """Distance of sketches and clips in their scores, parts and frame scores (Huber, by the scores' own spread).

    Against the prompts of that column of the pool; 0 is their own.
    """
    said = reward.judge(reward.enlarge(sketch), [prompts[i] for i in pool.prompts[chosen, column].tolist()])
    pairs = list(zip((said.clip, *said.parts.values()), pool.clip.unbind(dim=-1), strict=True))
    if said.frames is not None and pool.frames is not None:
        pairs.append((pool_to_latent_frames(said.frames, reward.space.temporal_stride), pool.frames))
    return torch.stack([_distance(score, wanted[chosen, column], wanted[:, 0].std()) for score, wanted in pairs]).sum()


def _distance(scores: Tensor, wanted: Tensor, spread: Tensor) -> Tensor:
    """Huber's, in spreads; a score that never changes has none."""
    unit = spread.clamp(min=1e-6).to(scores)
    return F.smooth_l1_loss(scores / unit, wanted.to(scores) / unit, beta=_HUBER)


def evaluate_latent_reward(
    cfg: LatentRewardTrainConfig,
    reward: LatentReward,
    studio: LatentSampler,
    student: PipelineBackbone | None,
    steps: int,
) -> dict[str, float]:
    """Agreement with the pixel reward on held-out prompts: on samples of the model, at all settings, and of a student.

    Also on damaged samples, and on samples climbed on this very reward, which is where it is most wrong.
    """
    settings, count = _settings(cfg), cfg.eval_clips
    size = min(cfg.sample_batch, -(-count // len(settings)))  # all settings have their turn
    studio = replace(studio, cfg=cfg.model_copy(update={"other_prompts": 0, "sample_batch": size}))
    samples = studio.sampled(studio.backbone, count, 31, settings)
    sets = {"samples": samples}
    if student is not None:
        sets["student"] = studio.sampled(student, count, 32, [(steps, 1.0)])
    sets["damaged"] = studio.changed("damaged clips", count, 33, samples, corrupt_latents)
    sets["climbed"] = studio.changed("climbed clips", count, 34, samples, ascend_reward(reward, cfg.climb))
    return {
        f"{measure}_{name}": value
        for name, scored in sets.items()
        for measure, value in agreement(reward, scored, studio.prompts).items()
    }


@torch.no_grad()
def agreement(reward: LatentReward, scored: ScoredLatents, prompts: Sequence[str]) -> dict[str, float]:
    """Spearman's correlation with the pixel reward, over clips and, where there are any, over frames; and `bias`.

    Bias is by how much the latent reward's mean score is higher.
    """
    clip, frames = [], []
    for index in torch.arange(len(scored)).split(_PREDICT_BATCH):
        chosen = [prompts[i] for i in scored.prompts[index, 0].tolist()]
        said = reward.score_latents(scored.latents[index].to(next(reward.parameters()).device), chosen)
        clip.append(said.clip.cpu())
        if said.frames is not None:
            frames.append(pool_to_latent_frames(said.frames, reward.space.temporal_stride).cpu())
    wanted = scored.clip[:, 0, 0]
    found = {
        "rank_correlation": rank_correlation(torch.cat(clip), wanted),
        "bias": float((torch.cat(clip) - wanted).mean()),
    }
    if scored.frames is not None:
        found["frame_rank_correlation"] = rank_correlation(torch.cat(frames).flatten(), scored.frames[:, 0].flatten())
    return found
