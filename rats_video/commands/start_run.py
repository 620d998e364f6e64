"""Claims a run's folder, or continues the run in it."""

from __future__ import annotations

from rats_video.commands.folders import claim_run, refuse_changes
from rats_video.config.load import load_config, write_resolved
from rats_video.distillation.resume import changed_keys
from rats_video.distillation.settings import DistillConfig
from rats_video.training.run_folder import RunFolder


def prepare_run(cfg: DistillConfig, run: RunFolder, *, resume: bool, overwrite: bool) -> bool:
    """Claim the run's folder, or check that the run in it may be continued with this configuration.

    What a killed process left half-written in it is removed.

    Returns:
        Whether a run of exactly this configuration goes on.

    Raises:
        UserError: the folder holds something and neither flag is given, or `resume` meets another configuration.
    """
    run.tidy()
    before = None
    if claim_run(run.root, resume=resume, overwrite=overwrite):
        run.check_entries()
        before = load_config(DistillConfig, str(run.config.resolve()), group="distill")
        refuse_changes(run.root, changed_keys(before, cfg))
    write_resolved(cfg, run.config)
    return before == cfg
