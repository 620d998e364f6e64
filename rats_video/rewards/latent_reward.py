"""A reward that needs no pixels: a small network on clean latents, trained to score them as a pixel reward would.

As in DOLLAR (arXiv 2412.15689): neither the teacher's clips nor the student's are decoded for the reward, and no
gradient goes through the decoder.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Self

import torch
from einops import rearrange
from pydantic import TypeAdapter, ValidationError
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from rats_video.config.reward import RewardConfig
from rats_video.diffusion.causal import spread_to_pixel_frames
from rats_video.errors import UserError, first_line
from rats_video.reading import DAMAGED, load_tensors, read_sizes
from rats_video.types import RewardScores, TextCondition

EncodeText = Callable[[Sequence[str]], TextCondition]
_IMITATED: TypeAdapter[RewardConfig] = TypeAdapter(RewardConfig)
_HEADS = 4  # places of a latent frame that are looked at


@dataclass(frozen=True)
class LatentSpace:
    """Whose latents are scored: another model's, or another clip size's, mean something else.

    Args:
        family: of the model, e.g. "Wan".
        vae: digest of the VAE's weights.
        channels: C of the latents.
        spatial_stride: pixels a latent row or column.
        temporal_stride: pixel frames a latent frame, but for the first.
        text_width: D of the encoded prompts.
        num_frames: pixel frames of a clip.
        height: pixels.
        width: pixels.
    """

    family: str
    vae: str
    channels: int
    spatial_stride: int
    temporal_stride: int
    text_width: int
    num_frames: int
    height: int
    width: int

    def differences(self, other: LatentSpace) -> list[str]:
        """What is not the same there, e.g. `height 64 (here 96)`."""
        names = [field.name for field in fields(self) if getattr(self, field.name) != getattr(other, field.name)]
        return [f"{name} {getattr(self, name)} (here {getattr(other, name)})" for name in names]


class LatentReward(nn.Module):
    """Scores clean latents against their prompts, as the pixel reward that it imitates would score the decoded clip.

    Two towers: `score = <features of the latents, features of the text>`, for the clip, for each of the pixel reward's
    named parts, and, where that reward gives them, for each latent frame. Prompts are read through the model's own text
    encoder, so it takes any prompt, but is only as right as the prompts that it was trained on are like it.

    Args:
        space: whose latents it scores.
        imitated: the pixel reward.
        encode_text: the model's; called once a prompt.
        parts: names of the scores beside the clip's.
        has_frames: whether frames are scored.
        width: feature channels.
        halvings: how often rows and columns are halved on the way in; latents of 8 x 8 want none, of 60 x 104 two.
    """

    mean: Tensor
    spread: Tensor

    def __init__(
        self,
        space: LatentSpace,
        imitated: RewardConfig,
        encode_text: EncodeText,
        *,
        parts: Sequence[str],
        has_frames: bool,
        width: int,
        halvings: int,
    ) -> None:
        super().__init__()
        self.space, self.imitated, self.encode_text, self.parts = space, imitated, encode_text, tuple(parts)
        self.shape = {"parts": list(parts), "has_frames": has_frames, "width": width, "halvings": halvings}
        self._texts: dict[str, Tensor] = {}  # of every prompt met so far
        hidden = 2 * width
        self.stem = nn.Conv3d(space.channels + 2, width, 3, padding=1)
        self.halve = nn.ModuleList(nn.Conv3d(width, width, (1, 3, 3), (1, 2, 2), (0, 1, 1)) for _ in range(halvings))
        self.blocks = nn.ModuleList(_Block(width) for _ in range(3))
        self.attention = nn.Conv3d(width, _HEADS, 1)
        self.project = nn.Linear(_HEADS * (width + 2), hidden)
        self.temporal = nn.ModuleList(nn.Conv1d(hidden, hidden, 3, padding=1) for _ in range(2))
        self.text = _TextTower(space.text_width, width)
        self.clip_head = nn.Sequential(
            nn.Linear(2 * hidden, hidden), nn.SiLU(), nn.Linear(hidden, (1 + len(parts)) * (width + 1))
        )
        self.frame_head = nn.Linear(hidden, width + 1) if has_frames else None
        # The network's outputs are about standard normal; these are the scores' own levels: clip, parts, frames.
        self.register_buffer("mean", torch.zeros(2 + len(parts)))
        self.register_buffer("spread", torch.ones(2 + len(parts)))

    def forward(self, latents: Tensor, text: Tensor) -> tuple[Tensor, Tensor | None]:
        """Standardised scores of latents `[B, C, F, H, W]` against N prompts each.

        Args:
            latents: clean.
            text: `[B, N, width]`, what `self.text` makes of encoded prompts.

        Returns:
            Of the clip and its parts `[B, N, 1 + parts]`, and of latent frames `[B, N, F]`, or None.
        """
        hidden = self.stem(torch.cat([latents, _coordinates(latents)], dim=1))
        for halve in self.halve:
            hidden = halve(F.silu(hidden))
        for block in self.blocks:
            hidden = block(hidden)
        weights = self.attention(hidden).flatten(3).softmax(dim=-1)  # [B, heads, F, HW]
        places = torch.cat([hidden, _coordinates(hidden)], dim=1).flatten(3)
        looked = torch.einsum("bnfp,bcfp->bfnc", weights, places).flatten(2)
        features = rearrange(self.project(looked), "b f d -> b d f")
        for layer in self.temporal:
            features = features + layer(F.silu(features))
        features = rearrange(F.silu(features), "b d f -> b f d")
        clip = self.clip_head(torch.cat([features.mean(dim=1), features.amax(dim=1)], dim=-1))
        clip = clip.unflatten(1, (1 + len(self.parts), -1))
        frames = None if self.frame_head is None else _match(self.frame_head(features), text)
        return _match(clip, text), frames

    def score_latents(self, latents: Tensor, prompts: Sequence[str]) -> RewardScores:
        """Score clean latents `[B, C, F, H, W]`; a latent frame's score is that of each of its pixel frames."""
        clip, frames = self(latents.float(), self._read(prompts)[:, None])
        clip = self.mean[:-1] + self.spread[:-1] * clip[:, 0]
        if frames is not None:
            frames = spread_to_pixel_frames(self.mean[-1] + self.spread[-1] * frames[:, 0], self.space.temporal_stride)
        by_name = dict(zip(self.parts, clip[:, 1:].unbind(dim=1), strict=True))
        return RewardScores(clip[:, 0], frames, by_name)

    @torch.no_grad()
    def _read(self, prompts: Sequence[str]) -> Tensor:
        if new := [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._texts]:
            self._texts |= zip(new, self.text(self.encode_text(new)), strict=True)
        return torch.stack([self._texts[prompt] for prompt in prompts])

    def save(self, folder: Path) -> None:
        """Write `config.json` and `model.safetensors`."""
        folder.mkdir(parents=True, exist_ok=True)
        config = {"space": asdict(self.space), "imitates": self.imitated.model_dump(mode="json"), "network": self.shape}
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        save_file(self.state_dict(), folder / "model.safetensors")

    @classmethod
    def build(cls, folder: Path, encode_text: EncodeText) -> Self:
        """The network of a folder's config.json, without its weights; raises UserError if there is none."""
        try:
            config = read_sizes(folder / "config.json")
            space, imitated = LatentSpace(**config["space"]), _IMITATED.validate_python(config["imitates"])
            return cls(space, imitated, encode_text, **config["network"])
        except DAMAGED as error:
            raise UserError(f"not a latent reward: {_reason(error)}", where=str(folder)) from error

    @classmethod
    def load(cls, folder: Path, device: torch.device | str, encode_text: EncodeText, here: LatentSpace) -> Self:
        """Load a frozen reward; raises UserError if there is none, or it was trained for other latents than `here`."""
        reward = cls.build(folder, encode_text)
        if differences := reward.space.differences(here):
            raise UserError(
                f"was trained for other latents: {', '.join(differences)}",
                where=str(folder), fix="train one for this model and clip size: rats-video train reward --latent",
            )  # fmt: skip
        try:
            reward.load_state_dict(load_tensors(folder / "model.safetensors"))
        except DAMAGED as error:
            raise UserError(f"not a latent reward: {_reason(error)}", where=str(folder)) from error
        return reward.requires_grad_(requires_grad=False).eval().to(device)


