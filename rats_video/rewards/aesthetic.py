"""LAION aesthetic v2 and the predictor v2.5: how beautiful each frame is, by a small network on an image encoder."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from rats_video.rewards.base import RewardContext
from rats_video.rewards.clip_score import VIT_L, image_features
from rats_video.rewards.files import check_keys, load_checkpoint_tensors, load_transformers_model
from rats_video.rewards.frames import FrameReward, FrameRewardConfig
from rats_video.rewards.pixels import Pixels, clip_pixels, normalize, resize_bicubic
from rats_video.rewards.prompted import Condition

_WIDTHS = (1024, 128, 64, 16, 1)  # of the five layers
SO400M = {  # for a plan, where the folder is not there
    "text_config": {"bos_token_id": 0, "eos_token_id": 1},  # else transformers warns of its own defaults
    "vision_config": {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27,
                      "num_attention_heads": 16, "patch_size": 14, "image_size": 384},
}  # fmt: skip


def siglip_pixels(frames: Tensor, size: int) -> Tensor:
    """Pixels as SigLIP's image processor makes them of frames `[N, 3, height, width]` in [0, 1]: `[N, 3, size, size]`.

    Bicubic to a square, whatever the aspect ratio, then to [-1, 1].
    """
    return normalize(resize_bicubic(frames, (size, size)), (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


@dataclass(frozen=True)
class Predictor:
    """A published predictor.

    Args:
        model: transformers' class of the encoder's folder.
        model_type: of that folder's config.json.
        published: sizes of the encoder, where the folder is not there.
        pixels: brings frames to the encoder's size.
        layers: names of the head's five layers in its checkpoint; the gaps are dropout, and there is no activation.
    """

    model: str
    model_type: str
    published: dict[str, Any]
    pixels: Pixels
    layers: tuple[str, ...]


V2 = Predictor("CLIPModel", "clip", VIT_L, clip_pixels, tuple(f"layers.{i}" for i in (0, 2, 4, 6, 7)))
"""github christophschuhmann/improved-aesthetic-predictor, simple_inference.py."""
V25 = Predictor("SiglipModel", "siglip", SO400M, siglip_pixels, tuple(f"scoring_head.{i}" for i in (0, 2, 4, 6, 8)))
"""github discus0434/aesthetic-predictor-v2-5, siglip_v2_5.py."""


class BaseAestheticConfig(FrameRewardConfig):
    """How beautiful frames are, whatever the prompt."""

    folders = ("path", "head")
    predictor: ClassVar[Predictor]

    path: str = Field(description="folder of the image encoder, in safetensors")
    head: str = Field(description="folder of the network that scores its features, in safetensors")

    def build(self, context: RewardContext) -> AestheticReward:
        """Load it; raises UserError if a folder does not hold what it should, whole and in safetensors."""
        import transformers

        folder, head = self.folder(context.where, "path"), self.folder(context.where, "head")
        of = self.predictor
        kind = getattr(transformers, of.model)
        reward = AestheticReward(load_transformers_model(kind, folder, of.model_type, getattr(torch, self.dtype)), self)
        tensors, wanted = load_checkpoint_tensors(head), reward.head.state_dict()
        published = {name: of.layers[int(name[0])] + name[1:] for name in wanted}  # 1.bias is layers.2.bias
        check_keys(tensors, {published[name]: weight for name, weight in wanted.items()}, where=head)
        reward.head.load_state_dict({name: tensors[published[name]] for name in wanted})
        return reward.to(context.device)

    def on_meta(self, context: RewardContext) -> AestheticReward:  # noqa: ARG002
        """The same without weights."""
        of = self.predictor
        return AestheticReward(self.empty_model(of.model, self.hub_config(of.published)), self)


class AestheticConfig(BaseAestheticConfig):
    """How beautiful a frame is, LAION aesthetic v2: 1 to 10, about 4.5 to 6.5; prompts are not read."""

    source = "openai/clip-vit-large-patch14; sac+logos+ava1-l14-linearMSE.pth, converted"
    predictor = V2

    kind: Literal["aesthetic"]
    path: str = "models/clip-vit-large-patch14"
    head: str = "models/aesthetic-v2"


class AestheticV25Config(BaseAestheticConfig):
    """How beautiful a frame is, aesthetic predictor v2.5: 1 to 10, about 3 to 7; prompts are not read."""

    source = "google/siglip-so400m-patch14-384; aesthetic_predictor_v2_5.pth, converted"
    predictor = V25

    kind: Literal["aesthetic_v25"]
    path: str = "models/siglip-so400m-patch14-384"
    head: str = "models/aesthetic-v2-5"


class AestheticReward(FrameReward):
    """The head's score of an image encoder's unit features of each scored frame; prompts are not read.

    Args:
        model: a `CLIPModel` or `SiglipModel`, of which the image tower is kept.
        cfg: which frames are scored, and how many at a time.
    """

    def __init__(self, model: Any, cfg: BaseAestheticConfig) -> None:
        super().__init__(cfg)
        self.model = model.requires_grad_(requires_grad=False).eval()
        self.model.text_model = None
        self.pixels = cfg.predictor.pixels
        width = getattr(
            model.config, "projection_dim", model.config.vision_config.hidden_size
        )  # SigLIP projects nothing
        layers = itertools.starmap(nn.Linear, itertools.pairwise((width, *_WIDTHS)))
        self.head = nn.Sequential(*layers).to(model.device).requires_grad_(requires_grad=False)

    def score_frames(self, frames: Tensor, condition: Condition) -> Tensor:  # noqa: ARG002
        """Scores `[N]` of frames `[N, 3, height, width]` in [0, 1]."""
        scores: Tensor = self.head(image_features(self.model, frames, self.pixels))
        return scores[:, 0]
