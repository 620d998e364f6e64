"""How often the teacher is asked: a share that falls as the gate lets go of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rats_video.training.batches import ask_with
from rats_video.training.settings import RunSettings
from rats_video.types import PromptBatch

GATE = "gate/weight"
_KEY, _DECAY = "gate_average", 0.9


class AskedShare:
    """`teacher.asked` times the gate's running average, at least `teacher.asked_least`, where it follows the gate.

    Shaping that weighs little teaches little, so its teacher's rollouts are better spent on fresh prompts. Shaping of
    an update weighs the inverse of that update's share: its mean over draws stays the published one.

    Args:
        cfg: of the run.
        state: of the checkpoint that the run goes on from.
    """

    def __init__(self, cfg: RunSettings, state: Mapping[str, Any]) -> None:
        self._cfg, self._average = cfg, float(state.get(_KEY, 1.0))
        self._index, self._share = -1, cfg.teacher.asked

    @property
    def state(self) -> dict[str, Any]:
        """What a resumed run needs."""
        return {_KEY: self._average} if self._follows else {}

    def draw(self, batch: PromptBatch) -> PromptBatch:
        """The global batch with the clips that are asked about: the same for all updates that see it."""
        if not self._follows:
            return batch
        if batch.index != self._index:
            teacher = self._cfg.teacher
            self._index, self._share = batch.index, max(teacher.asked_least, teacher.asked * self._average)
        return ask_with(batch, self._cfg, self._share)

    def learned(self, row: Mapping[str, float], batch: PromptBatch) -> dict[str, float]:
        """Follow the gate of an update's row, which all processes have; returns what its calls really cost, to log.

        An update that asked about no clip says nothing of the gate.
        """
        if self._follows and GATE in row:
            self._average += (1 - _DECAY) * (row[GATE] - self._average)
        asked = len(batch.asked_rows) / len(batch.prompts)
        return {"evaluations": self._cfg.evaluations(batch.num_steps, asked)}

    @property
    def _follows(self) -> bool:
        return self._cfg.teacher.asked_follows is not None
