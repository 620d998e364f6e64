"""A Wan model that follows motion paths: it reads the caption of a prompt, and a few tokens of its path."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from rats_video.backbones.folder import read_index
from rats_video.backbones.wan import TEXT_LENGTH, WanBackbone
from rats_video.condition import Condition
from rats_video.files import write_json
from rats_video.hub import INDEX
from rats_video.motion_path import MARK, is_point, resample, split_path
from rats_video.reading import load_tensors, read_json, read_sizes

PATH_ENCODER = "text_encoder_path"  # beside the text encoder; freed, cached and skipped with it
_CONFIG, _WEIGHTS = "config.json", "model.safetensors"


class PathEncoder(nn.Module):
    """Paths as tokens of the text: each point by sines and cosines of where it is, and by its place in the path.

    Args:
        text_dim: width of a text token.
        num_points: points that a path is resampled to, a token each.
        num_octaves: frequencies of a coordinate; the first has the picture's size as half its period.
        hidden: width between the two layers.
    """

    def __init__(self, text_dim: int, num_points: int = 5, num_octaves: int = 4, hidden: int = 128) -> None:
        super().__init__()
        self.config = {"text_dim": text_dim, "num_points": num_points, "num_octaves": num_octaves, "hidden": hidden}
        self.num_points, self.num_octaves = num_points, num_octaves
        self.place = nn.Parameter(torch.randn(num_points, hidden))
        self.embed = nn.Linear(4 * num_octaves, hidden)
        self.project = nn.Linear(hidden, text_dim)

    def forward(self, paths: Tensor) -> Tensor:
        """Tokens `[B, num_points, text_dim]` of paths `[B, num_points, 2]`, x and y from 0 to 1."""
        octaves = math.pi * 2.0 ** torch.arange(self.num_octaves, device=paths.device)
        angles = (paths[..., None] * octaves).flatten(2)
        waves = torch.cat([angles.sin(), angles.cos()], dim=-1).to(self.place.dtype)
        tokens: Tensor = self.project(nn.functional.silu(self.embed(waves) + self.place))
        return tokens

    def save_pretrained(self, folder: Path) -> None:
        """Write `config.json` and `model.safetensors`."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / _CONFIG).write_text(json.dumps(self.config, indent=2) + "\n")
        save_file(self.state_dict(), folder / _WEIGHTS)

    @classmethod
    def from_pretrained(cls, folder: Path, *, torch_dtype: torch.dtype, **_: Any) -> tuple[Self, dict[str, list[str]]]:
        """The encoder that `save_pretrained` wrote; says that no weight is missing, as diffusers' models do."""
        encoder = cls(**read_sizes(folder / _CONFIG))
        encoder.load_state_dict(load_tensors(folder / _WEIGHTS))
        return encoder.to(torch_dtype), {"missing_keys": []}


def save_path_encoder(encoder: PathEncoder, folder: Path) -> None:
    """Add it to a pipeline folder, which stock diffusers still loads as one that knows nothing of paths."""
    encoder.save_pretrained(folder / PATH_ENCODER)
    index = read_json(folder / INDEX)
    write_json(folder / INDEX, {**index, PATH_ENCODER: ["rats_video", type(encoder).__name__]})


class PathWanBackbone(WanBackbone):
    """Wan with one more part, a `PathEncoder`; a prompt without a path is encoded as by Wan alone, bit for bit.

    The path's tokens are more rows of the text that cross-attention sees, so nothing else changes: not the denoiser,
    not its calls. Guidance's empty prompt has neither caption nor path, so it strengthens both.
    """

    @classmethod
    def knows(cls, index: Mapping[str, Any]) -> bool:
        """A Wan folder with a path encoder: stock diffusers loads it as well, and leaves the paths out."""
        return super().knows(index) and bool(index.get(PATH_ENCODER))

    @classmethod
    def component_classes(cls) -> dict[str, Any]:
        """The class of each part."""
        return {**super().component_classes(), PATH_ENCODER: PathEncoder}

    @classmethod
    def from_base(cls, folder: Path, device: torch.device, seed: int) -> Self:
        """A Wan pipeline's folder, and a path encoder: its own where it has one, else a random one of that seed."""
        if read_index(folder).get(PATH_ENCODER):
            return cls.from_pretrained(folder, device)
        base = WanBackbone.from_pretrained(folder, device)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            encoder = PathEncoder(base.parts["transformer"].config.text_dim)
        return cls(**base.parts, **{PATH_ENCODER: encoder.to(device)})

    def unknown_words(self, prompt: str) -> list[str]:
        """As any model's, of the caption; and what follows the path.

        Raises:
            UserError: what follows the caption are points, but no path.
        """
        caption, _, path = prompt.partition(MARK)
        strangers = [word for word in path.split() if not is_point(word)]
        return super().unknown_words(caption if strangers else split_path(prompt)[0]) + strangers

    def truncation_note(self, prompt: str) -> str:
        """As any model's, of the caption.

        Raises:
            UserError: what follows it is no path.
        """
        return super().truncation_note(split_path(prompt)[0])

    def stock_prompt(self, prompt: str) -> str:
        """The caption: stock pipelines know nothing of motion paths."""
        return split_path(prompt)[0]

    def _encode(self, prompts: Sequence[str]) -> Condition:
        """As Wan's captions; where there are paths, their rows come before the zero row, zero without a path."""
        captions, paths = zip(*map(split_path, prompts), strict=True)
        text = super()._encode(captions)
        if not any(paths):
            return text
        num = self.parts[PATH_ENCODER].num_points
        points = torch.stack([resample(path or [(0, 0)] * num, num) for path in paths])
        has_path = torch.tensor([path is not None for path in paths])
        return self.add_paths(text, points.to(self.device), has_path.to(self.device))

    def add_paths(self, condition: Condition, points: Tensor, has_path: Tensor) -> Condition:
        """Captions that were encoded without a path, with one: differentiable with respect to the encoder's weights.

        Args:
            condition: prompts `[B, L, D]`, the last row zero.
            points: `[B, num_points, 2]`.
            has_path: `[B]` bool; the rows of the others stay zero, which is as if they were not there.

        Returns:
            `[B, L + num_points, D]`, at most Wan's 512 rows.
        """
        tokens = self.parts[PATH_ENCODER](points) * has_path[:, None, None]
        rows = condition.embeds[:, :-1][:, : TEXT_LENGTH - tokens.shape[1] - 1]
        return Condition(torch.cat([rows, tokens.to(rows.dtype), torch.zeros_like(rows[:, :1])], dim=1))
