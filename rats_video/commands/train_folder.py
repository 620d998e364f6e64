"""A `train` command: its settings, its output folder, and the record in it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Generic, TypedDict, TypeVar

from rats_video.commands.device import pick_device
from rats_video.commands.folders import claim_run, locked_output, refuse_changes
from rats_video.commands.pins import pin_models
from rats_video.commands.record import environment
from rats_video.config.fields import Config
from rats_video.config.load import load_config, load_seeded, write_resolved
from rats_video.files import RECORD, tidy, write_json
from rats_video.pretraining.resumable import changed_training, delete_checkpoints
from rats_video.training.run_folder import CONFIG

ConfigT = TypeVar("ConfigT", bound=Config)
Made = tuple[list[str], Mapping[str, object]]
"""Lines to show of what was trained, and what goes on record."""


class TrainOptions(TypedDict):
    """The options of every `train` command."""

    config: str
    overrides: Sequence[str]
    output: Path
    seed: int | None
    device: str
    resume: bool
    overwrite: bool


def load_pinned(model: type[ConfigT], group: str, options: TrainOptions, overrides: Sequence[str] = ()) -> ConfigT:
    """The configuration of a `train` command, its models on the hub at a commit; `overrides` come after the user's."""
    given = load_seeded(
        model, options["config"], group=group, overrides=[*options["overrides"], *overrides], seed=options["seed"]
    )
    return pin_models(given, options["output"] / CONFIG if options["resume"] else None)


class Training(Generic[ConfigT]):
    """One `train` command: its configuration, its device, and the time since it began.

    Args:
        model: class of its configuration.
        group: of its packaged configurations.
        options: as given.
    """

    def __init__(self, model: type[ConfigT], group: str, options: TrainOptions) -> None:
        self._group, self._options = group, options
        self.cfg = load_pinned(model, group, options)
        self.device, self._began = pick_device(options["device"]), time.monotonic()

    def run(self, make: Callable[[], Made]) -> list[str]:
        """Train and save into OUTPUT by `make`, unless that is done; OUTPUT/training.json, written last, tells.

        Returns:
            The lines to show.

        Raises:
            UserError: another process works there, or it holds something, or a run of another configuration.
        """
        output = self._options["output"]
        resume, overwrite = self._options["resume"], self._options["overwrite"]
        with locked_output(output):
            lines = [f"done before: {output}"]
            if not claim_training(self.cfg, output, self._group, resume=resume, overwrite=overwrite):
                made, content = make()
                seconds, settings = time.monotonic() - self._began, self.cfg.model_dump(mode="json")
                record = {"config": settings, "seed": settings["seed"], "seconds": round(seconds, 1)}
                write_json(output / RECORD, {**record, "environment": environment(self.device), **content})
                lines = [*made, f"{seconds:.0f} s: {output}"]
            delete_checkpoints(output / "checkpoints")
        return lines


def of_metrics(metrics: Mapping[str, float]) -> Made:
    """Lines to show, and the record, of a model that a few numbers describe."""
    rounded = {name: round(value, 4) for name, value in metrics.items()}
    return [f"{name}: {value:.4g}" for name, value in metrics.items()], {"metrics": rounded}


def claim_training(cfg: Config, output: Path, group: str, *, resume: bool, overwrite: bool) -> bool:
    """Make OUTPUT this training's, where nobody else works; returns True if it is finished already.

    Raises:
        UserError: it holds something, or a run of another configuration to go on with.
    """
    tidy(output)
    if claim_run(output, resume=resume, overwrite=overwrite):
        before = load_config(type(cfg), str((output / CONFIG).resolve()), group=group)
        refuse_changes(output, changed_training(before, cfg))
    write_resolved(cfg, output / CONFIG)
    return (output / RECORD).is_file()
