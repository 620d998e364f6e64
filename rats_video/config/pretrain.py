"""Configuration of `rats-video train vae | teacher | paths | reward`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from rats_video.config.distill import Prompts, ShapesPrompts
from rats_video.config.reward import RewardConfig
from rats_video.config.schema import (
    ClipConfig,
    Config,
    NonNegativeFloat,
    NonNegativeInt,
    NumClips,
    OptimizerConfig,
    PositiveFloat,
    PositiveInt,
    Seed,
    SolverSteps,
)


class VaeModelConfig(Config):
    """Shape of the AutoencoderKLWan."""

    base_dim: PositiveInt = 16
    dim_mult: tuple[PositiveInt, ...] = (1, 2, 2)
    latent_channels: PositiveInt = 32
    patch_size: PositiveInt = Field(4, description="pixels folded into channels before the first convolution")
    num_res_blocks: PositiveInt = 1


class VaeStageConfig(Config):
    """One stage of the curriculum: short clips first, whole clips last (or later latent frames are never seen)."""

    num_frames: PositiveInt
    batch_size: NumClips
    steps: PositiveInt
    lr: PositiveFloat
    trains: Literal["all", "decoder"] = "all"
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
    stages: tuple[VaeStageConfig, ...] = Field(min_length=1)
    object_weight: NonNegativeFloat = Field(15.0, description="extra loss weight of pixels unlike their frame's corner")
    prune_channels: PositiveInt | None = Field(
        None, description="keep only this many principal components of the latent channels, at the end"
    )
    stats_clips: NumClips = Field(512, description="clips from which latents_mean and latents_std are measured")
    eval_clips: NumClips = 64


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


class TeacherTrainConfig(Config):
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


class PathTrainConfig(Config):
    """Root of `train paths`: flow matching on rendered shapes that move along given paths."""

    seed: Seed = 0
    clip: ClipConfig = ClipConfig()
    model: str = Field("tiny-wan", description="pipeline folder or embedded name that learns to follow paths")
    num_clips: NumClips = Field(4096, description="clips rendered and encoded once")
    batch_size: NumClips = 32
    steps: PositiveInt = 3000
    checkpoint_every: PositiveInt = Field(300, description="steps")
    optimizer: OptimizerConfig
    shift: PositiveFloat = Field(3.0, description="sigma grid shift, in training and in the saved scheduler")
    prompt_dropout: float = Field(0.1, ge=0, lt=1, description="share of clips trained on the empty prompt, no path")
    path_dropout: float = Field(0.1, ge=0, lt=1, description="share of the others trained on their caption alone")
    ema_decay: float = Field(0.999, ge=0, lt=1)
    eval_clips: NumClips = 64
    eval_steps: SolverSteps = 50
    guidance_scale: PositiveFloat = 2.0


class RewardTrainConfig(Config):
    """Root of `train reward`."""

    seed: Seed = 0
    clip: ClipConfig = ClipConfig()
    encoder: Literal["frames", "volume"] = "frames"
    width: PositiveInt = 128
    model: str = Field("tiny-wan", description="pipeline whose samples and round trips the reward also learns from")
    sample_steps: tuple[SolverSteps, ...] = Field((2, 3, 4, 6, 10, 20), description="step counts of those samples")
    guidance_scales: tuple[PositiveFloat, ...] = (1.0, 3.0)
    shift: PositiveFloat = 3.0
    num_samples: NumClips = Field(3000, description="clips sampled from the model, labelled by measurement")
    num_round_trips: NumClips = Field(1000, description="rendered clips sent through the VAE and back")
    batch_size: NumClips = 24
    steps: PositiveInt = 3000
    word_steps: NonNegativeInt = Field(
        300, description="first steps, on rendered clips and words alone; samples too early only confuse"
    )
    preference_weight: NonNegativeFloat = Field(0.3, description="of the preferences beside the words")
    optimizer: OptimizerConfig
    label_smoothing: float = Field(0.05, ge=0, lt=0.5, description="keeps log-odds, and so the score, bounded")
    eval_clips: NumClips = 256


class LatentRewardTrainConfig(Config):
    """Root of `train reward --latent`: a pixel reward that needs no VAE, as it judges a sketch drawn from latents.

    The sketch learns from samples of the model, from damaged ones, from rendered clips where the prompts are shapes,
    and from samples that it was itself made to like better than it should: a student will go there too.
    """

    seed: Seed = 0
    clip: ClipConfig = ClipConfig()
    model: str = Field("tiny-wan", description="pipeline whose latents are scored")
    dtype: Literal["float32", "bfloat16"] = Field("float32", description="of that model's weights")
    prompts: Prompts = ShapesPrompts()
    reward: RewardConfig = Field(description="the pixel reward that is imitated")
    student: str | None = Field(
        None, description="folder of a trained student; what it makes is never learned from, only judged at the end"
    )
    init: str | None = Field(None, description="folder of a latent reward to go on from; null starts at random")
    width: PositiveInt = Field(64, description="feature channels of the sketch")
    blocks: PositiveInt = Field(4, description="residual blocks of the sketch")
    coarse: PositiveInt = Field(2, description="pixels of the clip that are one of the sketch, each way")
    shift: PositiveFloat = 3.0
    sample_steps: tuple[SolverSteps, ...] = Field((2, 3, 4, 6, 10, 20), description="step counts of the samples")
    guidance_scales: tuple[PositiveFloat, ...] = (1.0, 3.0)
    num_samples: NumClips = Field(3000, description="clips sampled from the model")
    num_damaged: NonNegativeInt = Field(2000, description="samples with noise, other gains, or parts of another one")
    num_rendered: NonNegativeInt = Field(0, description="rendered shapes, half of them damaged, through the VAE")
    rounds: NonNegativeInt = Field(4, description="how often, on the way, samples are climbed on what was learned")
    num_climbed: NonNegativeInt = Field(400, description="clips of each round")
    climb: PositiveFloat = Field(0.6, description="how far they go at most, root mean square in latents")
    other_prompts: NonNegativeInt = Field(2, description="prompts beside its own that a clip is scored against")
    sample_batch: NumClips = Field(40, description="clips sampled, decoded and scored at a time")
    batch_size: NumClips = 32
    steps: PositiveInt = 3000
    sketch_steps: NonNegativeInt = Field(
        1500, description="first steps, on pixels alone; what the reward says of a bad sketch only confuses"
    )
    score_weight: NonNegativeFloat = Field(0.02, description="of the scores, beside the pixels")
    contrast_weight: NonNegativeFloat = Field(
        10.0, description="extra weight of pixels that stand off their frame's mean"
    )
    optimizer: OptimizerConfig
    eval_clips: NumClips = 256
