"""What reading a model takes before a run: disk, host memory and time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from rats_video.assets import MODELS, model_name
from rats_video.backbones.architecture import Architecture, build_on_meta
from rats_video.backbones.layout import weight_files
from rats_video.backbones.low_bit import quantise
from rats_video.distillation.settings import DistillConfig

READ_RATE = 1e9  # bytes a second that are assumed: a local disk may give several times as much, a shared one less


@dataclass(frozen=True)
class Reading:
    """The model's way from disk to device, in each process.

    Args:
        disk: bytes of weights by part, as they are stored; of the whole download where the folder is not there.
        host: the most bytes of host memory. Each part is read shard by shard, straight into the run's precision.
    """

    disk: Mapping[str, int]
    host: int

    @property
    def seconds(self) -> float:
        """At the assumed rate."""
        return sum(self.disk.values()) / READ_RATE


def plan_reading(
    cfg: DistillConfig, architecture: Architecture, quantization: str = "none", *, is_cpu: bool
) -> Reading:
    """The needs of reading this model into these bits; the folder's files are counted, not read."""
    base = build_on_meta(architecture, getattr(torch, cfg.compute.dtype))
    quantise(base.denoiser, quantization)
    networks = {name: part for name, part in base.parts.items() if isinstance(part, nn.Module)}
    sizes = [sum(weight.nbytes for weight in network.parameters()) for network in networks.values()]
    stays = is_cpu or cfg.compute.offload != "none" or cfg.parallel.shard  # or each part goes on before the next
    return Reading(_on_disk(cfg.model, architecture.folder, networks), sum(sizes) if stays else max(sizes))


def _on_disk(model: str, folder: Path | None, parts: Mapping[str, nn.Module]) -> dict[str, int]:
    if folder is not None and any(map(weight_files, folder.glob("*/"))):
        return {name: sum(file.stat().st_size for file in weight_files(folder / name)) for name in parts}
    download = next((size for name, size in MODELS.items() if name.endswith(f"/{model_name(model)}")), None)
    return {} if download is None else {"download": round(download * 1e9)}
