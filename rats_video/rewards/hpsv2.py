"""HPSv2.1: people's preference, by a CLIP ViT-H/14 in open_clip's layout (github tgxs002/HPSv2, hpsv2/img_score.py)."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from rats_video.errors import UserError
from rats_video.meta import META, LongPrompts
from rats_video.reading import DAMAGED, read_json
from rats_video.rewards.base import RewardContext, WeightsFolder
from rats_video.rewards.clip_score import VIT_H, BaseClipConfig, ClipReward, load_clip_tokenizer
from rats_video.rewards.files import check_keys, fill_transformers_model, load_checkpoint_tensors
from rats_video.rewards.pixels import CLIP_MEAN, CLIP_STD, normalize


class HPSv2Config(BaseClipConfig):
    """People's preference, HPSv2.1 (arXiv 2306.09341): cos(frame, prompt), about 0.2 to 0.35."""

    source = "xswu/HPSv2: HPS_v2.1_compressed.pt, converted"

    kind: Literal["hpsv2"]
    path: WeightsFolder = "models/HPSv2.1"
    tokenizer: str | None = "models/clip-vit-large-patch14"

    def build(self, context: RewardContext) -> ClipReward:
        """Load a converted checkpoint.

        Raises:
            UserError: the folder holds no safetensors file, or one with a missing, unknown or misshapen tensor; or the
                tokenizer is not CLIP's.
        """
        from transformers import CLIPConfig, CLIPModel

        folder, words = self.folder(context.where, "path"), self.folder(context.where, "tokenizer", "path")
        tensors = load_checkpoint_tensors(folder)
        config = CLIPConfig(**open_clip_config(tensors, folder))
        with META:
            wanted = CLIPModel(config).state_dict()
        check_keys(tensors, {_published(name): _joined(name, shape) for name, shape in wanted.items()}, where=folder)
        weights = {name: _part(name, tensors[_published(name)]) for name in wanted}
        model = fill_transformers_model(CLIPModel, config, weights, getattr(torch, self.dtype))
        tokenizer = load_clip_tokenizer(words, config.text_config.vocab_size)
        return ClipReward(model.to(context.device), tokenizer, self, pixels=hps_pixels)

    def on_meta(self, context: RewardContext) -> ClipReward:  # noqa: ARG002
        """The same without weights."""
        folder = Path(self.path).expanduser()
        config = open_clip_config(load_checkpoint_tensors(folder), folder) if folder.is_dir() else VIT_H
        return ClipReward(self.empty_model("CLIPModel", config), LongPrompts(), self, pixels=hps_pixels)


# From transformers' name of a weight to open_clip's.
_NAMES = (
    (r"text_model\.encoder\.layers", "transformer.resblocks"),
    (r"vision_model\.encoder\.layers", "visual.transformer.resblocks"),
    (r"self_attn\.[qkv]_proj\.", "attn.in_proj_"),
    (r"self_attn\.out_proj", "attn.out_proj"),
    (r"layer_norm([12])", r"ln_\1"),
    (r"mlp\.fc1", "mlp.c_fc"),
    (r"mlp\.fc2", "mlp.c_proj"),
    (r"text_model\.embeddings\.token_embedding", "token_embedding"),
    (r"text_model\.embeddings\.position_embedding\.weight", "positional_embedding"),
    (r"text_model\.final_layer_norm", "ln_final"),
    (r"text_projection\.weight", "text_projection"),
    (r"vision_model\.embeddings\.class_embedding", "visual.class_embedding"),
    (r"vision_model\.embeddings\.patch_embedding", "visual.conv1"),
    (r"vision_model\.embeddings\.position_embedding\.weight", "visual.positional_embedding"),
    (r"vision_model\.pre_layrnorm", "visual.ln_pre"),
    (r"vision_model\.post_layernorm", "visual.ln_post"),
    (r"visual_projection\.weight", "visual.proj"),
)


def hps_pixels(frames: Tensor, size: int) -> Tensor:
    """Pixels as the published code makes them of frames `[N, 3, height, width]` in [0, 1]: `[N, 3, size, size]`.

    Long side to `size` (bicubic, antialiased, overshoot kept), black on both sides of the short one, then CLIP's mean
    and standard deviation (hpsv2/src/open_clip/transform.py, ResizeMaxSize).
    """
    height, width = frames.shape[-2:]
    scale = size / max(height, width)
    target = (max(1, round(height * scale)), max(1, round(width * scale)))
    resized = F.interpolate(frames.float(), target, mode="bicubic", antialias=True)
    top, left = (size - target[0]) // 2, (size - target[1]) // 2
    padded = F.pad(resized, (left, size - target[1] - left, top, size - target[0] - top))
    return normalize(padded, CLIP_MEAN, CLIP_STD)


