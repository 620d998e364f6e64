"""The options of `compute` that act on a denoiser or a decoder; none changes the result, but for rounding."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import checkpoint

from rats_video.backbones.attention import use_attention
from rats_video.backbones.base import PipelineBackbone
from rats_video.backbones.compute import DenoiserConfig
from rats_video.errors import UserError

GRAPHS = 32  # per block: three roles, with and without gradient, two batch sizes, short and long prompts


def apply_compute(cfg: DenoiserConfig, *roles: PipelineBackbone) -> None:
    """Attention kernel, activation checkpointing and compilation, for every network of these roles.

    Call it once, after the adapters are added and before the first call.

    Raises:
        UserError: a family cannot do what is asked.
    """
    done: set[int] = set()
    for role in roles:
        has_mask = cfg.attention != "native" and role.encode_text([""]).mask is not None
        for network in role.denoisers.values():
            if id(network) in done:
                continue
            done.add(id(network))
            use_attention(network, cfg.attention, has_mask=has_mask)
            if cfg.activation_checkpointing:
                recompute = recompute_block if role.adapters is None else role.adapters.checkpointing
                network.enable_gradient_checkpointing(in_host(recompute) if cfg.activation_offload else recompute)
            if cfg.compile:
                compile_blocks(network)


def recompute_block(block: nn.Module, *inputs: Any) -> Any:
    """The output of a block, of which backward finds the inputs alone."""
    return checkpoint(block, *inputs, use_reentrant=False)


def in_host(recompute: Callable[..., Any]) -> Callable[..., Any]:
    """The same, with the inputs in (pinned) host memory until backward comes to the block."""

    def run(block: nn.Module, *inputs: Any) -> Any:
        with save_on_cpu(pin_memory=True):
            return recompute(block, *inputs)

    return run


def use_decode_dtype(backbone: PipelineBackbone, dtype: torch.dtype) -> None:
    """Cast the decoder's weights to `dtype`; the statistics of latents, which are buffers, stay."""
    for weight in backbone.decoder.parameters():
        weight.data = weight.data.to(dtype)


def compile_blocks(network: Any, backend: str = "inductor") -> None:
    """`torch.compile` of the repeated blocks, each once a role and whether it carries gradient.

    Raises:
        UserError: diffusers names no repeated blocks for this family.
    """
    import torch._dynamo

    if not network._repeated_blocks:  # noqa: SLF001  # what diffusers itself reads
        raise UserError(
            f"{type(network).__name__} has no repeated blocks to compile",
            where="compute.compile",
            fix="set compute.compile=false",
        )
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, GRAPHS)  # noqa: SLF001
    network.compile_repeated_blocks(fullgraph=True, backend=backend)