def read_imitated(folder: Path) -> RewardConfig:
    """The pixel reward that a folder's latent reward imitates; raises UserError if it holds none."""
    return LatentReward.build(folder, _no_text).imitated


def _no_text(prompts: Sequence[str]) -> TextCondition:
    raise AssertionError(f"nobody reads {len(prompts)} prompts here")


class _Block(nn.Module):
    """Residual: space, then time."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(4, width)
        self.space = nn.Conv3d(width, width, (1, 3, 3), padding=(0, 1, 1))
        self.time = nn.Conv3d(width, width, (3, 1, 1), padding=(1, 0, 0))

    def forward(self, hidden: Tensor) -> Tensor:
        changed: Tensor = self.time(F.silu(self.space(F.silu(self.norm(hidden)))))
        return hidden + changed


class _TextTower(nn.Module):
    """Encoded prompts to `[B, width]`: attention pooling over their tokens."""

    def __init__(self, text_width: int, width: int) -> None:
        super().__init__()
        self.read = nn.Sequential(nn.LayerNorm(text_width), nn.Linear(text_width, width), nn.SiLU())
        self.attention = nn.Linear(width, 1)
        self.project = nn.Linear(width, width)

    def forward(self, text: TextCondition) -> Tensor:
        # Where a model attends to padding too there is no mask, but its pipeline pads with zero rows.
        mask = text.embeds.ne(0).any(dim=-1) if text.mask is None else text.mask.bool()
        tokens = self.read(text.embeds.float())
        weights = self.attention(tokens)[..., 0].masked_fill(~mask, -torch.inf).softmax(dim=-1)
        pooled: Tensor = self.project(torch.einsum("bl,bld->bd", weights, tokens))
        return pooled


def _match(features: Tensor, text: Tensor) -> Tensor:
    """Products of features `[B, S, width + 1]` and text `[B, N, width]`, the last feature added: `[B, N, S]`."""
    products: Tensor = torch.einsum("bsd,bnd->bns", features[..., :-1], text) / text.shape[-1] ** 0.5
    return products + features[:, None, :, -1]


def _coordinates(volume: Tensor) -> Tensor:
    """Rows and columns in [-1, 1] of `[B, C, F, H, W]`: `[B, 2, F, H, W]`."""
    batch, _, frames, height, width = volume.shape
    y, x = (torch.linspace(-1, 1, size, device=volume.device, dtype=volume.dtype) for size in (height, width))
    grid: Tensor = torch.stack(torch.meshgrid(y, x, indexing="ij"))
    return grid[None, :, None].expand(batch, -1, frames, -1, -1)


def _reason(error: Exception) -> str:
    if isinstance(error, KeyError):
        return f"its config.json has no {error}"
    if isinstance(error, ValidationError):
        return "its config.json names no reward that it imitates"
    return first_line(error)
