"""Settings of memory, speed, precision and processes. None of them changes the method."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from rats_video.config.fields import Config, NonNegativeInt, PositiveInt

Quantization = Literal["none", "int8", "nf4"]
AttentionBackend = Literal["native", "xformers", "flash", "_flash_3", "sage", "flex", "_native_math"]


class FullWeightsConfig(Config):
    """Student and EMA teacher each have a denoiser of their own."""

    kind: Literal["full"] = "full"


class LoraConfig(Config):
    """Student and EMA teacher are LoRA adapters on one frozen denoiser."""

    kind: Literal["lora"]
    rank: PositiveInt = Field(64, description="of the two factors: more can learn more, and weighs more")
    alpha: PositiveInt = Field(64, description="the adapter is scaled by alpha / rank")
    targets: tuple[str, ...] | None = Field(
        None, min_length=1, description="names of linear layers; null takes the family's own list"
    )
    dtype: Literal["float32", "bfloat16"] = Field("float32", description="of the adapter; AdamW wants float32")


WeightsConfig = Annotated[FullWeightsConfig | LoraConfig, Field(discriminator="kind")]


class DecodeConfig(Config):
    """The reward's way back through the VAE; each lever saves memory."""

    checkpoint: bool = Field(
        default=False, description="recompute the decode in backward, latent frame by latent frame (exact)"
    )
    offload: bool = Field(
        default=False, description="with checkpoint: keep the caches between latent frames in host memory"
    )
    window: PositiveInt | None = Field(
        None, description="latent frames with gradient, at a place drawn anew each step; null = all"
    )
    small: str | None = Field(
        None,
        description="folder of a TAEHV decoder (.safetensors): stands in for the VAE where training scores clips",
    )

    dtype: Literal["float32", "bfloat16"] = Field(
        "float32", description="of the VAE, or the small decoder, while training; sampling and evaluation use float32"
    )

    @model_validator(mode="after")
    def _offload_needs_checkpoint(self) -> Self:
        if self.offload and not self.checkpoint:
            raise ValueError("offload keeps what checkpoint saves: turn checkpoint on as well")
        return self


class DenoiserConfig(Config):
    """Precision, memory and speed of the denoiser."""

    dtype: Literal["float32", "bfloat16"] = Field("float32", description="of the frozen base and the text encoder")
    quantization: Quantization = Field(
        "none", description="bits of the frozen base's matrices, on which adapters train: int8 (torchao) or nf4"
    )
    attention: AttentionBackend = Field("native", description="diffusers' name of the attention kernel")
    activation_checkpointing: bool = Field(default=False, description="recompute the denoiser's blocks in backward")
    activation_offload: bool = Field(
        default=False, description="with activation_checkpointing: keep what blocks start from in host memory"
    )
    compile: bool = Field(default=False, description="torch.compile of the denoiser's repeated blocks")
    offload: Literal["none", "block", "leaf"] = Field(
        "none", description="keep the frozen base in host memory and bring in one group of layers at a time"
    )

    @model_validator(mode="after")
    def _activation_offload_needs_checkpointing(self) -> Self:
        if self.activation_offload and not self.activation_checkpointing:
            raise ValueError("activation_offload keeps what activation_checkpointing saves: turn that on as well")
        return self


class ComputeConfig(DenoiserConfig):
    """Precision, memory and speed."""

    cache_text: bool = Field(default=False, description="encode all prompts first, then free the text encoder")
    decode: DecodeConfig = DecodeConfig()


class ParallelConfig(Config):
    """How several processes share the work; started by --gpus and --nodes, or by torchrun."""

    shard: bool = Field(default=False, description="FSDP2: split the denoiser's weights over the processes")
    context: PositiveInt = Field(1, description="processes that share each clip (Ulysses attention, Wan and LTX)")
    reward_ranks: NonNegativeInt = Field(0, description="processes that only hold reward models")
