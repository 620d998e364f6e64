"""LAION aesthetic v2 and the predictor v2.5: how beautiful each frame is, by a small network on an image encoder."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rats_video.config.reward import AestheticScorer, AestheticV25Config
from rats_video.rewards.clip_reward import Pixels, clip_pixels, image_features, normalize, resize_bicubic
from rats_video.rewards.files import check_keys, load_checkpoint_tensors, load_transformers_model
from rats_video.rewards.frames import FrameReward
from rats_video.rewards.prompted import Condition

_WIDTHS = (1024, 128, 64, 16, 1)  # of the five layers


def siglip_pixels(frames: Tensor, size: int) -> Tensor:
    """What SigLIP's image processor makes of frames `[N, 3, height, width]` in [0, 1]: `[N, 3, size, size]`.

    Bicubic to a square, whatever the aspect ratio, then to [-1, 1].
    """
    return normalize(resize_bicubic(frames, (size, size)), (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


@dataclass(frozen=True)
class Predictor:
    """A published predictor.

    Args:
        model: transformers' class of the encoder's folder.
        model_type: of that folder's config.json.
        pixels: what the encoder takes.
        layers: names of the head's five layers in its checkpoint; the gaps are dropout, and there is no activation.
    """

    model: str
    model_type: str
    pixels: Pixels
    layers: tuple[str, ...]


V2 = Predictor("CLIPModel", "clip", clip_pixels, tuple(f"layers.{i}" for i in (0, 2, 4, 6, 7)))
"""github christophschuhmann/improved-aesthetic-predictor, simple_inference.py."""
V25 = Predictor("SiglipModel", "siglip", siglip_pixels, tuple(f"scoring_head.{i}" for i in (0, 2, 4, 6, 8)))
"""github discus0434/aesthetic-predictor-v2-5, siglip_v2_5.py."""


def predictor_of(cfg: AestheticScorer) -> Predictor:
    """The one a configuration names."""
    return V25 if isinstance(cfg, AestheticV25Config) else V2


class AestheticReward(FrameReward):
    """The head's score of an image encoder's unit features of each scored frame; prompts are not read.

    Args:
        model: a `CLIPModel` or `SiglipModel`, of which the image tower is kept.
        cfg: which frames are scored, and how many at a time.
    """

    def __init__(self, model: Any, cfg: AestheticScorer) -> None:
        super().__init__(cfg)
        self.model = model.requires_grad_(requires_grad=False).eval()
        self.model.text_model = None
        self.pixels = predictor_of(cfg).pixels
        width = getattr(
            model.config, "projection_dim", model.config.vision_config.hidden_size
        )  # SigLIP projects nothing
        layers = itertools.starmap(nn.Linear, itertools.pairwise((width, *_WIDTHS)))
        self.head = nn.Sequential(*layers).to(model.device).requires_grad_(requires_grad=False)

    def score_frames(self, frames: Tensor, condition: Condition) -> Tensor:  # noqa: ARG002
        """Scores `[N]` of frames `[N, 3, height, width]` in [0, 1]."""
        scores: Tensor = self.head(image_features(self.model, frames, self.pixels))
        return scores[:, 0]

    @classmethod
    def load(cls, folder: Path, head: Path, cfg: AestheticScorer, device: torch.device) -> AestheticReward:
        """Load a frozen reward; raises UserError if a folder does not hold what it should, whole and in safetensors."""
        import transformers

        predictor = predictor_of(cfg)
        kind = getattr(transformers, predictor.model)
        reward = cls(load_transformers_model(kind, folder, predictor.model_type, getattr(torch, cfg.dtype)), cfg)
        tensors, wanted = load_checkpoint_tensors(head), reward.head.state_dict()
        published = {name: predictor.layers[int(name[0])] + name[1:] for name in wanted}  # 1.bias is layers.2.bias
        check_keys(tensors, {published[name]: weight for name, weight in wanted.items()}, where=head)
        reward.head.load_state_dict({name: tensors[published[name]] for name in wanted})
        return reward.to(device)
