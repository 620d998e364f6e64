"""`int8`, `fp8`: a pipeline folder whose denoiser keeps the matrices of its blocks in 8 bits, by torchao.

Weights alone, each row with a scale of its own; activations stay as they were. The files are safetensors that
diffusers turns back into torchao's tensors: nothing is pickled.
"""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path
from typing import Any

import torch

from rats_video.errors import UserError
from rats_video.export.merged import network_folders
from rats_video.export.stock import class_in

BLOCKS = r"re:(.*\.)?\w*blocks\.\d+\..*"  # what is left out, embeddings and the last layer, is small and delicate


def check_torchao() -> None:
    """Raise UserError where torchao is not installed."""
    if importlib.util.find_spec("torchao") is None:
        raise UserError(
            "quantising needs torchao", where="--format", fix="pip install 'rats-video[quant]', or another format"
        )


def quantize(folder: Path, kind: str, dtype: torch.dtype) -> tuple[int, int]:
    """Quantise the denoisers of a pipeline folder in place, one at a time; their bytes on disk before and after."""
    from diffusers import TorchAoConfig
    from torchao.quantization import FqnToConfig

    before = sum(map(weight_bytes, network_folders(folder)))
    for part in network_folders(folder):
        network = class_in(part / "config.json").from_pretrained(
            part,
            dtype=dtype,
            local_files_only=True,
            quantization_config=TorchAoConfig(FqnToConfig({BLOCKS: _weights(kind)})),
        )
        shutil.rmtree(part)
        network.save_pretrained(part)
        del network
    return before, sum(map(weight_bytes, network_folders(folder)))


def _weights(kind: str) -> Any:
    """What torchao does to one matrix."""
    from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig

    return Int8WeightOnlyConfig() if kind == "int8" else Float8WeightOnlyConfig()


def weight_bytes(folder: Path) -> int:
    """Size of the safetensors files in a folder."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))
