"""ImageReward: how much people like each frame for its prompt, by BLIP (arXiv 2304.05977)."""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any, Literal, Self

import torch
from pydantic import Field
from torch import Tensor, nn

from rats_video.errors import AsUserError, UserError
from rats_video.meta import META, LongPrompts
from rats_video.rewards.base import RewardContext, WeightsFolder
from rats_video.rewards.files import check_keys, load_checkpoint_tensors
from rats_video.rewards.frames import FrameReward, FrameRewardConfig
from rats_video.rewards.pixels import clip_pixels
from rats_video.rewards.prompted import Condition
from rats_video.rewards.sizes import HEAD_WIDTH, TensorSizes


class ImageRewardConfig(FrameRewardConfig):
    """How much people like a frame for its prompt (ImageReward, arXiv 2304.05977): about -2 to 2, 0 on average."""

    source = "THUDM/ImageReward, converted to safetensors"

    kind: Literal["image_reward"]
    path: WeightsFolder = "models/ImageReward"
    tokenizer: str = Field("models/bert-base-uncased", description="folder of the tokenizer of BERT, uncased")

    def build(self, context: RewardContext) -> ImageReward:
        """Load ImageReward.pt as safetensors, with its own names.

        Raises:
            UserError: the checkpoint or BERT's tokenizer is not the one it needs, whole.
        """
        path, words = self.folder(context.where, "path"), self.folder(context.where, "tokenizer", "path")
        tensors = {
            name: tensor for name, tensor in load_checkpoint_tensors(path).items() if not name.startswith(_NOT_NEEDED)
        }
        sizes = BlipSizes.read(tensors, where=path)
        reward = ImageReward(sizes, _bert_tokenizer(words, sizes.words), self)
        empty = reward.state_dict()
        check_keys(tensors, {_published_name(name): tensor for name, tensor in empty.items()}, where=path)
        filled = {name: tensors[_published_name(name)].to(tensor.dtype) for name, tensor in empty.items()}
        reward.load_state_dict(filled, assign=True)
        # A counter, which no checkpoint needs to hold.
        reward.text.embeddings.position_ids = torch.arange(sizes.positions)[None]
        return reward.requires_grad_(requires_grad=False).to(context.device)

    def on_meta(self, context: RewardContext) -> ImageReward:  # noqa: ARG002
        """The same without weights."""
        folder = Path(self.path).expanduser()
        sizes = BlipSizes.read(load_checkpoint_tensors(folder), where=folder) if folder.is_dir() else BlipSizes()
        return ImageReward(sizes, LongPrompts(), self)


_MEAN, _STD = 0.16717362830052426, 1.0333394966054072  # of the head's output, ImageReward.py of THUDM/ImageReward
_HEAD = {"0": 1024, "2": 128, "4": 64, "6": 16, "7": 1}  # where its linear layers stand, and how wide they are
_ADDED_TOKENS = ["[DEC]", "[ENC]"]  # of BLIP; a scored prompt starts with [CLS] all the same
_NOT_NEEDED = ("blip.vision_proj.", "blip.text_proj.", "blip.text_encoder.embeddings.position_ids")
_PUBLISHED = {  # by our own names; those of the text encoder are the published ones
    "vision.": "blip.visual_encoder.",
    "text.": "blip.text_encoder.",
    "head.": "mlp.layers.",
}
_PUBLISHED_VISION = {
    "embeddings.class_embedding": "cls_token",
    "embeddings.position_embedding": "pos_embed",
    "embeddings.patch_embedding": "patch_embed.proj",
    "encoder.layers": "blocks",
    "self_attn.projection": "attn.proj",
    "self_attn": "attn",
    "layer_norm": "norm",
    "post_layernorm": "norm",
}


@dataclass(frozen=True)
class BlipSizes:
    """Sizes of ImageReward's two transformers; the published checkpoint's by default."""

    patch: int = 16
    image: int = 224
    vision_width: int = 1024
    vision_depth: int = 24
    text_width: int = 768
    text_depth: int = 12
    words: int = 30524
    positions: int = 512

    @classmethod
    def read(cls, tensors: Mapping[str, Tensor], *, where: Path) -> Self:
        """The sizes of a checkpoint; raises UserError if it lacks a tensor that tells one."""
        sizes = TensorSizes(tensors, where=where)
        vision, text = "blip.visual_encoder", "blip.text_encoder"
        vision_width, _, _, patch = sizes.of(f"{vision}.patch_embed.proj.weight", 4)
        words, text_width = sizes.of(f"{text}.embeddings.word_embeddings.weight", 2)
        return cls(
            patch=patch,
            image=sizes.image_size(f"{vision}.pos_embed", 3, patch),
            vision_width=vision_width,
            vision_depth=sizes.depth(f"{vision}.blocks", vision_width),
            text_width=text_width,
            text_depth=sizes.depth(f"{text}.encoder.layer", text_width),
            words=words,
            positions=sizes.of(f"{text}.embeddings.position_embeddings.weight", 2)[0],
        )


