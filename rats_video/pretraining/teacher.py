"""Train the embedded default's teacher: flow matching on cached latents of rendered shapes."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from torch import Generator, Tensor
from torch.nn import functional as F

from rats_video.backbones.wan import WanBackbone
from rats_video.condition import Condition, GivenFrames
from rats_video.config.fields import (
    ClipConfig,
    Config,
    NonNegativeInt,
    NumClips,
    PositiveFloat,
    PositiveInt,
    Seed,
    SolverSteps,
)
from rats_video.datasets.shapes.measure import measure_shapes
from rats_video.datasets.shapes.render import VOCABULARY, ShapeAttributes, render, split_combinations
from rats_video.diffusion.flow import add_noise
from rats_video.diffusion.rollout import rollout
from rats_video.diffusion.schedule import shift_sigma, sigma_grid
from rats_video.optim import OptimizerConfig, TrainStepsConfig
from rats_video.pretraining.flow import decoded, fit, sampled_twice
from rats_video.pretraining.vae_clips import draw_shapes
from rats_video.progress import ProgressBar
from rats_video.seeds import seeded
from rats_video.types import ClipSpec

_CHUNK = 64  # clips rendered and encoded at a time


class TransformerConfig(Config):
    """Shape of the WanTransformer3DModel."""

    num_heads: PositiveInt = Field(4, description="attention heads of a block")
    head_dim: PositiveInt = Field(32, description="channels of a head")
    ffn_dim: PositiveInt = Field(512, description="hidden channels of a block's feed-forward layer")
    num_layers: PositiveInt = Field(6, description="blocks")
    patch_size: tuple[PositiveInt, PositiveInt, PositiveInt] = Field(
        (1, 1, 1), description="latents of one token: frames, rows, columns"
    )
    text_gain: PositiveFloat = Field(
        1.0,
        description="of cross-attention's values at the start: a dozen words share it with 500 rows of padding",
    )


class TextEncoderConfig(Config):
    """Shape of the UMT5 encoder. It stays random: thirty words need contextual features, not a learned language."""

    d_model: PositiveInt = Field(64, description="channels of a token")
    num_layers: PositiveInt = Field(2, description="blocks")
    num_heads: PositiveInt = Field(4, description="attention heads of a block")


class FramesConfig(Config):
    """Single frames: they teach shapes, at a fraction of what a clip costs."""

    num_clips: NumClips = Field(8192, description="frames rendered and encoded once")
    batch_size: NumClips = Field(64, description="frames a step")
    steps: NonNegativeInt = Field(900, description="steps before the first clip")
    share: float = Field(0.2, ge=0, lt=1, description="share of the later steps")


class TeacherTrainConfig(TrainStepsConfig):
    """Root of `train teacher`: flow matching on cached latents."""

    seed: Seed = 0
    clip: ClipConfig = ClipConfig()
    vae: str = Field("tiny-wan", description="pipeline folder or embedded name whose VAE is used")
    init: str | None = Field(None, description="folder whose transformer/ is trained on; null starts at random")
    transformer: TransformerConfig = TransformerConfig()
    text_encoder: TextEncoderConfig = TextEncoderConfig()
    num_clips: NumClips = Field(8192, description="clips rendered and encoded once")
    path_spread: float = Field(1.0, ge=0, le=1, description="how far the clips' paths scatter around the centre")
    frames: FramesConfig | None = Field(None, description="train on single frames too; null: on clips alone")
    given_first_frame: float = Field(
        0.0,
        ge=0,
        le=1,
        description="share of clips whose first frame is given, free of noise; patches of one frame",
    )
    batch_size: NumClips = Field(64, description="clips a step")
    steps: PositiveInt = Field(4000, description="updates of the weights")
    checkpoint_every: PositiveInt = Field(300, description="steps")
    optimizer: OptimizerConfig
    shift: PositiveFloat = Field(3.0, description="sigma grid shift, in training and in the saved scheduler")
    prompt_dropout: float = Field(0.1, ge=0, lt=1, description="share of clips trained on the empty prompt")
    ema_decay: float = Field(0.999, ge=0, lt=1, description="of the averaged weights, which are the result; 0 is off")
    half: bool = Field(default=False, description="round the trained weights to half precision and store them as such")
    eval_clips: NumClips = Field(64, description="held-out clips that it is measured on")
    eval_steps: SolverSteps = Field(50, description="solver steps of those clips")
    guidance_scale: PositiveFloat = Field(3.0, description="of those clips; 1 is off")


def build_tokenizer() -> Any:
    """A WordLevel tokenizer of the shapes vocabulary that ends each prompt with `</s>`, as UMT5's does."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = ("<pad>", "</s>", "<unk>", *dict.fromkeys(VOCABULARY))
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
    )


