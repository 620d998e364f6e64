"""Train the embedded default's teacher: flow matching on cached latents of rendered shapes."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from rats_video.backbones.wan import WanBackbone
from rats_video.condition import Condition
from rats_video.config.fields import ClipConfig, Config, NumClips, PositiveFloat, PositiveInt, Seed, SolverSteps
from rats_video.datasets.shapes.measure import measure_shapes
from rats_video.datasets.shapes.render import VOCABULARY, ShapeAttributes, split_combinations
from rats_video.diffusion.flow import add_noise
from rats_video.diffusion.schedule import shift_sigma
from rats_video.optim import OptimizerConfig, TrainStepsConfig
from rats_video.pretraining.flow import fit, sampled_twice
from rats_video.pretraining.vae_clips import draw_shapes
from rats_video.progress import ProgressBar
from rats_video.seeds import seeded


class TransformerConfig(Config):
    """Shape of the WanTransformer3DModel."""

    num_heads: PositiveInt = 4
    head_dim: PositiveInt = 32
    ffn_dim: PositiveInt = 512
    num_layers: PositiveInt = 6
    patch_size: tuple[PositiveInt, PositiveInt, PositiveInt] = (1, 1, 1)


class TextEncoderConfig(Config):
    """Shape of the UMT5 encoder. It stays random: thirty words need contextual features, not a learned language."""

    d_model: PositiveInt = 64
    num_layers: PositiveInt = 2
    num_heads: PositiveInt = 4


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
    batch_size: NumClips = 64
    steps: PositiveInt = 4000
    checkpoint_every: PositiveInt = Field(300, description="steps")
    optimizer: OptimizerConfig
    shift: PositiveFloat = Field(3.0, description="sigma grid shift, in training and in the saved scheduler")
    prompt_dropout: float = Field(0.1, ge=0, lt=1, description="share of clips trained on the empty prompt")
    ema_decay: float = Field(0.999, ge=0, lt=1)
    eval_clips: NumClips = 64
    eval_steps: SolverSteps = 50
    guidance_scale: PositiveFloat = 3.0


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

    return WanTransformer3DModel(
        patch_size=cfg.patch_size, num_attention_heads=cfg.num_heads, attention_head_dim=cfg.head_dim,
        in_channels=latent_channels, out_channels=latent_channels, text_dim=text_dim, freq_dim=256,
        ffn_dim=cfg.ffn_dim, num_layers=cfg.num_layers, cross_attn_norm=True,
        qk_norm="rms_norm_across_heads", rope_max_seq_len=32,
    )  # fmt: skip


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
    cache = encode_clips(backbone, cfg, train)
    average = copy.deepcopy(backbone.denoiser).eval()
    fit(
        "train teacher", cfg, folder / "checkpoints", backbone.weights, dict(average.named_parameters()),
        lambda step: flow_matching_loss(backbone, cache, cfg, step),
    )  # fmt: skip
    backbone = WanBackbone(transformer=average, vae=vae, text_encoder=text_encoder, tokenizer=tokenizer)
    return backbone, evaluate_teacher(backbone, cfg, heldout)


def encode_clips(backbone: WanBackbone, cfg: TeacherTrainConfig, combinations: list[ShapeAttributes]) -> LatentCache:
    """Render and encode `num_clips` clips of the combinations."""
    rows: list[Tensor] = []
    index: list[int] = []
    where = {attributes: i for i, attributes in enumerate(combinations)}
    with ProgressBar("encode clips", cfg.num_clips) as progress:
        for start in range(0, cfg.num_clips, 64):
            batch = min(64, cfg.num_clips - start)
            videos, attributes = draw_shapes(
                combinations, batch, cfg.clip.spec, (cfg.seed, 1, start), backbone.device, cfg.path_spread
            )
            rows.append(backbone.encode(videos))
            index += [where[a] for a in attributes]
            progress.advance(batch)
    text = backbone.encode_text([*(a.prompt for a in combinations), ""])
    return LatentCache(torch.cat(rows), torch.tensor(index, device=backbone.device), text)


def flow_matching_loss(backbone: WanBackbone, cache: LatentCache, cfg: TeacherTrainConfig, step: int) -> Tensor:
    """Mean square error of the velocity at random noise levels (Lipman et al., 2023; Liu et al., 2023)."""
    generator, device = seeded(cfg.seed, 2, step), backbone.device
    chosen = torch.randint(len(cache.latents), (cfg.batch_size,), generator=generator).to(device)
    sigma = shift_sigma(torch.rand(cfg.batch_size, generator=generator), cfg.shift).to(device)
    dropped = (torch.rand(cfg.batch_size, generator=generator) < cfg.prompt_dropout).to(device)
    x0 = cache.latents[chosen]
    noise = torch.randn(x0.shape, generator=generator).to(device)
    prompts = torch.where(dropped, len(cache.text) - 1, cache.prompt_index[chosen])
    velocity = backbone.velocity(add_noise(x0, noise, sigma), sigma, Condition(cache.text.embeds[prompts]))
    return F.mse_loss(velocity, noise - x0)


@torch.no_grad()
def evaluate_teacher(
    backbone: WanBackbone, cfg: TeacherTrainConfig, combinations: list[ShapeAttributes]
) -> dict[str, float]:
    """Measured adherence on held-out combinations: with guidance at `eval_steps`, without it at 4 steps."""
    prompts = [combinations[i % len(combinations)].prompt for i in range(cfg.eval_clips)]
    metrics: dict[str, float] = {}
    for num_steps, videos in sampled_twice(backbone, cfg, prompts):
        measures = measure_shapes(videos, prompts)
        metrics[f"adherence_{num_steps}_steps"] = float(measures.adherence.mean())
        for name, values in measures.attributes.items():
            metrics[f"{name}_{num_steps}_steps"] = float(values.float().mean())
    return metrics
