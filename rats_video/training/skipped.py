"""How many clips a run leaves out because their reward is not a finite number, and when that is too many."""

from __future__ import annotations

from collections.abc import Mapping

from rats_video.errors import UserError
from rats_video.methods.finite import SKIPPED
from rats_video.training.faults import StepFault
from rats_video.training.settings import TrainingConfig


class SkippedClips:
    """Counts them over a run.

    Args:
        cfg: clips a step, and how many may be left out in all.
        before: how many were, before this run was resumed.
    """

    def __init__(self, cfg: TrainingConfig, before: int) -> None:
        self._batch_size, self._limit, self._total = cfg.batch_size, cfg.max_skipped, before

    def count(self, row: Mapping[str, float], step: int) -> dict[str, float]:
        """A step's row, averaged over all clips, with the share left out turned into their number.

        A clip that is left out adds 0 to what is averaged, so that parts and processes agree; what is logged of the
        rewards, the gate and the shaping is the mean over the others.

        Raises:
            StepFault: no clip of the step has a finite score; they count as one step, not as clips.
            UserError: more were left out in all than may be.
        """
        clips, fix = round(row[SKIPPED] * self._batch_size), "mend the reward, or use another"
        if clips == self._batch_size:
            raise StepFault("no clip has a finite score", where="reward", fix=fix)
        self._total += clips
        if self._total > self._limit:
            what = f"{self._total} clips had no finite score by step {step + 1}, training.max_skipped is {self._limit}"
            raise UserError(f"{what}; earlier checkpoints are kept", where="reward", fix=fix)
        masked = ("reward/", "gate/", "shaping/")
        kept = 1 - clips / self._batch_size
        return {name: value / kept if name.startswith(masked) else value for name, value in row.items()} | {
            SKIPPED: clips
        }