def build_text_encoder(cfg: TextEncoderConfig, vocab_size: int) -> Any:
    """A randomly initialised UMT5 encoder; its final layer norm gives features of unit size."""
    from transformers import UMT5Config, UMT5EncoderModel

    head_dim = cfg.d_model // cfg.num_heads
    return UMT5EncoderModel(
        UMT5Config(
            vocab_size=vocab_size, d_model=cfg.d_model, d_kv=head_dim, d_ff=2 * cfg.d_model,
            num_layers=cfg.num_layers, num_heads=cfg.num_heads, pad_token_id=0, eos_token_id=1, dropout_rate=0.0,
        )
    )  # fmt: skip


def build_transformer(cfg: TransformerConfig, *, latent_channels: int, text_dim: int) -> Any:
    """A randomly initialised WanTransformer3DModel."""
    from diffusers import WanTransformer3DModel

    transformer = WanTransformer3DModel(
        patch_size=cfg.patch_size, num_attention_heads=cfg.num_heads, attention_head_dim=cfg.head_dim,
        in_channels=latent_channels, out_channels=latent_channels, text_dim=text_dim, freq_dim=256,
        ffn_dim=cfg.ffn_dim, num_layers=cfg.num_layers, cross_attn_norm=True,
        qk_norm="rms_norm_across_heads", rope_max_seq_len=32,
    )  # fmt: skip
    for block in transformer.blocks:
        block.attn2.to_v.weight.data.mul_(cfg.text_gain)
    return transformer


@dataclass(frozen=True)
class LatentCache:
    """Clips encoded once: `latents` `[N, C, F, H, W]`, with `prompt_index` `[N]` into `text`, its last row empty."""

    latents: Tensor
    prompt_index: Tensor
    text: Condition


def train_teacher(
    cfg: TeacherTrainConfig, vae: Any, init: Path | None, device: torch.device, folder: Path
) -> tuple[WanBackbone, dict[str, float]]:
    """Train a text-to-video model on the training combinations; `init` is a folder whose transformer it starts from.

    Its checkpoints are kept in `folder/checkpoints`, from which an interrupted training goes on.

    Returns:
        The backbone with the averaged weights, and its measured adherence on held-out combinations.
    """
    torch.manual_seed(cfg.seed)
    tokenizer = build_tokenizer()
    text_encoder = build_text_encoder(cfg.text_encoder, len(tokenizer)).to(device)
    transformer = build_transformer(
        cfg.transformer, latent_channels=vae.config.z_dim, text_dim=cfg.text_encoder.d_model
    ).to(device)
    backbone = WanBackbone(transformer=transformer, vae=vae, text_encoder=text_encoder, tokenizer=tokenizer)
    if init is not None:
        backbone = backbone.load_denoiser(init)
    train, heldout = split_combinations()
    clips, frames = encode_clips(backbone, cfg, train), encode_frames(backbone, cfg, train)
    average = copy.deepcopy(backbone.denoiser).eval()
    fit(
        "train teacher", cfg, folder / "checkpoints", backbone.weights, dict(average.named_parameters()),
        lambda step: flow_matching_loss(backbone, clips, frames, cfg, step),
    )  # fmt: skip
    if cfg.half:
        average = average.half().float()
    backbone = WanBackbone(transformer=average, vae=vae, text_encoder=text_encoder, tokenizer=tokenizer)
    return backbone, evaluate_teacher(backbone, cfg, heldout)


def encode_clips(backbone: WanBackbone, cfg: TeacherTrainConfig, combinations: list[ShapeAttributes]) -> LatentCache:
    """Render and encode `num_clips` clips of the combinations."""
    return _encode(backbone, combinations, cfg.num_clips, cfg.clip.spec, (cfg.seed, 1), cfg.path_spread)


def encode_frames(
    backbone: WanBackbone, cfg: TeacherTrainConfig, combinations: list[ShapeAttributes]
) -> LatentCache | None:
    """Single frames of the combinations, where the configuration asks for some."""
    if cfg.frames is None:
        return None
    frame = replace(cfg.clip.spec, num_frames=1)
    return _encode(backbone, combinations, cfg.frames.num_clips, frame, (cfg.seed, 4), cfg.path_spread)


