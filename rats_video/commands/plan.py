"""`plan`: the needs of a run, and the cheapest settings that make it fit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from rats_video.config.load import load_config
from rats_video.distillation.settings import DistillConfig
from rats_video.errors import UserError
from rats_video.files import write_json
from rats_video.planning.devices import find_device
from rats_video.planning.estimate import Plan
from rats_video.planning.memory import GIB
from rats_video.planning.memory_options import MemoryOption, cheapest, useful_options, without_conflicts
from rats_video.planning.report import advice_lines, plan_lines
from rats_video.planning.runs import PlanBuilder
from rats_video.rewards.custom import CustomRewardConfig
from rats_video.rewards.reward import single_rewards


def run_plan(
    *,
    config: str,
    overrides: Sequence[str],
    gpu_memory: float | None,
    gpus: int,
    device_name: str,
    utilisation: float | None,
    output: Path | None,
) -> list[str]:
    """The plan as lines of text, and as JSON in `output`.

    Raises:
        UserError: the configuration is wrong, or the memory or the utilisation is no positive number.
    """
    if gpu_memory is not None and not 0 < gpu_memory < float("inf"):
        raise UserError(f"must be above 0, got {gpu_memory:g}", where="--gpu-memory", fix="in GiB, like 80")
    if utilisation is not None and not 0 < utilisation <= 1:
        raise UserError(f"must be above 0 and at most 1, got {utilisation:g}", where="--utilisation")
    device = find_device(device_name)
    device = replace(device, utilisation=utilisation or device.utilisation)

    def configured(options: Sequence[MemoryOption]) -> DistillConfig:
        settings = [option.setting for option in options]
        return load_config(DistillConfig, config, group="distill", overrides=[*overrides, *settings])

    cfg = configured([])
    runs = PlanBuilder(cfg, device, gpus)
    plan = runs.plan(cfg, device)
    lines, record = plan_lines(plan), plan.as_json()
    for one in single_rewards(cfg.reward, "reward").values():
        if isinstance(one, CustomRewardConfig):
            lines.append(f"  What the custom reward {one.target} needs is not counted: its code is not run.")
    budget = gpu_memory or device.memory
    if budget:

        def plan_with(options: Sequence[MemoryOption]) -> Plan:
            return runs.plan(configured(without_conflicts(options, cfg)), device)

        useful = useful_options(cfg, gpus, can_window=runs.can_window, can_be_small=runs.can_be_small(cfg))
        found, best = _search(useful, plan_with, budget)
        options = None if found is None else without_conflicts(found, cfg)
        lines += ["", *advice_lines(plan, budget, options, best)]
        record["gpu_memory_gib"], record["fits"] = budget, options == []
        record["levers"] = None if options is None else [option.setting for option in options]
        record["needed_bytes_with_levers"] = round(best.memory.needed)
    if output is not None:
        write_json(output, record)
    return lines


def _search(
    options: list[MemoryOption], plan_with: Callable[[Sequence[MemoryOption]], Plan], budget: float
) -> tuple[list[MemoryOption] | None, Plan]:
    found = cheapest(options, lambda chosen: plan_with(chosen).memory.needed <= budget * GIB)
    return found, plan_with(options if found is None else found)
