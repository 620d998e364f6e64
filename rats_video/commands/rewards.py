"""`rewards`: lists the kinds of reward, and tests one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from rats_video.commands.device import explain_memory, pick_device
from rats_video.config.explain import KIND, nearest
from rats_video.config.load import load_config
from rats_video.datasets.prompts.split import load_prompts
from rats_video.distillation.settings import DistillConfig
from rats_video.errors import UserError
from rats_video.evaluation.tables import aligned
from rats_video.planning.memory import GIB
from rats_video.rewards.base import RewardKindConfig
from rats_video.rewards.reward import (
    OneRewardConfig,
    build_reward,
    check_reward_prompts,
    reward_folders,
    reward_kinds,
    single_rewards,
)
from rats_video.rewards.self_test import SelfTest, self_test
from rats_video.rewards.sum import SumRewardConfig, terms_of

ROLES = ("reward", "heldout_reward")
_TITLES = ["kind", "per", "gradient", "at hand", "scores"]


def run_list_rewards(*, config: str | None) -> list[str]:
    """A table of every kind of reward, then the source of their weights, their folders, and how to get them.

    Weights that `config` uses are looked for where it says.
    """
    used = [] if config is None else list(_used(load_config(DistillConfig, config, group="distill")))
    rows, weights = [_TITLES], []
    for kind, member in reward_kinds().items():
        ours: list[tuple[str, Any]] = [(key, cfg) for key, cfg in used if isinstance(cfg, member)]
        for key, cfg in ours or [("", None if _required(member) else member.model_validate({KIND: kind}))]:
            at_hand, fix = _at_hand(member, cfg, key or "reward")
            differentiable = getattr(cfg or member, "differentiable", None)
            gradient = "as it says" if differentiable is None else "yes" if differentiable else "no"
            rows.append([kind, member.per, gradient, at_hand, _first_line(member)])
            if cfg is not None and member.folders:
                where = f"{cfg.path} ({key})" if key else cfg.path
                weights.append(
                    f"{kind}: weights of {member.source}; in {where}" + (f"; get them, {fix}" if fix else "")
                )
    return [*aligned(rows, num_texts=len(_TITLES)), "", *weights]


def _used(cfg: DistillConfig) -> Iterator[tuple[str, OneRewardConfig]]:
    for role in ROLES:
        if (reward := getattr(cfg, role)) is not None:
            yield from single_rewards(reward, role).items()


def _required(member: type[RewardKindConfig]) -> list[str]:
    return [name for name, field in member.model_fields.items() if field.is_required() and name != KIND]


def _at_hand(member: type[RewardKindConfig], cfg: OneRewardConfig | None, key: str) -> tuple[str, str]:
    """Availability of the weights, and how to get them."""
    if cfg is None:
        return "-" if member is SumRewardConfig else f"give {', '.join(_required(member))}", ""
    try:
        reward_folders(cfg, where=key)
    except UserError as error:
        return "no", error.fix
    return "yes", ""


def _first_line(member: type[RewardKindConfig]) -> str:
    return (member.__doc__ or "").strip().splitlines()[0]


def run_check_reward(*, name: str, config: str, overrides: Sequence[str], device: str) -> list[str]:
    """Test a reward of a configuration, or a kind at its usual place, on the real weights.

    Raises:
        UserError: it is not at hand, or is not sound.
    """
    role, cfg = _named(name, config, overrides)
    chosen = getattr(cfg, role)
    if chosen is None:
        raise UserError("the configuration has none", where=role, fix=f"--set {role}.kind=...")
    where, prompts = pick_device(device), load_prompts(cfg.prompts).train
    lines = []
    with explain_memory(lambda: f"set a smaller clip, or {role}.frames and {role}.chunk"):
        reward = build_reward(chosen, where, where=role, clip=cfg.clip.spec)
        check_reward_prompts(reward, prompts)
        for key, term in terms_of(reward, role).items():
            if where.type == "cuda":
                torch.cuda.reset_peak_memory_stats(where)
            found = self_test(term.reward, cfg.clip.spec, prompts, where=key, device=where)
            if found.differentiable:
                found.require_loss()
            lines += _report(found, cfg, where)
    return lines


def _named(name: str, config: str, overrides: Sequence[str]) -> tuple[str, DistillConfig]:
    """The key that a name means, and the configuration that holds it; a kind takes the place of the reward."""
    kinds = reward_kinds()
    if name not in {*ROLES, *kinds}:
        fix = nearest(name, [*ROLES, *kinds]) or f"choose from {', '.join([*ROLES, *kinds])}"
        raise UserError(f"no reward {name!r}", where="NAME", fix=fix)
    chosen = [f"reward.kind={name}"] if name in kinds else []
    cfg = load_config(DistillConfig, config, group="distill", overrides=[*overrides, *chosen])
    return "reward" if chosen else name, cfg


def _report(found: SelfTest, cfg: DistillConfig, device: torch.device) -> list[str]:
    size, scores = cfg.clip, found.scores
    named = {"score": scores.clip, **scores.parts}
    lines = [
        f"{found.where}: sound on two clips of {size.num_frames} frames, {size.width}x{size.height}, on {device}",
        *(f"  {name:<24}{'  '.join(f'{value:10.4f}' for value in values.tolist())}" for name, values in named.items()),
    ]
    if found.gradient is None:
        lines += ["  not differentiable: it drives the gate, and with method.policy the student"]
    else:
        norms = found.gradient[0][list(found.seen)]
        spread = f"least {norms.min():.3g}, mean {norms.mean():.3g}, greatest {norms.max():.3g}"
        lines += [f"  gradient reaches {len(norms)} of {size.num_frames} frames; its norm a frame: {spread}"]
    backward = "" if found.gradient is None else f", backward {found.backward_seconds:.3f} s"
    lines += [f"  forward {found.forward_seconds:.3f} s{backward}, two clips"]
    if device.type == "cuda":
        lines += [f"  peak memory {torch.cuda.max_memory_allocated(device) / GIB:.2f} GiB"]
    return lines
