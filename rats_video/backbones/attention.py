"""Which attention kernel a denoiser calls, through diffusers' dispatcher."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from rats_video.errors import UserError

INSTALL = {
    "xformers": "pip install 'xformers>=0.0.35'",
    "flash": "pip install 'flash-attn>=2.6.3' --no-build-isolation",
    "_flash_3": "build flash-attn 3 from the hopper/ folder of github.com/Dao-AILab/flash-attention",
    "sage": "pip install 'sageattention>=2.1.1'",
}
GPU_ONLY = {*INSTALL, "flex"}  # flex runs on a CPU, but not backward
HALF_ONLY = {"flash", "_flash_3", "sage"}
TAKES_NO_MASK = {"flash", "_flash_3", "sage"}


def check_attention(backend: str, device: torch.device, dtype: str) -> None:
    """Find out before anything is loaded whether a student can be trained with this kernel here.

    Raises:
        UserError: it has no backward pass, is not installed, or does not run on this device or in this precision.
    """
    where = "compute.attention"
    if backend == "sage":
        raise UserError("sage has no backward pass, no student can be trained with it", where=where,
                        fix="xformers or flash")  # fmt: skip
    if backend in GPU_ONLY and device.type == "cpu":
        raise UserError(f"{backend} needs a GPU", where=where, fix="native runs anywhere")
    if backend in HALF_ONLY and dtype == "float32":
        raise UserError(f"{backend} computes in bfloat16 only", where=where, fix="set compute.dtype=bfloat16")
    from diffusers.models.attention_dispatch import attention_backend

    try:
        with attention_backend(backend):
            pass
    except RuntimeError as error:
        raise UserError(f"{backend} is not installed, or too old", where=where, fix=INSTALL[backend]) from error


def use_attention(network: Any, backend: str, *, has_mask: bool) -> None:
    """Make one network call `backend`; all other models keep theirs.

    Args:
        network: a diffusers transformer.
        backend: diffusers' name of the kernel.
        has_mask: its text comes with a mask over padding.

    Raises:
        UserError: the network asks for no backend, or hands over masks that the kernel cannot take.
    """
    from diffusers.models.attention_dispatch import attention_backend

    if used_attention(network) == backend:
        return
    kind, where = type(network).__name__, "compute.attention"
    if not _asking(network):
        raise UserError(f"{kind} only has native attention", where=where, fix="native")
    if has_mask and backend in TAKES_NO_MASK:
        raise UserError(f"{kind} masks padding, which {backend} cannot", where=where, fix="native or xformers")
    with attention_backend("native"):  # puts the global backend back, which the next line changes for every model
        network.set_attention_backend(backend)


def used_attention(network: nn.Module) -> str:
    """The kernel that the network's attention layers will really call, `a+b` where they differ."""
    from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry

    active, _ = _AttentionBackendRegistry.get_active_backend()  # of layers without a choice of their own
    asking = _asking(network)
    silent = [] if len(asking) == len(_processors(network)) else ["native"]  # they call torch's attention themselves
    names = {AttentionBackendName(processor._attention_backend or active).value for processor in asking}  # noqa: SLF001
    return "+".join(sorted({*names, *silent})) or "native"


def _processors(network: nn.Module) -> list[Any]:
    return [module.processor for module in network.modules() if getattr(module, "processor", None) is not None]


def _asking(network: nn.Module) -> list[Any]:
    """The attention processors that ask diffusers' dispatcher for a kernel."""
    return [processor for processor in _processors(network) if hasattr(processor, "_attention_backend")]
