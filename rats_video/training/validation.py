"""The student's clips while it trains: fixed held-out prompts, fixed noise, every few steps."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rats_video.errors import UserError, warn
from rats_video.evaluation.sweep import EvaluatedModel, score_arm
from rats_video.files import remove, replacing, write_json
from rats_video.inference.video import slugify, write_mp4
from rats_video.methods.base import LogRow
from rats_video.reading import DAMAGED, read_json
from rats_video.runtime import ALONE, Runtime
from rats_video.sound import Sound
from rats_video.timing import phase
from rats_video.training.callbacks import Callback
from rats_video.training.checkpoint import list_checkpoints, steps_done
from rats_video.training.guard import GuardClips
from rats_video.training.run_folder import RunFolder
from rats_video.training.settings import ValidationConfig
from rats_video.training.validation_page import write_page, write_sheet
from rats_video.types import Backbone

SCORES, SHEET, INDEX = "scores.json", "sheet.png", "index.json"
KeptClip = tuple[Tensor, Sound | None]
"""Bytes `[T, 3, H, W]`, and the sound."""


@dataclass(frozen=True)
class ValidationEvaluation:
    """The saved clips of one step.

    Args:
        step: of the training.
        sheet: all clips in one PNG.
        clips: `prompt`, `file` (null where its pixels are not finite), `scores` (null likewise).
    """

    step: int
    sheet: Path
    clips: Sequence[Mapping[str, Any]]

    @property
    def means(self) -> dict[str, float]:
        """Mean of each score over the clips that have it."""
        names = dict.fromkeys(name for clip in self.clips for name in clip["scores"])
        found = {name: [s for c in self.clips if (s := c["scores"].get(name)) is not None] for name in names}
        return {name: math.fsum(scores) / len(scores) for name, scores in found.items() if scores}


class ValidationClips(Callback):
    """Samples and scores clips on all processes, each its share, and writes them beside the training.

    `RUN/validation/step-NNNNNN/` has an mp4 a prompt, with its sound if it has one, `sheet.png` and `scores.json`;
    `RUN/validation/index.json` lists all steps, `index.html` shows them side by side. A thread of the main process
    encodes and writes them; only a checkpoint and the next clips wait for it. A failed write is a warning.

    Args:
        cfg: how often.
        clips: what is sampled and measured; the teacher's part of it is not read.
        student: makes the clips.
        run: the folder.
        steps: of the whole training; there are clips after the last one too.
        runtime: the processes; all of them have this callback.
    """

    def __init__(
        self,
        cfg: ValidationConfig,
        clips: GuardClips,
        student: Backbone,
        run: RunFolder,
        steps: int,
        runtime: Runtime = ALONE,
    ) -> None:
        self._cfg, self._clips, self._student = cfg, clips, student
        self._folder, self._steps, self._runtime = run.validation, steps, runtime
        self._thread = ThreadPoolExecutor(1, "validation")
        self._pending: Future[None] | None = None
        self._seen: set[int] = set()
        self._news: list[ValidationEvaluation] = []

    def on_start(self, state: Mapping[str, Any]) -> None:
        """Delete the clips of steps that will be done again: all of them if there is no checkpoint."""
        self.on_checkpoint()
        start = state["step"]
        if self._runtime.is_main:
            for path in list_checkpoints(self._folder):
                if steps_done(path) > start or not start:
                    remove(path)
        self._seen = set(self._runtime.broadcast([steps_done(path) for path in list_checkpoints(self._folder)]))
        self._news = [evaluation for evaluation in self._news if evaluation.step in self._seen]
        if self._seen and self._runtime.is_main:
            self._write_index()
        self.on_step(start)

    def on_step(self, step: int, row: LogRow | None = None) -> None:  # noqa: ARG002  # others read it
        """Make clips, if they are due."""
        if step not in self._seen and (step % self._cfg.every == 0 or step == self._steps):
            with phase("validation"):
                self._evaluate(step)

    def on_checkpoint(self) -> None:
        """Wait until all clips are written."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def on_end(self) -> None:
        """Wait until all clips are written, and stop the thread."""
        self._thread.shutdown()

    def news(self) -> list[ValidationEvaluation]:
        """The evaluations written since the last call."""
        found, self._news = self._news, []
        return found

    def _evaluate(self, step: int) -> None:
        clips, runtime, keep = self._clips, self._runtime, _Kept()
        scored = score_arm(
            EvaluatedModel("student", self._student, clips.spec), clips.prompts, clips.clip, [keep, *clips.measures],
            latent_measures=clips.latent_measures, seed=clips.seed, batch_size=clips.batch_size,
            share=runtime.equal_share(len(clips.prompts)),
        )  # fmt: skip
        found = runtime.of_groups(runtime.gather_to_main((keep.clips, scored.metrics)))
        self._seen.add(step)
        if runtime.is_main:
            self.on_checkpoint()
            self._pending = self._thread.submit(self._write, step, found)

    # ---------------------------------------------------------------------------------------------- the thread's work

    def _write(self, step: int, found: Sequence[tuple[list[KeptClip | None], dict[str, list[float]]]]) -> None:
        prompts, folder = self._clips.prompts, self._folder / f"step-{step:06d}"
        made = [clip for share, _ in found for clip in share][: len(prompts)]
        scores = {name: [value for _, by in found for value in by[name]][: len(prompts)] for name in found[0][1]}
        has_sound = any(clip is not None and clip[1] is not None for clip in made)
        clips: list[dict[str, Any]] = [
            {
                "prompt": prompt,
                "file": None if made[i] is None else f"{i:02d}-{slugify(prompt)}.mp4",
                "scores": {name: finite_or_none(values[i]) for name, values in scores.items()},
                **({"sound": True} if has_sound else {}),
            }
            for i, prompt in enumerate(prompts)
        ]
        try:
            with replacing(folder, "validation clips") as aside:
                aside.mkdir()
                for clip, kept in zip(clips, made, strict=True):
                    if kept is None:
                        warn(f"not finite after step {step}: {clip['prompt']}", where="validation")
                    else:
                        video, sound = kept
                        write_mp4(video.float() / 255, aside / clip["file"], fps=self._clips.clip.fps, sound=sound)
                write_sheet(aside / SHEET, [None if clip is None else clip[0] for clip in made])
                write_json(aside / SCORES, clips)
            self._write_index()
        except UserError as error:
            warn(f"{error}; the training goes on", where="validation")
        else:
            self._news.append(ValidationEvaluation(step, folder / SHEET, clips))

    def _write_index(self) -> None:
        rows = read_evaluations(self._folder)
        write_json(self._folder / INDEX, rows)
        write_page(self._folder / "index.html", rows)


