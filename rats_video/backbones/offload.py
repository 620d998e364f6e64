"""A frozen denoiser in host memory, of which one group of layers at a time is on the device."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks


class OffloadedWeights:
    """Brings the weights of a group of layers in when it is called, and again when it is differentiated.

    diffusers' own group offload serves inference: it moves adapters along, and a backward pass finds the weights gone.
    Here autograd keeps, in place of each weight, the way to fetch it again.

    Args:
        network: frozen; its block lists are kept in host memory, the few weights outside them on the device. Adapters
            that are added later stay on the device.
        device: where it computes.
        level: `block` fetches a whole block at a time, `leaf` one layer.
    """

    def __init__(self, network: nn.Module, device: torch.device, level: Literal["block", "leaf"]) -> None:
        self._device = device
        self._on_device: dict[int, Tensor] = {}  # address of a fetched weight -> the host's
        self._saving = ExitStack()
        blocks = [block for part in network.children() if isinstance(part, nn.ModuleList) for block in part]
        in_blocks = {id(weight) for block in blocks for weight in block.parameters()}
        for weight in network.parameters():
            inside = id(weight) in in_blocks
            weight.data = _pinned(weight.data.cpu()) if inside and device.type == "cuda" else weight.data.to(device)
        for buffer in network.buffers():
            buffer.data = buffer.data.to(device)
        for module in blocks if level == "block" else [module for block in blocks for module in block.modules()]:
            self._attach(module, list(module.parameters(recurse=level == "block")))
        network.register_forward_pre_hook(self._watch_saving)
        network.register_forward_hook(self._stop_watching, always_call=True)

    def _attach(self, module: nn.Module, weights: list[nn.Parameter]) -> None:
        host = [weight.data for weight in weights]

        def fetch(*_: Any) -> None:
            for weight, kept in zip(weights, host, strict=True):
                weight.data = self._fetch(kept)
                self._on_device[weight.data_ptr()] = kept

        def release(*_: Any) -> None:
            for weight, kept in zip(weights, host, strict=True):
                self._on_device.pop(weight.data_ptr(), None)
                weight.data = kept

        if weights:
            module.register_forward_pre_hook(fetch)
            module.register_forward_hook(release, always_call=True)

    def _fetch(self, kept: Tensor) -> Tensor:
        return kept.to(self._device, non_blocking=True, copy=True)

    def _watch_saving(self, *_: Any) -> None:
        self._saving.enter_context(saved_tensors_hooks(self._pack, _unpack))

    def _stop_watching(self, *_: Any) -> None:
        self._saving.close()

    def _pack(self, saved: Tensor) -> Tensor | Callable[[], Tensor]:
        kept = self._on_device.get(saved.untyped_storage().data_ptr())
        if kept is None:
            return saved
        size, stride, offset = saved.size(), saved.stride(), saved.storage_offset()  # a weight, or a transposed view
        return lambda: self._fetch(kept).as_strided(size, stride, offset)


def _unpack(packed: Tensor | Callable[[], Tensor]) -> Tensor:
    return packed if isinstance(packed, Tensor) else packed()


def _pinned(tensor: Tensor) -> Tensor:
    return tensor.pin_memory()
