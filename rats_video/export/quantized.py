"""`int8`, `fp8`: a pipeline folder whose denoiser keeps the matrices of its blocks in 8 bits, by torchao.

Weights alone, each row with a scale of its own; activations stay as they were. The files are safetensors that
diffusers turns back into torchao's tensors: nothing is pickled.
"""

from __future__ import annotations

import importlib.util
import shutil
from abc import abstractmethod
from pathlib import Path
from typing import Any

from rats_video.backbones.base import PipelineBackbone
from rats_video.errors import UserError
from rats_video.export.base import ExportedStudent
from rats_video.export.comfyui_models import denoiser_config, refusal
from rats_video.export.diffusers import Diffusers
from rats_video.export.merged import network_folders
from rats_video.export.stock import class_in

BLOCKS = r"re:(.*\.)?\w*blocks\.\d+\..*"  # the rest, embeddings and the last layer, is small and delicate


class Quantized(Diffusers):
    """A pipeline folder in eight bits; a subclass names them."""

    relation = "quantized"
    limits = ("It saves memory; whether it is faster depends on the GPU and was not measured.",)
    packages = ("'torchao>=0.15'",)
    loses = True

    def check(self, student: Path, base: Path, family: type[PipelineBackbone], scale: float) -> None:  # noqa: ARG002
        """Refuse where torchao is not installed."""
        if importlib.util.find_spec("torchao") is None:
            raise UserError(
                "quantising needs torchao", where="--format", fix="pip install 'rats-video[quant]', or another format"
            )

    def programs(self, exported: ExportedStudent) -> str:
        """Diffusers: ComfyUI has 8 bits of its own."""
        config = denoiser_config(exported)
        offer = "" if refusal(config, is_lora=exported.is_lora) else "; take `--format comfyui` for other programs"
        return f"This is for diffusers alone, which reads torchao's 8 bits{offer}."

    def finish(self, exported: ExportedStudent, folder: Path) -> list[str]:
        """Quantise the denoisers in place, one at a time; returns their bytes on disk before and after."""
        from diffusers import TorchAoConfig
        from torchao.quantization import FqnToConfig

        before = sum(map(weight_bytes, network_folders(folder)))
        for part in network_folders(folder):
            network = class_in(part / "config.json").from_pretrained(
                part,
                dtype=exported.dtype,
                local_files_only=True,
                quantization_config=TorchAoConfig(FqnToConfig({BLOCKS: self._matrix()})),
            )
            shutil.rmtree(part)
            network.save_pretrained(part)
            del network
        after = sum(map(weight_bytes, network_folders(folder)))
        return [f"denoiser: {before / 2**20:.1f} MiB before, {after / 2**20:.1f} MiB after"]

    @abstractmethod
    def _matrix(self) -> Any:
        """Torchao's settings for one matrix."""


class Int8(Quantized):
    """Integers."""

    name = "int8"
    summary = "a whole pipeline whose denoiser keeps its blocks' matrices in 8-bit integers (torchao, weights alone)"

    def _matrix(self) -> Any:
        from torchao.quantization import Int8WeightOnlyConfig

        return Int8WeightOnlyConfig()


class Fp8(Quantized):
    """Floats."""

    name = "fp8"
    summary = "a whole pipeline whose denoiser keeps its blocks' matrices in 8-bit floats (torchao, weights alone)"

    def _matrix(self) -> Any:
        from torchao.quantization import Float8WeightOnlyConfig

        return Float8WeightOnlyConfig()


def weight_bytes(folder: Path) -> int:
    """Size of the safetensors files in a folder."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))