def _encode(
    backbone: WanBackbone, combinations: list[ShapeAttributes], count: int, clip: ClipSpec, seeds: tuple[int, int],
    spread: float,
) -> LatentCache:  # fmt: skip
    rows: list[Tensor] = []
    index: list[int] = []
    where = {attributes: i for i, attributes in enumerate(combinations)}
    with ProgressBar("encode clips", count) as progress:
        for start in range(0, count, _CHUNK):
            batch = min(_CHUNK, count - start)
            videos, attributes = draw_shapes(combinations, batch, clip, (*seeds, start), backbone.device, spread)
            rows.append(backbone.encode(videos))
            index += [where[a] for a in attributes]
            progress.advance(batch)
    text = backbone.encode_text([*(a.prompt for a in combinations), ""])
    return LatentCache(torch.cat(rows), torch.tensor(index, device=backbone.device), text)


def flow_matching_loss(
    backbone: WanBackbone, clips: LatentCache, frames: LatentCache | None, cfg: TeacherTrainConfig, step: int
) -> Tensor:
    """Mean square error of the velocity at random noise levels (Lipman et al., 2023; Liu et al., 2023).

    A given first frame is at noise level 0, and no velocity is asked of it.
    """
    generator, device = seeded(cfg.seed, 2, step), backbone.device
    cache, batch = clips, cfg.batch_size
    if frames is not None and cfg.frames is not None and _is_frame_step(cfg.frames, step, generator):
        cache, batch = frames, cfg.frames.batch_size
    chosen = torch.randint(len(cache.latents), (batch,), generator=generator).to(device)
    sigma = shift_sigma(torch.rand(batch, generator=generator), cfg.shift)
    dropped = (torch.rand(batch, generator=generator) < cfg.prompt_dropout).to(device)
    x0 = cache.latents[chosen]
    noise = torch.randn(x0.shape, generator=generator).to(device)
    if cache is clips and cfg.given_first_frame:
        sigma = sigma[:, None].repeat(1, x0.shape[2])
        sigma[torch.rand(batch, generator=generator) < cfg.given_first_frame, 0] = 0
    sigma = sigma.to(device)
    prompts = torch.where(dropped, len(cache.text) - 1, cache.prompt_index[chosen])
    velocity = backbone.velocity(add_noise(x0, noise, sigma), sigma, Condition(cache.text.embeds[prompts]))
    asked = (sigma > 0).view(batch, 1, -1, 1, 1).expand_as(x0)
    return F.mse_loss(velocity[asked], (noise - x0)[asked])


def _is_frame_step(cfg: FramesConfig, step: int, generator: Generator) -> bool:
    return step < cfg.steps or bool(torch.rand((), generator=generator) < cfg.share)


@torch.no_grad()
def evaluate_teacher(
    backbone: WanBackbone, cfg: TeacherTrainConfig, combinations: list[ShapeAttributes]
) -> dict[str, float]:
    """Measured adherence on held-out combinations: with guidance at `eval_steps`, without it at 4 steps.

    Where the model was taught to go on from a first frame, so it does a third time, with guidance.
    """
    shown = [combinations[i % len(combinations)] for i in range(cfg.eval_clips)]
    prompts = [attributes.prompt for attributes in shown]
    metrics: dict[str, float] = {}
    for num_steps, videos in sampled_twice(backbone, cfg, prompts):
        metrics |= _scores(videos, prompts, f"{num_steps}_steps")
    if cfg.given_first_frame:
        clips = render(shown, cfg.clip.spec, seeded(cfg.seed, 5), backbone.device, spread=cfg.path_spread)
        latents = continued(backbone, cfg, prompts, backbone.encode(clips[:, :1]))
        metrics |= _scores(decoded(backbone, latents), prompts, "first_frame_given")
    return metrics


def _scores(videos: Tensor, prompts: list[str], kind: str) -> dict[str, float]:
    measures = measure_shapes(videos, prompts)
    words = {f"{name}_{kind}": float(values.mean()) for name, values in measures.attributes.items()}
    return {f"adherence_{kind}": float(measures.adherence.mean()), **words}


def continued(backbone: WanBackbone, cfg: TeacherTrainConfig, prompts: list[str], first: Tensor) -> Tensor:
    """Latents `[B, C, F, H, W]` that go on from first frames `[B, C, 1, H, W]`, as Wan 2.2 TI2V-5B samples them."""
    noise = backbone.sample_noise(len(prompts), cfg.clip.spec, seeded(cfg.seed, 3))
    condition = backbone.encode_text(prompts).with_given(GivenFrames.hold_first(first, noise.shape[2]))
    sigmas, negative = sigma_grid(cfg.eval_steps, cfg.shift), backbone.encode_text([""])
    return rollout(backbone.velocity, noise, sigmas, condition, negative=negative, guidance_scale=cfg.guidance_scale).x0