def open_clip_config(tensors: Mapping[str, Tensor], folder: Path) -> dict[str, Any]:
    """Arguments of transformers' CLIPConfig, from the sizes of open_clip's tensors.

    No tensor tells the number of heads. It follows from `vision_cfg.head_width` and `text_cfg.heads` of open_clip's own
    model configuration, if the folder has one as `config.json`; otherwise heads are as wide as ViT-H-14's, 80 and 64.

    Raises:
        UserError: a tensor that tells a size is missing, or the heads do not fit.
    """

    def size(name: str, dimension: int) -> int:
        if name not in tensors or tensors[name].ndim <= dimension:
            raise UserError(f"no CLIP in open_clip's layout: lacks {name}", where=str(folder))
        return tensors[name].shape[dimension]

    def tower(prefix: str, heads: int | None, head_width: int) -> dict[str, Any]:
        width = size(f"{prefix}0.ln_1.weight", 0)
        if heads is None:
            heads = width // head_width if head_width > 0 else 0
        if heads < 1 or width % heads:
            fix = "put open_clip's model configuration beside it as config.json"
            raise UserError(f"{prefix}0 is {width} wide, which {heads} heads cannot share", where=str(folder), fix=fix)
        blocks = {name[len(prefix) :].split(".")[0] for name in tensors if name.startswith(prefix)}
        return {
            "hidden_size": width,
            "intermediate_size": size(f"{prefix}0.mlp.c_fc.weight", 0),
            "num_hidden_layers": len(blocks),
            "num_attention_heads": heads,
            "hidden_act": "gelu",
        }

    text_heads, head_width = _heads(folder)
    vision = tower("visual.transformer.resblocks.", None, head_width)
    text = tower("transformer.resblocks.", text_heads, 64)
    patch, words = size("visual.conv1.weight", 3), size("token_embedding.weight", 0)
    grid = math.isqrt(size("visual.positional_embedding", 0) - 1)
    tokens = {"bos_token_id": words - 2, "eos_token_id": words - 1, "pad_token_id": 0}  # features are read at the end's
    limits = {"vocab_size": words, "max_position_embeddings": size("positional_embedding", 0)}
    return {
        "projection_dim": size("text_projection", 1),
        "vision_config": vision | {"image_size": grid * patch, "patch_size": patch},
        "text_config": text | tokens | limits,
    }


def _heads(folder: Path) -> tuple[int | None, int]:
    """Number of the text tower's heads, if known, and channels of a head of the vision tower."""
    path = folder / "config.json"
    if not path.is_file():
        return None, 80
    try:
        config = read_json(path)
        return int(config["text_cfg"]["heads"]), int(config["vision_cfg"]["head_width"])
    except DAMAGED as error:
        what = "is no model configuration of open_clip with text_cfg.heads and vision_cfg.head_width"
        raise UserError(what, where=str(path)) from error


def _published(name: str) -> str:
    """Open_clip's name of one of transformers' weights."""
    for pattern, replacement in _NAMES:
        name = re.sub(pattern, replacement, name)
    return name


def _joined(name: str, weight: Tensor) -> Tensor:
    """An empty tensor of the shape that open_clip keeps a weight in."""
    if _third(name) is not None:
        return weight.new_empty(3 * weight.shape[0], *weight.shape[1:])
    return weight.T if _is_transposed(name) else weight


def _part(name: str, tensor: Tensor) -> Tensor:
    """A weight out of the tensor that open_clip keeps it in."""
    third = _third(name)
    if third is not None:
        return tensor.chunk(3)[third].clone()
    return tensor.T.contiguous() if _is_transposed(name) else tensor


def _third(name: str) -> int | None:
    """The third of open_clip's joined projection that a query, key or value is; None for other weights."""
    found = re.search(r"self_attn\.([qkv])_proj", name)
    return "qkv".index(found[1]) if found else None


def _is_transposed(name: str) -> bool:
    return name in {"visual_projection.weight", "text_projection.weight"}
