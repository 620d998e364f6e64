"""A denoiser over several processes: its weights split (FSDP2), or the tokens of each clip (context parallelism)."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from rats_video.backbones.kinds import FAMILIES
from rats_video.errors import UserError
from rats_video.runtime import Runtime


def split_weights(networks: Iterable[nn.Module], runtime: Runtime) -> None:
    """Keep a share of every weight on each process and gather a block's only while it computes (FSDP2), in place.

    Weights move to the device block by block, so a network that was loaded into host memory need not fit there whole.
    A process on its own keeps all of them.
    torch's own function rather than accelerate's plugin, which wants one model with its optimizer and does nothing
    on CPUs: roles that share a denoiser, experts and teachers are all just networks here.
    """
    for network in networks:
        if runtime.everyone is None:
            network.to(runtime.device)
            continue
        from torch.distributed.fsdp import fully_shard

        for child in network.children():
            if isinstance(child, nn.ModuleList):  # the repeated blocks, in every family
                for block in child:
                    fully_shard(block, mesh=runtime.everyone)
        # By default what lies outside the blocks stays whole after a forward, and would then be no split weight to
        # whoever averages or saves it before a backward.
        fully_shard(network, mesh=runtime.everyone, reshard_after_forward=True)


def split_tokens(networks: Iterable[Any], tokens: int, runtime: Runtime) -> None:
    """Let the processes of a context group share each clip's tokens (Ulysses attention), in place.

    Args:
        networks: the denoisers, diffusers models.
        tokens: how many a clip has.
        runtime: the processes.

    Raises:
        UserError: the family or its attention kernel cannot, or the tokens or heads do not divide, or there is no GPU.
    """
    from diffusers import ContextParallelConfig

    assert runtime.mesh is not None
    if not torch.accelerator.device_count():  # diffusers divides by it
        raise UserError("clips can only be shared by GPUs, 0 seen", where="parallel.context", fix="use 1")
    for network in networks:
        name = type(network).__name__
        if getattr(network, "_cp_plan", None) is None:
            able = ", ".join(dict.fromkeys(family.family for family in FAMILIES if family.can_share_tokens))
            raise UserError(f"{name} cannot share a clip", where="parallel.context", fix=f"use 1; these can: {able}")
        heads: int = network.config.num_attention_heads
        for what, count in (("tokens of a clip", tokens), ("attention heads", heads)):
            if count % runtime.context:
                raise UserError(f"{runtime.context} does not divide the {count} {what}", where="parallel.context")
        config = ContextParallelConfig(ulysses_degree=runtime.context, mesh=runtime.mesh["ring", "ulysses"])
        logging.getLogger("diffusers.models.modeling_utils").setLevel(logging.ERROR)  # "experimental"
        try:
            network.enable_parallelism(config=config)
        except ValueError as error:
            raise UserError(
                f"{name}'s attention kernel cannot share a clip", where="compute.attention", fix="use native or flash"
            ) from error
