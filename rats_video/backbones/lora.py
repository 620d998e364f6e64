"""Roles on one base: LoRA adapters (Hu et al., 2021) on a frozen denoiser, switched for the price of a few attributes.

Traps of switching through peft and diffusers that this avoids: `set_adapter` and `enable_adapters` walk the whole
model (5 to 10 ms) and flip `requires_grad`; a checkpointed block is recomputed in backward under whatever adapter is
active by then.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rats_video.backbones.compute import LoraConfig
from rats_video.backbones.experts import HIGH_NOISE, LOW_NOISE
from rats_video.backbones.low_bit import bits_of
from rats_video.errors import UserError, first_line
from rats_video.hub import LORAS
from rats_video.reading import DAMAGED, check_finite, check_plain_file

LORA_FILE = f"{LORAS}.safetensors"  # the name diffusers gives it
NOISE = {HIGH_NOISE: "high-noise", LOW_NOISE: "low-noise"}
METADATA_KEY = "lora_adapter_metadata"


class Adapters:
    """The adapters of a denoiser, and which of them its next call uses.

    Args:
        networks: the denoiser's networks, diffusers models, by part name; frozen here.
    """

    def __init__(self, networks: Mapping[str, Any]) -> None:
        self.networks = dict(networks)
        self.configs: dict[str, LoraConfig] = {}
        self.kept: tuple[str, ...] = ()
        self.active: str | None = None
        self._layers: list[Any] = []
        for network in self.networks.values():
            network.requires_grad_(requires_grad=False)

    def add(self, name: str, cfg: LoraConfig, default_targets: Sequence[str]) -> None:
        """Add an adapter; its B matrices are zero, so that it changes nothing yet.

        Raises:
            UserError: no layer of the denoiser is called as `cfg.targets` says.
        """
        from peft import LoraConfig

        assert name not in self.configs, f"there is an adapter {name!r}"
        targets = list(cfg.targets or default_targets)
        for network in self.networks.values():
            peft_config = LoraConfig(r=cfg.rank, lora_alpha=cfg.alpha, target_modules=targets, init_lora_weights=True)
            try:
                with warnings.catch_warnings():
                    warnings.filterwarnings("ignore", "Already found a `peft_config`")  # several are what we want
                    network.add_adapter(peft_config, adapter_name=name)
            except ValueError as error:
                raise UserError(
                    f"no layer of the denoiser is called {', '.join(targets)}", where="student.weights.targets",
                    fix=f"null takes {', '.join(default_targets)}",
                ) from error  # fmt: skip
        self.configs[name] = cfg
        device = next(next(iter(self.networks.values())).parameters()).device  # an offloaded block's own is the host
        self._find_layers()
        for each in self.configs:
            for parameter in self.weights(each).values():
                parameter.requires_grad_()
        for parameter in self.weights(name).values():
            parameter.data = parameter.data.to(device, getattr(torch, cfg.dtype))
        self.use(name)

    def keep(self, name: str, scale: float) -> None:
        """Make an adapter that is on the networks already, `scale` times, a part of the base: every call uses it."""
        self._find_layers()
        for layer in self._layers:
            if name in layer.scaling:
                layer.set_scale(name, scale)
        for weight in self.weights(name).values():
            weight.requires_grad = False
        self.kept += (name,)
        self._use(self.active)

    def _find_layers(self) -> None:
        from peft.tuners.lora import LoraLayer

        self._layers = [m for net in self.networks.values() for m in net.modules() if isinstance(m, LoraLayer)]

    def use(self, name: str | None) -> None:
        """Make `name` the adapter of the calls to come; None calls the base alone."""
        if name != self.active:
            self._use(name)

    def _use(self, name: str | None) -> None:
        self.active = name
        used = [*self.kept, *([] if name is None else [name])]
        for layer in self._layers:
            layer._disable_adapters = not used  # noqa: SLF001  # what peft's own setters write, without their walk
            if used:
                layer._active_adapter = used if self.kept else name  # noqa: SLF001

    def weights(self, name: str) -> dict[str, nn.Parameter]:
        """An adapter's parameters, named as diffusers does: `transformer.blocks.0.attn1.to_q.lora_A.weight`."""
        return {
            f"{part}.{key.replace(f'.{name}.', '.')}": parameter
            for part, network in self.networks.items()
            for key, parameter in network.named_parameters()
            if f".{name}." in key and ".lora_" in key
        }

    def rescale(self, name: str, scale: float) -> None:
        """Make an adapter change the base `scale` times as much as it was trained to."""
        for layer in self._layers:
            layer.set_scale(name, scale)

    def merge(self, name: str) -> None:
        """Add an adapter to the weights it adapts, for good: the networks are plain again, this is of no more use.

        Raises:
            UserError: they are in few bits.
        """
        for network in self.networks.values():
            if (bits := bits_of(network)) != "none":
                raise UserError(f"its matrices are in {bits}, to which nothing can be added", where="the base",
                                fix="give it unquantised: --base DIR, or another model")  # fmt: skip
            network.fuse_lora(adapter_names=[name])
            network.unload_lora()

    def fold_alpha(self, name: str) -> None:
        """Move an adapter's alpha / rank into B, in place: the same adapter for readers that know no alpha."""
        cfg = self.configs[name]
        for key, weight in self.weights(name).items():
            if ".lora_B." in key:
                weight.data.mul_(cfg.alpha / cfg.rank)
        for network in self.networks.values():
            network.peft_config[name].lora_alpha = cfg.rank
        for layer in self._layers:
            layer.lora_alpha[name] = cfg.rank
            layer.set_scale(name, 1)
        self.configs[name] = cfg.model_copy(update={"alpha": cfg.rank})

    def save(self, name: str, folder: Path) -> None:
        """Write all of an adapter into one file, from which `load` takes it."""
        folder.mkdir(parents=True, exist_ok=True)
        self.write(name, folder / LORA_FILE, {part: part for part in self.networks})

    def write(self, name: str, file: Path, parts: Mapping[str, str], remarks: Mapping[str, str] | None = None) -> None:
        """Write an adapter's file as diffusers does, alpha in its header.

        Args:
            name: of the adapter.
            file: to write.
            parts: the networks it holds, and what the file calls each: `pipeline.load_lora_weights` looks for one.
            remarks: they join the header.
        """
        tensors = {}
        for key, weight in self.weights(name).items():
            part, _, rest = key.partition(".")
            if part in parts:
                tensors[f"{parts[part]}.{rest}"] = weight.detach().cpu().contiguous()
        metadata = {
            f"{called}.{key}": sorted(value) if isinstance(value, set) else value
            for part, called in parts.items()
            for key, value in self.networks[part].peft_config[name].to_dict().items()
        }
        save_file(tensors, file, {"format": "pt", METADATA_KEY: json.dumps(metadata, default=str), **(remarks or {})})

    def load(self, name: str, tensors: Mapping[str, Tensor], *, where: Path) -> None:
        """Fill an adapter's weights in place.

        Raises:
            UserError: they are not of this base, or of another rank.
        """
        weights = self.weights(name)
        if odd := sorted(weights.keys() ^ tensors.keys()):
            raise UserError(f"was trained on another model: {odd[0]} does not match", where=str(where))
        for key, weight in weights.items():
            if weight.shape != tensors[key].shape:
                raise UserError(
                    f"was trained on another model: {key} is {list(tensors[key].shape)}, not {list(weight.shape)}",
                    where=str(where),
                )
            weight.data.copy_(tensors[key])

    def checkpointing(self, module: nn.Module, *args: Any) -> Any:
        """Activation checkpointing of a block that is recomputed under the adapter it was first computed with."""
        adapter = self.active

        def run(*inputs: Any) -> Any:
            self.use(adapter)
            return module(*inputs)

        return checkpoint(run, *args, use_reentrant=False)


