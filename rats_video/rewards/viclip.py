"""ViCLIP: how well a whole clip fits its prompt (InternVid, arXiv 2307.06942; github OpenGVLab/InternVideo)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import torch
from einops import rearrange
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from rats_video.config.fields import PositiveInt
from rats_video.meta import META, LongPrompts
from rats_video.rewards.base import BaseRewardConfig, RewardContext
from rats_video.rewards.clip_score import load_clip_tokenizer
from rats_video.rewards.clip_text import ClipText
from rats_video.rewards.files import check_keys, load_checkpoint_tensors
from rats_video.rewards.pixels import (
    CLIP_MEAN,
    CLIP_STD,
    IMAGENET_MEAN,
    IMAGENET_STD,
    Pixels,
    centre_square,
    normalize,
    resize_bicubic,
    rounded,
)
from rats_video.rewards.prompted import Condition, PromptedReward, score_in_chunks
from rats_video.rewards.sizes import HEAD_WIDTH, TensorSizes
from rats_video.types import RewardScores


class ViClipConfig(BaseRewardConfig):
    """Fit of the whole clip to the prompt (ViCLIP, arXiv 2307.06942): cos(clip, prompt), about 0.1 to 0.35."""

    per = "clip"
    source = "OpenGVLab/ViCLIP-L-14-hf"

    kind: Literal["viclip"]
    path: str = Field("models/ViCLIP-L-14-hf", description="folder of the model, in safetensors")
    tokenizer: str = Field("models/clip-vit-large-patch14", description="folder of CLIP's tokenizer")
    chunk: PositiveInt = Field(2, description="clips a forward; they are recomputed in backward, so it bounds memory")
    dtype: Literal["float32", "bfloat16"] = Field("float32", description="of the model's weights")
    preprocess: Literal["internvid", "vbench"] = Field(
        "internvid",
        description="frames as ViCLIP's own evaluation takes them, squashed to a square, or as VBench does, cropped",
    )

    def build(self, context: RewardContext) -> ViClipReward:
        """Load OpenGVLab/ViCLIP-L-14-hf, or the `model` of ViClip-InternVid-10M-FLT.pth as safetensors.

        Raises:
            UserError: the checkpoint or CLIP's tokenizer is not the one it needs, whole.
        """
        path, words = self.folder(context.where, "path"), self.folder(context.where, "tokenizer", "path")
        tensors = {name: tensor for name, tensor in load_checkpoint_tensors(path).items() if name not in _NOT_NEEDED}
        sizes = ViClipSizes.read(tensors, where=path)
        reward = ViClipReward(sizes, load_clip_tokenizer(words, sizes.words), self)
        check_keys(tensors, reward.state_dict(), where=path)
        dtype = getattr(torch, self.dtype)
        reward.load_state_dict({name: tensor.to(dtype) for name, tensor in tensors.items()}, assign=True)
        return reward.requires_grad_(requires_grad=False).to(context.device)

    def on_meta(self, context: RewardContext) -> ViClipReward:  # noqa: ARG002
        """The same without weights."""
        folder = Path(self.path).expanduser()
        sizes = ViClipSizes.read(load_checkpoint_tensors(folder), where=folder) if folder.is_dir() else ViClipSizes()
        return ViClipReward(sizes, LongPrompts(), self)


_NOT_NEEDED = {"temp"}  # of the training loss


@dataclass(frozen=True)
class ViClipSizes:
    """Sizes of the two towers; the published ViT-L/14's by default."""

    patch: int = 14
    image: int = 224
    num_frames: int = 8
    vision_width: int = 1024
    vision_depth: int = 24
    text_width: int = 768
    text_depth: int = 12
    words: int = 49408
    text_limit: int = 32
    features: int = 768

    @classmethod
    def read(cls, tensors: Mapping[str, Tensor], *, where: Path) -> Self:
        """The sizes of a checkpoint; raises UserError if it lacks a tensor that tells one."""
        sizes = TensorSizes(tensors, where=where)
        vision, text = "vision_encoder", "text_encoder"
        vision_width, _, _, _, patch = sizes.of(f"{vision}.conv1.weight", 5)
        words, text_width = sizes.of(f"{text}.token_embedding.weight", 2)
        return cls(
            patch=patch,
            image=sizes.image_size(f"{vision}.positional_embedding", 2, patch),
            num_frames=sizes.of(f"{vision}.temporal_positional_embedding", 3)[1],
            vision_width=vision_width,
            vision_depth=sizes.depth(f"{vision}.transformer.resblocks", vision_width),
            text_width=text_width,
            text_depth=sizes.depth(f"{text}.transformer.resblocks", text_width),
            words=words,
            text_limit=sizes.of(f"{text}.positional_embedding", 2)[0],
            features=sizes.of(f"{vision}.proj", 2)[1],
        )


