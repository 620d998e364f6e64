"""The dimension legend and the value objects that travel between modules.

Dimensions: B clips in a batch, C latent channels, F latent frames, T pixel frames, L text tokens, D text width,
K horizons, N solver steps. Latents are `[B, C, F, H, W]`; pixels `[B, T, 3, height, width]` in [0, 1].
`sigma` is the noise level in [0, 1], 1 = pure noise; `velocity = noise - x0 = d latents / d sigma`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, Self

from torch import Generator, Tensor, device, nn


@dataclass(frozen=True)
class ClipSpec:
    """Size of a clip in pixels: `num_frames` frames of `height` x `width`, shown at `fps` frames a second."""

    num_frames: int
    height: int
    width: int
    fps: float


@dataclass(frozen=True)
class TextCondition:
    """Encoded prompts. `embeds` is `[B, L, D]`; how L is padded is the backbone's own convention."""

    embeds: Tensor

    def __len__(self) -> int:
        return self.embeds.shape[0]


@dataclass(frozen=True)
class Trajectory:
    """What is kept of a rollout.

    Args:
        sigmas: the K noise levels kept, falling; the last is 0 when the clip itself is kept.
        latents: K tensors `[B, C, F, H, W]`, one a kept sigma.
        nfe: network evaluations a clip that the rollout cost.
    """

    sigmas: tuple[float, ...]
    latents: tuple[Tensor, ...]
    nfe: int

    @property
    def x0(self) -> Tensor:
        """The final latents `[B, C, F, H, W]` (sigma 0)."""
        return self.latents[-1]


@dataclass(frozen=True)
class RewardScores:
    """Higher is better. `clip` is `[B]`, `frames` is `[B, T]` or None, `parts` are named `[B]` scores for the log."""

    clip: Tensor
    frames: Tensor | None = None
    parts: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class PromptBatch:
    """What teacher and student both start from.

    Args:
        index: which batch of the run this is.
        prompts: B prompts.
        noise: `[B, C, F, H, W]`.
        num_steps: the student's solver steps on this batch.
    """

    index: int
    prompts: tuple[str, ...]
    noise: Tensor
    num_steps: int


VelocityFn = Callable[[Tensor, Tensor, TextCondition], Tensor]
"""`(latents [B, C, F, H, W], sigma [B], text) -> velocity [B, C, F, H, W]`: one call is one network evaluation."""


class Reward(Protocol):
    """Scores clips. Differentiable rewards carry gradient from the scores to every frame they look at."""

    def __call__(self, videos: Tensor, prompts: Sequence[str]) -> RewardScores:
        """Score `videos` `[B, T, 3, height, width]` in [0, 1] against their prompts."""
        ...


class Backbone(Protocol):
    """One family of video models: text in, latents through a denoiser, pixels out."""

    temporal_stride: int

    @property
    def denoiser(self) -> nn.Module:
        """The network whose calls are counted as NFE; its parameters are what is trained."""
        ...

    @property
    def device(self) -> device:
        """Where the denoiser lives."""
        ...

    def twin(self) -> Self:
        """The same model with its own copy of the denoiser."""
        ...

    def encode_text(self, prompts: Sequence[str]) -> TextCondition:
        """Encode B prompts."""
        ...

    def unknown_words(self, prompt: str) -> list[str]:
        """Words of the prompt that the text encoder was never taught."""
        ...

    def latent_shape(self, clip: ClipSpec) -> tuple[int, int, int, int]:
        """`(C, F, H, W)` of a clip's latents; raises UserError if the model cannot divide the clip."""
        ...

    def sample_noise(self, batch: int, clip: ClipSpec, generator: Generator) -> Tensor:
        """Standard normal `[B, C, F, H, W]`, drawn on the generator's device and moved to the model's."""
        ...

    def velocity(self, latents: Tensor, sigma: Tensor, text: TextCondition) -> Tensor:
        """Predicted `noise - x0`, `[B, C, F, H, W]`, at noise levels `sigma` `[B]`."""
        ...

    def decode(self, latents: Tensor) -> Tensor:
        """Pixels `[B, T, 3, height, width]` in [0, 1], differentiable."""
        ...
