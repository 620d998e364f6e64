"""Train a latent reward: what a pixel reward says of decoded clips, learned from their latents."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from rats_video.backbones.base import PipelineBackbone
from rats_video.config.pretrain import LatentRewardTrainConfig
from rats_video.diffusion.causal import pool_to_latent_frames
from rats_video.rewards.latent_reward import LatentReward, LatentSpace
from rats_video.seeds import seeded
from rats_video.training.latent_pool import Change, Scored, Studio, damage
from rats_video.training.optim import build_optimizer, set_learning_rate
from rats_video.training.resumable import resumable
from rats_video.training.reward import rank_correlation
from rats_video.types import TextCondition

POOL = "pool.safetensors"
_NOT_OF_POOL = {"width", "halvings", "rounds", "num_climbed", "climb", "batch_size", "steps", "rank_weight",
                "optimizer", "student", "eval_clips"}  # fmt: skip
_CLIMB_STEPS = 8
_PREDICT_BATCH = 128
_HUBER = 0.3  # of the scores' own spread: nearer is squared, farther is linear


def climb(reward: LatentReward, studio: Studio, longest: float) -> Change:
    """Moves latents up the latent reward's own gradient, each clip by up to `longest` (root mean square)."""

    @torch.enable_grad()
    def change(latents: Tensor, prompts: list[str], generator: Generator) -> Tensor:
        text = reward.text(studio.backbone.encode_text(prompts)).detach()[:, None]
        distance = longest * torch.rand(len(latents), generator=generator).view(-1, 1, 1, 1, 1).to(latents.device)
        for _ in range(_CLIMB_STEPS):
            here = latents.requires_grad_()
            (slope,) = torch.autograd.grad(reward(here, text)[0][:, 0, 0].sum(), here)
            size = slope.square().mean(dim=(1, 2, 3, 4), keepdim=True).sqrt()
            latents = (here + distance / _CLIMB_STEPS * slope / size.clamp(min=1e-12)).detach()
        return latents

    return change


