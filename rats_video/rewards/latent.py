"""A reward that needs no VAE: it draws a coarse sketch of the clip from its latents, which the pixel reward scores.

DOLLAR's latent reward (arXiv 2412.15689) is a network that learns scores alone. It overfits the clips it saw, and a
student finds out where. A sketch is learned pixel by pixel, and the pixel reward itself scores it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Literal, Self

import torch
from einops import rearrange
from pydantic import Field, TypeAdapter, ValidationError
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from rats_video.errors import UserError, first_line
from rats_video.meta import META
from rats_video.reading import DAMAGED, load_tensors, read_sizes
from rats_video.rewards.base import BaseRewardConfig, RewardContext
from rats_video.rewards.sum import PixelRewardConfig
from rats_video.types import Reward, RewardScores


class LatentRewardConfig(BaseRewardConfig):
    """What another reward says of a sketch drawn from latents: the VAE decodes nothing for the loss.

    Comparison and evaluation score the decoded clips with that reward itself.
    """

    per = "frame"
    source = "rats-video train reward --latent"

    kind: Literal["latent"]
    path: str = Field(description="folder with config.json and model.safetensors")

    def build(self, context: RewardContext) -> Reward:
        """The pixel reward that it imitates (`LatentReward.load` is the one of latents)."""
        folder = self.folder(context.where, "path")
        return read_imitated(folder).build(context.at(str(folder / "config.json")))

    def on_meta(self, context: RewardContext) -> Reward:
        """The reward of latents, without weights."""
        folder = self.folder(context.where, "path")
        inside = context.at(str(folder / "config.json"))
        with META:
            reward = LatentReward.build(folder, lambda imitated: imitated.on_meta(inside))
        return reward.requires_grad_(requires_grad=False).eval()

    def sources(self, where: str) -> list[Path]:
        """Its folder, and the sources of the reward that it imitates."""
        folder = self.folder(where, "path")
        return [folder, *read_imitated(folder).sources(str(folder / "config.json"))]


BuildJudge = Callable[[PixelRewardConfig], Reward]
_IMITATED: TypeAdapter[PixelRewardConfig] = TypeAdapter(PixelRewardConfig)
_FINE = 8  # channels of the last, largest layers


@dataclass(frozen=True)
class LatentSpace:
    """The origin of latents: those of another model or clip size mean something else.

    Args:
        family: of the model, e.g. "Wan".
        vae: digest of the VAE's weights.
        channels: C of the latents.
        spatial_stride: pixels of a latent row or column.
        temporal_stride: pixel frames of a latent frame, except the first.
        num_frames: pixel frames of a clip.
        height: pixels.
        width: pixels.
    """

    family: str
    vae: str
    channels: int
    spatial_stride: int
    temporal_stride: int
    num_frames: int
    height: int
    width: int

    def differences(self, other: LatentSpace) -> list[str]:
        """The fields that differ, e.g. `height 64 (here 96)`."""
        names = [field.name for field in fields(self) if getattr(self, field.name) != getattr(other, field.name)]
        return [f"{name} {getattr(self, name)} (here {getattr(other, name)})" for name in names]


class LatentReward(nn.Module):
    """Scores clean latents against their prompts as the pixel reward that it imitates would score the decoded clip.

    Only the sketch is learned and saved. The pixel reward is frozen and comes from its own folder.

    Args:
        space: of the latents that it scores.
        imitated: the pixel reward.
        judge: that reward, loaded.
        width: feature channels of the sketch.
        blocks: of the sketch.
        coarse: pixels of the clip for one of the sketch, in height and in width.
    """

    def __init__(
        self, space: LatentSpace, imitated: PixelRewardConfig, judge: Reward, *, width: int, blocks: int, coarse: int
    ) -> None:
        super().__init__()
        self.space, self.imitated, self.judge = space, imitated, judge
        self.shape = {"width": width, "blocks": blocks, "coarse": coarse}
        self.sketch = SketchDecoder(space, width=width, blocks=blocks, coarse=coarse)

    def score_latents(self, latents: Tensor, prompts: Sequence[str]) -> RewardScores:
        """Score clean latents `[B, C, F, H, W]`."""
        return self.judge(self.enlarge(self.sketch(latents.to(self.sketch.stem.weight.dtype))), prompts)

    def enlarge(self, sketch: Tensor) -> Tensor:
        """The sketch at the size of the clip: `[B, T, 3, height, width]` in [0, 1].

        Pixels are clamped straight-through, as a decoded clip's are.
        """
        sketch = sketch + (sketch.clamp(0, 1) - sketch).detach()
        large = F.interpolate(sketch.flatten(0, 1), size=(self.space.height, self.space.width))
        drawn: Tensor = large.unflatten(0, sketch.shape[:2])
        return drawn

    def save(self, folder: Path) -> None:
        """Write `config.json` and `model.safetensors`."""
        folder.mkdir(parents=True, exist_ok=True)
        config = {"space": asdict(self.space), "imitates": self.imitated.model_dump(mode="json"), "network": self.shape}
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        save_file(self.sketch.state_dict(), folder / "model.safetensors")

    @classmethod
    def build(cls, folder: Path, build_judge: BuildJudge) -> Self:
        """The network of a folder's config.json, without the sketch's weights; raises UserError if it holds none."""
        space, imitated, network = _read(folder)
        return cls(space, imitated, build_judge(imitated), **network)

    @classmethod
    def load(cls, folder: Path, device: torch.device | str, build_judge: BuildJudge, here: LatentSpace) -> Self:
        """Load a frozen reward; raises UserError if there is none, or it was trained for other latents than `here`."""
        reward = cls.build(folder, build_judge)
        if differences := reward.space.differences(here):
            raise UserError(
                f"was trained for other latents: {', '.join(differences)}",
                where=str(folder), fix="train one for this model and clip size: rats-video train reward --latent",
            )  # fmt: skip
        try:
            reward.sketch.load_state_dict(load_tensors(folder / "model.safetensors"))
        except DAMAGED as error:
            raise UserError(f"not a latent reward: {_reason(error)}", where=str(folder)) from error
        return reward.requires_grad_(requires_grad=False).eval().to(device)


def read_imitated(folder: Path) -> PixelRewardConfig:
    """The pixel reward that a folder's latent reward imitates; raises UserError if it holds none."""
    return _read(folder)[1]


