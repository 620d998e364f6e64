"""Measures of an evaluation beside the rewards: features, distances, latency."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from rats_video.assets import resolve_folder
from rats_video.backbones.base import PipelineBackbone
from rats_video.datasets.prepared.cache import ClipCache
from rats_video.datasets.prompts.settings import PreparedPromptsConfig, ShapesPromptsConfig
from rats_video.datasets.shapes.render import parse_prompt, render
from rats_video.distillation.real_data import check_cache
from rats_video.distillation.settings import DistillConfig
from rats_video.errors import warn
from rats_video.evaluation.features import (
    Dino,
    DinoFeaturesConfig,
    FeaturesConfig,
    ShapesFeaturesConfig,
    VideoMae,
    VideoMaeFeaturesConfig,
    WordFeatures,
    pixel_features,
)
from rats_video.evaluation.i3d import I3D, I3dFeaturesConfig
from rats_video.evaluation.sets import Reference
from rats_video.evaluation.sound import AlignMeasure, SoundMeasure
from rats_video.evaluation.sweep import FeatureFn, Measure, motion_measure, path_measure, reward_measure, shapes_measure
from rats_video.files import replacing, weights_digest
from rats_video.reading import check_plain_file
from rats_video.rewards.reward import build_reward
from rats_video.rewards.word import WordReward
from rats_video.seeds import seeded
from rats_video.types import ClipSpec


def build_measures(cfg: DistillConfig, device: torch.device) -> list[Measure]:
    """Trained reward, held-out reward where there is one, what can be measured on shapes, on what moves, on sound."""
    measures = [reward_measure("reward", build_reward(cfg.reward, device, where="reward", clip=cfg.clip.spec))]
    if cfg.heldout_reward is not None:
        heldout = build_reward(cfg.heldout_reward, device, where="heldout_reward", clip=cfg.clip.spec)
        measures.append(reward_measure("heldout_reward", heldout))
    if isinstance(cfg.prompts, ShapesPromptsConfig) and cfg.clip.num_frames > 1:  # whose words are of motion too
        measures += [shapes_measure, path_measure] if cfg.prompts.paths else [shapes_measure]
    if cfg.clip.num_frames > 2:
        measures.append(motion_measure)
    return [*measures, SoundMeasure(), AlignMeasure()]


MOST_REAL = 256  # clips of a reference; beyond, the few clips of an arm are what limits
_REAL_A_PROMPT = 4
_STREAM = 11  # of random numbers, apart from those of the arms' noise
WHERE = "evaluation.features"


def build_features(cfg: FeaturesConfig, device: torch.device) -> FeatureFn:
    """The network of a configuration, loaded and frozen; raises UserError if it cannot be."""
    folder = resolve_folder(cfg.path, where=f"{WHERE}.path")
    match cfg:
        case ShapesFeaturesConfig():
            return WordFeatures(WordReward.load(folder, device))
        case I3dFeaturesConfig(eps=eps):
            return I3D.load(folder, device, eps)
        case VideoMaeFeaturesConfig():
            return VideoMae.load(folder, device)
        case DinoFeaturesConfig():
            return Dino.load(folder, device)


def build_feature_fns(cfg: DistillConfig, device: torch.device) -> dict[str, FeatureFn]:
    """Functions of a clip whose values are kept: the features and, to compare clips of one prompt, coarse pixels."""
    looks: dict[str, FeatureFn] = {}
    if cfg.evaluation.features is not None:
        looks["features"] = build_features(cfg.evaluation.features, device)
    if cfg.evaluation.diversity is not None:
        looks["pixels"] = pixel_features
    return looks


def once_more(cfg: DistillConfig, prompts: Sequence[str]) -> list[str]:
    """The prompts of the clips that diversity needs beside those of `prompts`."""
    wanted = cfg.evaluation.diversity
    if wanted is None:
        return []
    chosen = list(dict.fromkeys(prompts))[: wanted.prompts]
    return [prompt for prompt in chosen for _ in range(wanted.clips - list(prompts).count(prompt))]


def build_reference(
    cfg: DistillConfig,
    look: FeatureFn,
    backbone: PipelineBackbone,
    clip: ClipSpec,
    prompts: Sequence[str],
    file: Path | None,
) -> Reference | None:
    """Real clips' features: of the shapes rendered ones, of a prepared cache those held out; None without either.

    They are kept in `file`, if given, and read from there as long as nothing that they depend on changes.
    """
    match cfg.prompts:
        case ShapesPromptsConfig():
            captions = [prompt for prompt in dict.fromkeys(prompts) for _ in range(_REAL_A_PROMPT)][:MOST_REAL]
            source, name = "rendered", f"{len(captions)} rendered clips of the held-out prompts"
            clips = _rendered(captions, clip, backbone.device)
        case PreparedPromptsConfig(path=path):
            cache = ClipCache(Path(path))
            check_cache(cache, resolve_folder(cfg.model, where="model"))
            size = (clip.num_frames, clip.height, clip.width)
            records = [record for record in cache.of_split("heldout") if record.size == size][:MOST_REAL]
            if not records:
                warn("holds out no clip of the run's size: the teacher's clips are the reference", where=path)
                return None
            captions = [record.caption for record in records]
            source, name = cache.digest, f"{len(records)} held-out clips of {path}, decoded"
            clips = (backbone.decode(cache.read([record])[0].to(backbone.device)) for record in records)
        case _:
            return None
    assert cfg.evaluation.features is not None
    network = weights_digest([resolve_folder(cfg.evaluation.features.path, where=f"{WHERE}.path")])
    depends = repr((cfg.evaluation.features.model_dump(exclude={"path"}), network, clip, source, captions)).encode()
    return Reference(_kept(file, hashlib.sha256(depends).hexdigest(), look, clips), tuple(captions), name)


def _rendered(prompts: Sequence[str], clip: ClipSpec, device: torch.device) -> Iterator[Tensor]:
    for start in range(0, len(prompts), 32):
        shown = [parse_prompt(prompt) for prompt in prompts[start : start + 32]]
        yield render(shown, clip, seeded(0, _STREAM, start), device)


@torch.no_grad()
def _kept(file: Path | None, key: str, look: FeatureFn, clips: Iterator[Tensor]) -> Tensor:
    """Features `[M, D]` from the file if it is of that key, else made and written there."""
    if file is None:
        return torch.cat([look(videos).cpu() for videos in clips])
    try:
        check_plain_file(file)
        with safe_open(file, framework="pt") as content:
            if (content.metadata() or {}).get("key") == key:
                features: Tensor = content.get_tensor("features")
                return features
    except (OSError, SafetensorError):
        pass  # not there, or damaged: made anew
    features = torch.cat([look(videos).cpu() for videos in clips])
    with replacing(file, "reference") as partial:
        save_file({"features": features.contiguous()}, partial, metadata={"key": key})
    return features