def train_latent_reward(cfg: LatentRewardTrainConfig, studio: Studio, space: LatentSpace, folder: Path) -> LatentReward:
    """Train on latents of the training prompts, and in rounds on what was climbed on the reward so far.

    Scoring them takes most of the time: until the end they are kept in `folder`, beside checkpoints.
    """
    torch.manual_seed(cfg.seed)
    backbone = studio.backbone
    made_from = f"{space} {cfg.model_dump_json(exclude=_NOT_OF_POOL)}"
    pool = _found_or_made(folder / POOL, made_from, lambda: training_pool(studio))
    reward = LatentReward(
        space, cfg.reward, backbone.encode_text,
        parts=pool.parts, has_frames=pool.frames is not None, width=cfg.width, halvings=cfg.halvings,
    ).to(backbone.device)  # fmt: skip
    _set_levels(reward, pool)
    texts = TextCondition.cat([backbone.encode_text([prompt]) for prompt in studio.prompts])
    optimizer = build_optimizer(cfg.optimizer, reward.parameters())
    rounds = {cfg.steps * (turn + 1) // (cfg.rounds + 1): turn for turn in range(cfg.rounds if cfg.num_climbed else 0)}
    weights = dict(reward.named_parameters())
    for step, progress in resumable("train latent reward", cfg.steps, folder / "checkpoints", weights, optimizer):
        while rounds and min(rounds) <= step:  # of one that is behind, only what was climbed then is found again
            turn = rounds.pop(min(rounds))
            change = climb(reward, studio, cfg.climb)
            make = partial(studio.changed, "climbed clips", cfg.num_climbed, 25 + turn, pool, change)
            climbed = _found_or_made(folder / f"climbed-{turn}.safetensors", cfg.model_dump_json(), make)
            pool = Scored.cat([pool, climbed])
        set_learning_rate(optimizer, cfg.optimizer, step, cfg.steps)
        chosen = torch.randint(len(pool), (cfg.batch_size,), generator=seeded(cfg.seed, 24, step))
        losses = imitation_losses(reward, pool, chosen, texts)
        loss = losses["scores"] + cfg.rank_weight * losses["order"]
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(reward.parameters(), cfg.optimizer.max_grad_norm)
        optimizer.step()
        progress.advance(**{name: float(value.detach()) for name, value in losses.items()})
    reward.save(folder)
    for path in (folder / POOL, *folder.glob("climbed-*.safetensors")):
        path.unlink()
    return reward.requires_grad_(requires_grad=False).eval()


def _found_or_made(path: Path, identity: str, make: Callable[[], Scored]) -> Scored:
    found = Scored.find(path, identity)
    if found is None:
        found = make()
        found.save(path, identity)
    return found


def training_pool(studio: Studio) -> Scored:
    """Samples at all settings, damaged ones, and rendered clips where they are asked for."""
    cfg = studio.cfg
    pools = [studio.sampled(studio.backbone, cfg.num_samples, 21, _settings(cfg))]
    if cfg.num_damaged:
        pools.append(studio.changed("damaged clips", cfg.num_damaged, 22, pools[0], damage))
    if cfg.num_rendered:
        pools.append(studio.rendered(cfg.num_rendered, 23))
    return Scored.cat(pools)


def _settings(cfg: LatentRewardTrainConfig) -> list[tuple[int, float]]:
    return [(steps, scale) for steps in cfg.sample_steps for scale in cfg.guidance_scales]


def _set_levels(reward: LatentReward, pool: Scored) -> None:
    """The scores of clips against their own prompts become standard normal: that is where a student lives."""
    columns = [*pool.clip[:, 0].unbind(dim=-1)]
    columns.append(torch.zeros(2) if pool.frames is None else pool.frames[:, 0].flatten())
    for i, column in enumerate(columns):
        reward.mean[i], reward.spread[i] = column.mean(), column.std().clamp(min=1e-6)


def imitation_losses(reward: LatentReward, pool: Scored, chosen: Tensor, texts: TextCondition) -> dict[str, Tensor]:
    """Losses on the clips `chosen`: `scores`, how far they are off (Huber), and `order`, Bradley-Terry on pairs.

    A pair counts by how far the pixel reward sees its clips apart; both are judged by their own prompts.
    """
    device = reward.mean.device
    places = pool.prompts[chosen]
    text = reward.text(texts.map(lambda part: part[places.flatten()])).unflatten(0, places.shape)
    clip, frames = reward(pool.latents[chosen].to(device), text)
    wanted = (pool.clip[chosen].to(device) - reward.mean[:-1]) / reward.spread[:-1]
    scores = F.smooth_l1_loss(clip, wanted, beta=_HUBER)
    if frames is not None and pool.frames is not None:
        wanted_frames = (pool.frames[chosen].to(device) - reward.mean[-1]) / reward.spread[-1]
        scores = scores + F.smooth_l1_loss(frames, wanted_frames, beta=_HUBER)
    lead, wanted_lead = (own - own.roll(1) for own in (clip[:, 0, 0], wanted[:, 0, 0]))
    order = -(wanted_lead.abs() * F.logsigmoid(wanted_lead.sign() * lead)).mean()
    return {"scores": scores, "order": order}


def evaluate_latent_reward(
    cfg: LatentRewardTrainConfig, reward: LatentReward, studio: Studio, student: PipelineBackbone | None, steps: int
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
    sets["damaged"] = studio.changed("damaged clips", count, 33, samples, damage)
    sets["climbed"] = studio.changed("climbed clips", count, 34, samples, climb(reward, studio, cfg.climb))
    return {
        f"{measure}_{name}": value
        for name, scored in sets.items()
        for measure, value in agreement(reward, scored, studio.prompts).items()
    }


@torch.no_grad()
def agreement(reward: LatentReward, scored: Scored, prompts: Sequence[str]) -> dict[str, float]:
    """Spearman's correlation with the pixel reward, over clips and, where there are any, over frames; and `bias`.

    Bias is by how much the latent reward's mean score is higher.
    """
    clip, frames = [], []
    for index in torch.arange(len(scored)).split(_PREDICT_BATCH):
        chosen = [prompts[i] for i in scored.prompts[index, 0].tolist()]
        said = reward.score_latents(scored.latents[index].to(reward.mean.device), chosen)
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