class ViClipReward(PromptedReward):
    """`cos(clip, prompt)`: one score a clip.

    It reads the middle frames of eight equal stretches of a clip, as ViCLIP's own evaluation and VBench do. Of a clip
    with fewer frames it reads all, and the last one again.

    Built without weights, on the meta device; the network has the names of the published checkpoint.

    Args:
        sizes: of the network.
        tokenizer: CLIP's.
        cfg: how many clips at a time.
    """

    def __init__(self, sizes: ViClipSizes, tokenizer: Any, cfg: ViClipConfig) -> None:
        super().__init__()
        self.sizes, self.cfg = sizes, cfg
        self.text_limit = sizes.text_limit
        self.text = ClipText(tokenizer, sizes.text_limit)
        with META:
            self.vision_encoder, self.text_encoder = VisionEncoder(sizes), TextEncoder(sizes)
        self.to(getattr(torch, cfg.dtype)).requires_grad_(requires_grad=False).eval()

    def looks_at(self, num_frames: int) -> Tensor:
        """Indices of the frames that are read, rising."""
        count = min(self.sizes.num_frames, num_frames)
        bounds = torch.arange(count + 1) * num_frames // count
        middles = (bounds[:-1] + bounds[1:] - 1) // 2
        return torch.cat([middles, middles[-1:].expand(self.sizes.num_frames - count)])

    def forward(self, videos: Tensor, prompts: Sequence[str]) -> RewardScores:
        """Score `[B, T, 3, height, width]` in [0, 1]; a prompt longer than the model reads is cut, with one warning."""
        self.check_prompts(prompts)
        with torch.no_grad():
            condition = self.condition(prompts)
        clips = videos[:, self.looks_at(videos.shape[1]).to(videos.device)]
        return RewardScores(clip=score_in_chunks(self.score_clips, clips, condition, self.cfg.chunk))

    def condition(self, prompts: Sequence[str]) -> Condition:
        """Unit features `[B, D]` of the prompts."""
        ids = self.text.tokens(prompts).input_ids.to(self.text_encoder.text_projection.device)
        return {"text": F.normalize(self.text_encoder(ids).float(), dim=-1)}

    def token_counts(self, prompts: Sequence[str]) -> list[int]:
        """Tokens of each prompt with start and end."""
        return self.text.counts(prompts)

    def score_clips(self, clips: Tensor, condition: Condition) -> Tensor:
        """Scores `[N]` of clips `[N, 8, 3, height, width]` in [0, 1]."""
        pixels = PREPROCESS[self.cfg.preprocess](clips.flatten(0, 1), self.sizes.image)
        features = self.vision_encoder(pixels.unflatten(0, clips.shape[:2]).to(self.vision_encoder.proj.dtype))
        return (F.normalize(features.float(), dim=-1) * condition["text"]).sum(dim=-1)


def internvid_pixels(frames: Tensor, size: int) -> Tensor:
    """Pixels of frames `[N, 3, height, width]` in [0, 1] as the evaluation of ViCLIP makes them: `[N, 3, size, size]`.

    Bicubic to a square whatever the shape, antialiased as torchvision does since 0.17, in whole steps of 1/255, then
    ImageNet's mean and standard deviation (InternVideo1/Pretrain/ViCLIP/dataset/__init__.py, test_transform).
    """
    return normalize(rounded(resize_bicubic(frames, (size, size))), IMAGENET_MEAN, IMAGENET_STD)


def vbench_pixels(frames: Tensor, size: int) -> Tensor:
    """The same as VBench makes them for its overall consistency and temporal style.

    Short side to `size`, bicubic without antialiasing, in whole steps of 1/255, centre crop, then CLIP's mean and
    standard deviation (vbench/utils.py of Vchitect/VBench, clip_transform).
    """
    return normalize(rounded(centre_square(frames, size, antialias=False)), CLIP_MEAN, CLIP_STD)


PREPROCESS: Mapping[str, Pixels] = {"internvid": internvid_pixels, "vbench": vbench_pixels}