def adapter_files(parts: Sequence[str]) -> dict[str, str]:
    """The LoRA file of each denoising part: programs load each of two experts from a file of its own."""
    if len(parts) == 1:
        return {parts[0]: LORA_FILE}
    return {part: LORA_FILE.replace(".", f"-{NOISE[part]}.") for part in parts}


def has_adapter(folder: Path) -> bool:
    """True for the folder of a student that is a LoRA, in one file or one an expert."""
    return any(folder.glob(f"{LORAS}*.safetensors"))


def read_adapter(folder: Path, parts: Sequence[str]) -> tuple[LoraConfig, dict[str, Tensor]]:
    """A student's LoRA, from one file or, as `export` writes it for two experts, from one for each of the parts.

    Raises:
        UserError: as `read_lora`.
    """
    if (folder / LORA_FILE).is_file():
        return read_lora(folder / LORA_FILE)
    tensors: dict[str, Tensor] = {}
    for part, file in adapter_files(parts).items():
        cfg, own = read_lora(folder / file)  # each calls its own the first part
        tensors |= {f"{part}.{key.partition('.')[2]}": tensor for key, tensor in own.items()}
    return cfg, tensors


def read_lora(path: Path) -> tuple[LoraConfig, dict[str, Tensor]]:
    """A LoRA file's shape and its tensors.

    Raises:
        UserError: it is damaged, or says no rank and alpha.
    """
    try:
        check_plain_file(path)
        with safe_open(path, framework="pt") as file:
            metadata = json.loads((file.metadata() or {})[METADATA_KEY])
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  # no mapping
        check_finite(tensors.items(), where=path)
        settings = {key.split(".", 1)[1]: value for key, value in metadata.items()}
        return (
            LoraConfig(kind="lora", rank=settings["r"], alpha=settings["lora_alpha"],
                        targets=tuple(settings["target_modules"])),
            tensors,
        )  # fmt: skip
    except DAMAGED as error:
        reason = first_line(error)
        raise UserError(f"not a LoRA file with its rank and alpha: {reason}", where=str(path)) from error