class ImageReward(FrameReward):
    """`(head(BLIP(frame, prompt)) - mean) / std` for each scored frame: about -2 to 2, 0 on average.

    Built without weights, on the meta device.

    Args:
        sizes: of BLIP.
        tokenizer: BERT's, with BLIP's two added tokens.
        cfg: which frames are scored, and how many at a time.
    """

    text_limit = 35

    def __init__(self, sizes: BlipSizes, tokenizer: Any, cfg: FrameRewardConfig) -> None:
        super().__init__(cfg)
        self.tokenizer, self._size = tokenizer, sizes.image
        dtype = getattr(torch, cfg.dtype)
        with META:
            self.vision, self.text = (network.to(dtype) for network in _blip(sizes))
            layers = itertools.starmap(nn.Linear, itertools.pairwise((sizes.text_width, *_HEAD.values())))
            # In float32; the gaps are dropout, and there are no activations.
            self.head = nn.Sequential(OrderedDict(zip(_HEAD, layers, strict=True)))
        self.requires_grad_(requires_grad=False).eval()

    def condition(self, prompts: Sequence[str]) -> Condition:
        """Token ids and mask of the prompts, `[B, 35]` each."""
        tokens = self.tokenizer(
            list(prompts), padding="max_length", truncation=True, max_length=self.text_limit, return_tensors="pt"
        ).to(self.vision.device)
        return {"ids": tokens.input_ids, "mask": tokens.attention_mask}

    def token_counts(self, prompts: Sequence[str]) -> list[int]:
        """Tokens of each prompt with start and end."""
        return [len(self.tokenizer(prompt, verbose=False).input_ids) for prompt in prompts]

    def score_frames(self, frames: Tensor, condition: Condition) -> Tensor:
        """Scores `[N]` of frames `[N, 3, height, width]` in [0, 1]."""
        pixels = clip_pixels(frames, self._size).to(self.vision.dtype)
        seen = self.vision(pixel_values=pixels).last_hidden_state
        read = self.text(
            input_ids=condition["ids"], attention_mask=condition["mask"], encoder_hidden_states=seen, is_decoder=False
        ).last_hidden_state
        score: Tensor = self.head(read[:, 0].float()).squeeze(-1)
        return (score - _MEAN) / _STD


def _blip(sizes: BlipSizes) -> tuple[Any, Any]:
    """The vision transformer, and the text encoder that attends to its output."""
    from transformers import BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel

    vision = BlipVisionConfig(
        hidden_size=sizes.vision_width,
        intermediate_size=4 * sizes.vision_width,
        num_hidden_layers=sizes.vision_depth,
        num_attention_heads=sizes.vision_width // HEAD_WIDTH,
        image_size=sizes.image,
        patch_size=sizes.patch,
        layer_norm_eps=1e-6,
    )
    text = BlipTextConfig(
        hidden_size=sizes.text_width,
        encoder_hidden_size=sizes.vision_width,
        intermediate_size=4 * sizes.text_width,
        num_hidden_layers=sizes.text_depth,
        num_attention_heads=sizes.text_width // HEAD_WIDTH,
        vocab_size=sizes.words,
        max_position_embeddings=sizes.positions,
        layer_norm_eps=1e-12,
        is_decoder=True,  # gives it the layers that attend to the image; it reads in both directions all the same
        bos_token_id=None,
        sep_token_id=None,
    )
    return BlipVisionModel(vision), BlipTextModel(text, add_pooling_layer=False)


def _published_name(name: str) -> str:
    part, rest = name.split(".", 1)
    if part == "vision":
        rest = reduce(lambda changed, pair: changed.replace(*pair), _PUBLISHED_VISION.items(), rest)
    return _PUBLISHED[f"{part}."] + rest


def _bert_tokenizer(folder: Path, words: int) -> Any:
    from transformers import BertTokenizer

    # Without its files transformers would make up a tokenizer that knows no word.
    if not any((folder / name).is_file() for name in ("tokenizer.json", "vocab.txt")):
        raise UserError("no tokenizer in it", where=str(folder), fix="give a folder of google-bert/bert-base-uncased")
    with AsUserError("cannot load its tokenizer", where=str(folder)):
        tokenizer = BertTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    tokenizer.add_tokens(_ADDED_TOKENS, special_tokens=True)
    if len(tokenizer) != words:
        raise UserError(
            f"its tokenizer has {len(tokenizer)} tokens with {' and '.join(_ADDED_TOKENS)}, the model {words}",
            where=str(folder), fix="give a folder of google-bert/bert-base-uncased",
        )  # fmt: skip
    return tokenizer
