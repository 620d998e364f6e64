"""The start of a run: its folder is claimed or continued, and what it computes with is written down."""

from __future__ import annotations

import sys

from rats_video.backbones.base import PipelineBackbone
from rats_video.commands.folders import claim_run, refuse_changes
from rats_video.commands.record import environment, record_session
from rats_video.config.load import load_config, write_resolved
from rats_video.distillation.compute import describe
from rats_video.distillation.guard import SEED_OFFSET
from rats_video.distillation.resume import changed_keys
from rats_video.distillation.settings import DistillConfig
from rats_video.runtime import Runtime
from rats_video.training.run_folder import RunFolder


def prepare_run(cfg: DistillConfig, run: RunFolder, *, resume: bool, overwrite: bool) -> bool:
    """Claim the run's folder, or check that the run in it may be continued with this configuration.

    Files that a killed process left half-written are removed.

    Returns:
        True if it continues a run of exactly this configuration.

    Raises:
        UserError: the folder holds something and neither flag is given, or `resume` meets another configuration.
    """
    run.tidy()
    before = None
    if claim_run(run.root, resume=resume, overwrite=overwrite):
        run.check_entries()
        before = load_config(DistillConfig, str(run.config.resolve()), group="distill")
        changed = changed_keys(before, cfg)
        refuse_changes(run.root, changed, _how_to_prolong(before, run) if changed == ["training.steps"] else "")
    write_resolved(cfg, run.config)
    return before == cfg


def _how_to_prolong(before: DistillConfig, run: RunFolder) -> str:
    steps, optimizer = before.training.steps, before.training.optimizer
    restarts = ", ".join(map(str, (*optimizer.restarts, steps)))
    return (
        f"the rate decays to zero at step {steps}: to go on from there with a rate that starts anew, add "
        f"--set training.optimizer.restarts=[{restarts}]; or start another run with --set student.init={run.root}"
    )


def record_start(cfg: DistillConfig, run: RunFolder, student: PipelineBackbone, runtime: Runtime) -> None:
    """Record and print the environment of the run."""
    world = runtime.trainers + runtime.reward_ranks
    in_force = describe(cfg, student) | ({"processes": str(world)} if world > 1 else {})
    record_session(run.environment, {**environment(runtime.device), "seeds": _seeds(cfg), **in_force})
    shown = "; ".join(f"{key} {value}" for key, value in in_force.items())
    print(f"distill on {runtime.device}: {shown}", file=sys.stderr)  # noqa: T201


def _seeds(cfg: DistillConfig) -> dict[str, int]:
    return {"training": cfg.seed} | ({} if cfg.guard is None else {"guard": cfg.seed + SEED_OFFSET})