def _read(folder: Path) -> tuple[LatentSpace, PixelRewardConfig, dict[str, int]]:
    try:
        config = read_sizes(folder / "config.json")
        network = {name: int(config["network"][name]) for name in ("width", "blocks", "coarse")}
        return LatentSpace(**config["space"]), _IMITATED.validate_python(config["imitates"]), network
    except DAMAGED as error:
        raise UserError(f"not a latent reward: {_reason(error)}", where=str(folder)) from error


class SketchDecoder(nn.Module):
    """Latents `[B, C, F, H, W]` to small clips `[B, T, 3, height / coarse, width / coarse]`, about [0, 1].

    Nearly all of it is computed at the size of the latents, so it costs a fraction of the VAE's decoder.
    """

    def __init__(self, space: LatentSpace, *, width: int, blocks: int, coarse: int) -> None:
        super().__init__()
        self.stride, self.scale = space.temporal_stride, space.spatial_stride // coarse
        self.num_frames = space.num_frames
        self.latent_frames = 1 + (space.num_frames - 1) // self.stride
        self.stem = nn.Conv3d(space.channels, width, 3, padding=1)
        self.blocks = nn.Sequential(*(_Block(width) for _ in range(blocks)))
        self.enlarge = nn.Conv3d(width, _FINE * self.stride * self.scale**2, 1)
        self.refine = nn.Sequential(
            nn.SiLU(), nn.Conv2d(_FINE, _FINE, 3, padding=1), nn.SiLU(), nn.Conv2d(_FINE, 3, 3, padding=1)
        )

    def forward(self, latents: Tensor) -> Tensor:
        """Draw the sketches, as the VAE from the latent frames alone that pixels show."""
        hidden = self.enlarge(F.silu(self.blocks(self.stem(latents[:, :, -self.latent_frames :]))))
        sizes = {"t": self.stride, "y": self.scale, "x": self.scale}
        frames = rearrange(hidden, "b (c t y x) f h w -> b (f t) c (h y) (w x)", **sizes)
        frames = frames[:, -self.num_frames :]  # latent 0 is one pixel frame
        small: Tensor = self.refine(frames.flatten(0, 1)).unflatten(0, frames.shape[:2])
        return small + 0.5


class _Block(nn.Module):
    """Residual: space, then time. Without norms, so that a pixel depends on its neighbours alone, as in the VAE."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.space = nn.Conv3d(width, width, (1, 3, 3), padding=(0, 1, 1))
        self.time = nn.Conv3d(width, width, (3, 1, 1), padding=(1, 0, 0))
        nn.init.zeros_(self.time.weight)

    def forward(self, hidden: Tensor) -> Tensor:
        changed: Tensor = self.time(F.silu(self.space(F.silu(hidden))))
        return hidden + changed


def _reason(error: Exception) -> str:
    if isinstance(error, KeyError):
        return f"its config.json has no {error}"
    if isinstance(error, ValidationError):
        return "its config.json names no reward that it imitates"
    return first_line(error)