def read_evaluations(folder: Path) -> list[dict[str, Any]]:
    """All steps in `RUN/validation`, as its index lists them: `step`, `sheet` and `clips`, with files relative to it.

    A step with a damaged record is skipped with a warning.
    """
    rows = []
    for path in list_checkpoints(folder):
        try:
            clips = read_json(path / SCORES)
            for clip in clips:
                clip["file"] = clip["file"] and f"{path.name}/{clip['file']}"
            rows.append({"step": steps_done(path), "sheet": f"{path.name}/{SHEET}", "clips": clips})
        except DAMAGED as error:
            warn(f"unreadable: {error}", where=str(path))
    return rows


class _Kept:
    """Keeps the clips that measures are given, and measures nothing; None where pixels or sound are not finite."""

    hears = True

    def __init__(self) -> None:
        self.clips: list[KeptClip | None] = []

    def __call__(self, videos: Tensor, prompts: Sequence[str], sound: Sound | None = None) -> dict[str, Tensor]:  # noqa: ARG002
        """Keep a batch."""
        for row, video in enumerate(videos):
            pixels, heard = to_bytes(video), None if sound is None else sound.one(row)
            is_finite = pixels is not None and (heard is None or bool(heard.waves.isfinite().all()))
            self.clips.append((pixels, heard) if pixels is not None and is_finite else None)
        return {}


def to_bytes(video: Tensor) -> Tensor | None:
    """A clip `[T, 3, H, W]` in [0, 1] as bytes in host memory; None where it is not finite."""
    if not bool(video.isfinite().all()):
        return None
    return video.detach().clamp(0, 1).mul(255).round().to(torch.uint8).cpu()


def finite_or_none(value: float) -> float | None:
    """JSON has no NaN."""
    return value if math.isfinite(value) else None
