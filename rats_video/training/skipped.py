"""Counts the clips that a run skips because their reward is not finite, and stops it if they are too many."""

from __future__ import annotations

from collections.abc import Mapping

from rats_video.errors import UserError
from rats_video.methods.finite import ASKED, SKIPPED
from rats_video.runtime import Runtime
from rats_video.training.faults import StepFault
from rats_video.training.metrics import MetricsFile
from rats_video.training.settings import TrainingConfig


class SkippedClips:
    """Counts them over a run.

    Args:
        cfg: clips a step, and how many may be skipped in all.
        before: clips skipped before this run was resumed.
    """

    def __init__(self, cfg: TrainingConfig, before: int) -> None:
        self._batch_size, self._limit, self._total = cfg.batch_size, cfg.max_skipped, before

    @staticmethod
    def since(cfg: TrainingConfig, metrics: MetricsFile | None, runtime: Runtime) -> SkippedClips:
        """Those of a run that goes on, by its log, which one process has; all call it together."""
        return SkippedClips(cfg, int(runtime.broadcast(metrics.total(SKIPPED) if metrics else 0.0)))

    def count(self, row: Mapping[str, float], step: int) -> dict[str, float]:
        """A step's row, a mean over all clips, with the share of skipped clips turned into their number.

        A skipped clip adds 0 to the means, so that micro-batches and processes agree, and so does one whose teacher is
        not asked to the means that need it. The logged rewards, gate and shaping are means over the other clips; where
        the teacher is asked about none, what needs it is not logged.

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
        kept = 1 - clips / self._batch_size
        asked = row.get(ASKED, kept)
        shares = {"reward/teacher": asked, "reward/gap": asked, "gate/": asked, "shaping/": asked, "reward/": kept}
        means: dict[str, float] = {}
        for name, value in row.items():
            share = next((share for prefix, share in shares.items() if name.startswith(prefix)), 1.0)
            if share > 0:
                means[name] = value / share
        return means | {SKIPPED: clips}
