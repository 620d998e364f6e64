"""Counts the clips that a run skips because their reward is not finite, and stops it if they are too many."""

from __future__ import annotations

from collections.abc import Mapping

from rats_video.errors import UserError
from rats_video.methods.finite import SKIPPED
from rats_video.training.faults import StepFault
from rats_video.training.settings import TrainingConfig


class SkippedClips:
    """Counts them over a run.

    Args:
        cfg: clips a step, and how many may be skipped in all.
        before: clips skipped before this run was resumed.
    """

    def __init__(self, cfg: TrainingConfig, before: int) -> None:
        self._batch_size, self._limit, self._total = cfg.batch_size, cfg.max_skipped, before

    def count(self, row: Mapping[str, float], step: int) -> dict[str, float]:
        """A step's row, a mean over all clips, with the share of skipped clips turned into their number.

        A skipped clip adds 0 to the means, so that micro-batches and processes agree. The logged rewards, gate and
        shaping are means over the other clips.

        Raises:
            StepFault: no clip of the step has a finite score; they count as one step, not as clips.
            UserError: more clips were skipped in all than allowed.
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