class VisionEncoder(nn.Module):
    """Pixels `[N, T, 3, side, side]` to features `[N, D]`: all patches of all frames attend to each other."""

    def __init__(self, sizes: ViClipSizes) -> None:
        super().__init__()
        width, patch = sizes.vision_width, sizes.patch
        self.conv1 = nn.Conv3d(3, width, (1, patch, patch), (1, patch, patch), bias=False)
        self.class_embedding = nn.Parameter(torch.empty(width))
        self.positional_embedding = nn.Parameter(torch.empty((sizes.image // patch) ** 2 + 1, width))
        self.temporal_positional_embedding = nn.Parameter(torch.empty(1, sizes.num_frames, width))
        self.ln_pre = nn.LayerNorm(width)
        self.transformer = Transformer(width, sizes.vision_depth)
        self.ln_post = nn.LayerNorm(width)
        self.proj = nn.Parameter(torch.empty(width, sizes.features))

    def forward(self, pixels: Tensor) -> Tensor:
        """Encode."""
        # Its kernel is one frame deep: the 2-D convolution is the same, and much faster on a CPU.
        patches = F.conv2d(pixels.flatten(0, 1), self.conv1.weight[:, :, 0], stride=self.conv1.stride[1:])
        tokens = rearrange(patches, "(n t) w y x -> n (y x) t w", n=len(pixels))
        tokens = tokens + self.positional_embedding[1:, None] + self.temporal_positional_embedding
        whole = (self.class_embedding + self.positional_embedding[0]).expand(len(pixels), 1, -1)
        hidden = self.transformer(self.ln_pre(torch.cat([whole, tokens.flatten(1, 2)], dim=1)))
        features: Tensor = self.ln_post(hidden[:, 0]) @ self.proj
        return features


class TextEncoder(nn.Module):
    """Token ids `[N, L]` to features `[N, D]`, those at the end token, which has the largest id."""

    def __init__(self, sizes: ViClipSizes) -> None:
        super().__init__()
        width = sizes.text_width
        self.token_embedding = nn.Embedding(sizes.words, width)
        self.positional_embedding = nn.Parameter(torch.empty(sizes.text_limit, width))
        self.transformer = Transformer(width, sizes.text_depth, causal=True)
        self.ln_final = nn.LayerNorm(width)
        self.text_projection = nn.Parameter(torch.empty(width, sizes.features))

    def forward(self, ids: Tensor) -> Tensor:
        """Encode."""
        hidden = self.token_embedding(ids) + self.positional_embedding[: ids.shape[1]]
        hidden = self.ln_final(self.transformer(hidden))
        end = hidden[torch.arange(len(ids), device=ids.device), ids.argmax(dim=-1)]
        features: Tensor = end @ self.text_projection
        return features


class Transformer(nn.Module):
    """Residual blocks on `[N, L, width]`."""

    def __init__(self, width: int, depth: int, *, causal: bool = False) -> None:
        super().__init__()
        self.resblocks = nn.Sequential(*(Block(width, causal=causal) for _ in range(depth)))

    def forward(self, hidden: Tensor) -> Tensor:
        """One block after the other."""
        changed: Tensor = self.resblocks(hidden)
        return changed


class Block(nn.Module):
    """CLIP's: attention and a network of two layers with GELU as `x * sigmoid(1.702 x)`, each after its norm."""

    def __init__(self, width: int, *, causal: bool) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(width)
        self.attn = Attention(width, causal=causal)
        self.ln_2 = nn.LayerNorm(width)
        self.mlp = nn.ModuleDict({"c_fc": nn.Linear(width, 4 * width), "c_proj": nn.Linear(4 * width, width)})

    def forward(self, hidden: Tensor) -> Tensor:
        """Attend, then apply the network to each token."""
        hidden = hidden + self.attn(self.ln_1(hidden))
        inner = self.mlp["c_fc"](self.ln_2(hidden))
        changed: Tensor = hidden + self.mlp["c_proj"](inner * torch.sigmoid(1.702 * inner))
        return changed


class Attention(nn.Module):
    """`nn.MultiheadAttention` by its weights, without its other paths."""

    def __init__(self, width: int, *, causal: bool) -> None:
        super().__init__()
        self.causal = causal
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.empty(3 * width))
        self.out_proj = nn.Linear(width, width)

    def forward(self, hidden: Tensor) -> Tensor:
        """Each token attends to all tokens, or if causal to itself and those before it."""
        projected = F.linear(hidden, self.in_proj_weight, self.in_proj_bias)
        query, key, value = rearrange(projected, "n l (three h d) -> three n h l d", three=3, d=HEAD_WIDTH)
        attended = F.scaled_dot_product_attention(query, key, value, is_causal=self.causal)
        changed: Tensor = self.out_proj(rearrange(attended, "n h l d -> n l (h d)"))
        return changed
