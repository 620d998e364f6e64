"""Train a small VAE: an AutoencoderKLWan on rendered shapes, as the embedded default's, or on videos."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from rats_video.backbones.wan_decode import decode_unclamped
from rats_video.config.fields import (
    ClipConfig,
    Config,
    NonNegativeFloat,
    NonNegativeInt,
    NumClips,
    PositiveFloat,
    PositiveInt,
    Seed,
)
from rats_video.files import replacing, tidy
from rats_video.optim import cosine_lr
from rats_video.pretraining.resumable import delete_checkpoints, resumable_steps
from rats_video.pretraining.vae_clips import DrawFn, shapes_clips, video_clips
from rats_video.seeds import seeded


class VaeModelConfig(Config):
    """Shape of the AutoencoderKLWan."""

    base_dim: PositiveInt = Field(16, description="channels at full size")
    dim_mult: tuple[PositiveInt, ...] = Field(
        (1, 2, 2), description="times base_dim, the channels at each size; each but the first halves it"
    )
    latent_channels: PositiveInt = Field(32, description="numbers of one latent position")
    patch_size: PositiveInt = Field(4, description="pixels folded into channels before the first convolution")
    num_res_blocks: NonNegativeInt = Field(1, description="of the encoder at each size; the decoder has one more")


class VaeStageConfig(Config):
    """One stage of the curriculum: short clips first, whole clips last (or later latent frames are never seen)."""

    num_frames: PositiveInt = Field(description="frames of its clips")
    batch_size: NumClips = Field(description="clips a step")
    steps: PositiveInt = Field(description="updates of the weights")
    lr: PositiveFloat = Field(description="learning rate")
    trains: Literal["all", "decoder"] = Field("all", description="what learns; the rest stays as it is")
    latent_noise: NonNegativeFloat = Field(
        0.05, description="noise on the latents, in their own deviations: samples are never exact"
    )
    vary_noise: bool = Field(default=False, description="draw each clip's noise level between 0 and latent_noise")


class VaeConfig(Config):
    """Root of `train vae`."""

    seed: Seed = 0
    clip: ClipConfig = ClipConfig()
    videos: str | None = Field(None, description="what to learn, as `prepare` takes it; null renders shapes")
    init: str | None = Field(
        None, description="pipeline folder or embedded name whose vae/ is trained on; null: random"
    )
    model: VaeModelConfig = Field(VaeModelConfig(), description="where init is null")
    stages: tuple[VaeStageConfig, ...] = Field(min_length=1, description="one after the other")
    object_weight: NonNegativeFloat = Field(15.0, description="extra loss weight of pixels unlike their frame's corner")
    prune_channels: PositiveInt | None = Field(
        None, description="keep only this many principal components of the latent channels, at the end"
    )
    stats_clips: NumClips = Field(512, description="clips from which latents_mean and latents_std are measured")
    eval_clips: NumClips = Field(64, description="clips that it is measured on")


_LOG_VARIANCE = -8.0


def build_vae(cfg: VaeConfig) -> Any:
    """A randomly initialised AutoencoderKLWan with temporal stride 4."""
    from diffusers import AutoencoderKLWan

    model = cfg.model
    num_downsamples = len(model.dim_mult) - 1
    vae = AutoencoderKLWan(
        base_dim=model.base_dim,
        decoder_base_dim=model.base_dim,
        is_residual=True,  # shortcuts past the strided layers: colours arrive early in training
        dim_mult=list(model.dim_mult),
        z_dim=model.latent_channels,
        num_res_blocks=model.num_res_blocks,
        attn_scales=[],
        temperal_downsample=[True] * 2 + [False] * (num_downsamples - 2),
        patch_size=model.patch_size,
        in_channels=3 * model.patch_size**2,
        out_channels=3 * model.patch_size**2,
        scale_factor_spatial=model.patch_size * 2**num_downsamples,
        scale_factor_temporal=4,
        latents_mean=[0.0] * model.latent_channels,
        latents_std=[1.0] * model.latent_channels,
    )
    # An autoencoder in a VAE's clothes: the posterior is narrow and stays so, the noise in training is ours.
    with torch.no_grad():
        vae.quant_conv.weight[model.latent_channels :] = 0
        vae.quant_conv.bias[model.latent_channels :] = _LOG_VARIANCE
    _inflate(vae)
    return vae


@torch.no_grad()
def _inflate(vae: Any) -> None:
    """Start as an image autoencoder that repeats itself in time, so that single frames can teach whole clips.

    Causal convolutions look only at the present frame; the temporal strides pass the newest frame down and its features
    up to both of its successors. Without this, what stage 1 learns is undone when clips first arrive.
    """
    for name, parameter in vae.named_parameters():
        if parameter.ndim != 5 or parameter.shape[2] == 1:  # not a temporal convolution
            continue
        parameter[:, :, :-1] = 0
        if ".time_conv." in name:
            channels = parameter.shape[1]
            identity = torch.eye(channels).repeat(parameter.shape[0] // channels, 1)
            parameter[:, :, -1] = identity[:, :, None, None]


def train_vae(cfg: VaeConfig, device: torch.device, folder: Path, *, init: Any = None) -> tuple[Any, dict[str, float]]:
    """Run the curriculum; after each stage the VAE, with its latents' statistics, is saved as `folder/stage-K`.

    A stage that trains only the decoder leaves the latents as they are, so that a teacher can be trained on an earlier
    stage's latents while the decoder is still being refined. Stages found in `folder` are not trained again, and one
    that was begun is gone on with.

    Args:
        cfg: of the training.
        device: where it computes.
        folder: of the stages.
        init: the AutoencoderKLWan to go on from; None starts at random.

    Returns:
        The AutoencoderKLWan and the PSNR in dB on held-out clips.

    Raises:
        UserError: the videos to learn give too few clips.
    """
    torch.manual_seed(cfg.seed)
    vae = (build_vae(cfg) if init is None else init).to(device).train()
    spec = cfg.clip.spec
    clips = shapes_clips(spec, device) if cfg.videos is None else video_clips(cfg.videos, spec, device)
    tidy(folder)
    for index, stage in enumerate(cfg.stages):
        done = folder / f"stage-{index + 1}"
        if done.is_dir():
            vae = type(vae).from_pretrained(done, local_files_only=True, use_safetensors=True).to(device).train()
            continue
        checkpoints = folder / "checkpoints" / done.name
        _train_stage(vae, cfg, stage, index, clips.train, checkpoints)
        if stage.trains == "all":
            _store_latent_stats(vae, cfg, clips.train)
        with replacing(done, "VAE") as aside:
            vae.save_pretrained(aside)
        delete_checkpoints(checkpoints)
    vae.eval()
    if cfg.prune_channels is not None:
        vae = prune_latents(vae, cfg, clips.train)
    return vae, {"psnr_db": evaluate_psnr(vae, cfg, clips.heldout)}


@torch.no_grad()
def prune_latents(vae: Any, cfg: VaeConfig, draw: DrawFn) -> Any:
    """The same VAE with only the principal components of its latent channels.

    A small autoencoder fills few of its channels: on the shapes 5 of 16 hold 98% of the variance, and a denoiser that
    must reproduce the noise on the other 11 learns little else. The projection is linear, so it folds into the last
    convolution of the encoder and the first of the decoder. The small bias between them (post_quant_conv) is dropped:
    it would have to be padded with, where convolutions pad with zeros.
    """
    kept = cfg.prune_channels
    assert kept is not None
    latents = _encode_sample(vae, cfg, draw).movedim(1, -1).flatten(0, -2)
    _, directions = torch.linalg.eigh(latents.T @ latents)  # not centred: zero padding must stay zero
    basis = directions.flip(1)[:, :kept].T.contiguous()  # [kept, channels], largest first
    channels = basis.shape[1]
    model = cfg.model.model_copy(update={"latent_channels": kept})
    pruned = build_vae(cfg.model_copy(update={"model": model})).to(latents.device)
    linear = ("encoder.conv_out.", "decoder.conv_in.", "quant_conv.", "post_quant_conv.")
    state = {name: value for name, value in vae.state_dict().items() if not name.startswith(linear)}
    mean, old_in, old_out = vae.quant_conv, vae.decoder.conv_in, vae.encoder.conv_out
    down = basis @ mean.weight[:channels, :, 0, 0, 0]
    up = vae.post_quant_conv.weight[:, :, 0, 0, 0] @ basis.T
    log_variance = torch.zeros(kept, down.shape[1], device=down.device)
    to_both = torch.cat([down, log_variance])
    state["encoder.conv_out.weight"] = torch.einsum("oc,cithw->oithw", to_both, old_out.weight)
    state["encoder.conv_out.bias"] = torch.cat([
        down @ old_out.bias + basis @ mean.bias[:channels], torch.full((kept,), _LOG_VARIANCE, device=down.device)
    ])  # fmt: skip
    state["decoder.conv_in.weight"] = torch.einsum("octhw,ck->okthw", old_in.weight, up)
    state["decoder.conv_in.bias"] = old_in.bias
    state["quant_conv.weight"] = torch.eye(2 * kept, device=down.device)[:, :, None, None, None]
    state["quant_conv.bias"] = torch.zeros(2 * kept, device=down.device)
    state["post_quant_conv.weight"] = torch.eye(kept, device=down.device)[:, :, None, None, None]
    state["post_quant_conv.bias"] = torch.zeros(kept, device=down.device)
    pruned.load_state_dict(state)
    pruned.eval()
    _store_latent_stats(pruned, cfg, draw)
    return pruned


def _train_stage(vae: Any, cfg: VaeConfig, stage: VaeStageConfig, index: int, draw: DrawFn, checkpoints: Path) -> None:
    trained = [vae] if stage.trains == "all" else [vae.post_quant_conv, vae.decoder]
    parameters = [parameter for module in trained for parameter in module.parameters()]
    vae.requires_grad_(requires_grad=False)
    for module in trained:
        module.requires_grad_(requires_grad=True)
    optimizer = torch.optim.Adam(parameters, lr=stage.lr, betas=(0.9, 0.99))
    device = next(vae.parameters()).device
    weights = {name: weight for name, weight in vae.named_parameters() if weight.requires_grad}
    for step, progress in resumable_steps(
        f"train vae, stage {index + 1}", stage.steps, checkpoints, weights, optimizer
    ):
        for group in optimizer.param_groups:
            group["lr"] = cosine_lr(step, stage.steps, stage.lr, warmup=min(50, stage.steps // 10), floor=0.05)
        videos = draw(stage.batch_size, stage.num_frames, (cfg.seed, 1 + index, step))
        loss, mse = vae_loss(vae, videos, cfg, stage, seeded(cfg.seed, 101 + index, step, device=device))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        progress.advance(frames=stage.num_frames, psnr=-10 * math.log10(max(1e-9, float(mse))))


def vae_loss(
    vae: Any, videos: Tensor, cfg: VaeConfig, stage: VaeStageConfig, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """L1 + 4 L2 with pixels of the object weighted up; and the plain mean square error of pixels in [0, 1]."""
    pixels = videos.transpose(1, 2) * 2 - 1
    latents = vae.encode(pixels).latent_dist.mean
    spread = latents.detach().std(dim=(0, 2, 3, 4), keepdim=True)
    noise = torch.randn(latents.shape, generator=generator, device=latents.device)
    level = torch.full_like(spread[:1], stage.latent_noise)
    if stage.vary_noise:
        level = level * torch.rand(len(videos), 1, 1, 1, 1, generator=generator, device=latents.device)
    decoded = decode_unclamped(vae, latents + level * spread * noise)
    is_object = (pixels - pixels[..., :1, :1]).abs().amax(dim=1, keepdim=True) > 0.02  # the corner is background
    error = decoded - pixels
    loss = ((1 + cfg.object_weight * is_object) * (error.abs() + 4 * error.square())).mean()
    return loss, error.detach().square().mean() / 4


@torch.no_grad()
def _encode_sample(vae: Any, cfg: VaeConfig, draw: DrawFn) -> Tensor:
    """Raw latents `[stats_clips, C, F, H, W]`."""
    batches = [
        vae.encode(draw(32, cfg.clip.num_frames, (cfg.seed, 90, start)).transpose(1, 2) * 2 - 1).latent_dist.mean
        for start in range(0, cfg.stats_clips, 32)
    ]
    return torch.cat(batches)


def _store_latent_stats(vae: Any, cfg: VaeConfig, draw: DrawFn) -> None:
    latents = _encode_sample(vae, cfg, draw)
    vae.register_to_config(
        latents_mean=latents.mean(dim=(0, 2, 3, 4)).tolist(), latents_std=latents.std(dim=(0, 2, 3, 4)).tolist()
    )


@torch.no_grad()
def evaluate_psnr(vae: Any, cfg: VaeConfig, draw: DrawFn) -> float:
    """Mean PSNR in dB of the round trip on whole clips."""
    scores: list[float] = []
    for start in range(0, cfg.eval_clips, 16):
        pixels = draw(16, cfg.clip.num_frames, (cfg.seed, 91, start)).transpose(1, 2) * 2 - 1
        decoded = vae.decode(vae.encode(pixels).latent_dist.mean, return_dict=False)[0]
        mse = (decoded - pixels).square().mean(dim=(1, 2, 3, 4)) / 4
        scores += (-10 * mse.log10()).tolist()
    return sum(scores) / len(scores)
