"""The guard against reward hacking: scores that are in no loss watch the student and pick the best one."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from pydantic import Field

from rats_video.config.fields import Config, NonNegativeFloat, NumClips, PositiveInt
from rats_video.errors import warn
from rats_video.evaluation.pictures import DISPLACEMENT, PSNR
from rats_video.evaluation.sound import CLIPPED, LOUDNESS, MONITORS, SILENCE
from rats_video.evaluation.stats import Estimate, finite, paired_difference
from rats_video.evaluation.sweep import EvaluatedModel, Measure, score_arm
from rats_video.files import remove, write_json
from rats_video.inference.sampler import SamplerSpec
from rats_video.methods.base import Method
from rats_video.runtime import ALONE, Runtime
from rats_video.training.checkpoint import find_damage, list_checkpoints, save_weights, steps_done
from rats_video.training.run_folder import RunFolder
from rats_video.types import ClipSpec


class GuardConfig(Config):
    """Looks at the student on fixed held-out prompts every few steps; nothing it sees enters a loss.

    The best student is the one with the highest held-out reward among those whose motion, saturation and sound are
    still like the teacher's (without a held-out reward: with the highest reward).
    """

    every: PositiveInt = Field(50, description="steps; also before the first and after the last one")
    num_clips: NumClips = Field(32, description="held-out prompts looked at, one clip each, the same every time")
    choose: Literal["best", "last"] = Field("best", description="which student the run ends with")
    on_alarm: Literal["warn", "stop", "shape"] = Field(
        "warn", description="reward up and guard down: say so, stop the run, or also double the weight on shaping"
    )
    motion_loss: NonNegativeFloat = Field(0.3, le=1, description="share of the teacher's motion that may be lost")
    saturation_gain: NonNegativeFloat = Field(0.3, description="how far saturation may exceed the teacher's, relative")
    loudness_change: NonNegativeFloat = Field(
        6.0, description="LU that sound may be louder or softer than the teacher's"
    )
    silence_gain: NonNegativeFloat = Field(0.25, description="how far its share of silence may exceed the teacher's")
    clipping_gain: NonNegativeFloat = Field(0.01, description="how far its share of clipped samples may exceed theirs")


REWARD, HELDOUT, MOTION, SATURATION = "reward", "heldout_reward", "dynamic_degree", "saturation"
IMITATED = "imitated_reward"  # of pixels, where the trained one scores latents
STRONGEST_SHAPING = 8.0  # times its configured weight

Scores = Mapping[str, Sequence[float]]
"""Named scores, one a clip."""


@dataclass(frozen=True)
class GuardEvaluation:
    """The student after `step` steps: scores of the guard's clips, drift of the weights, and alarms.

    A lost one can no longer be the best: its weights are gone.
    """

    step: int
    scores: Scores
    drift: float
    alarms: tuple[str, ...] = ()
    lost: bool = False

    def mean(self, name: str) -> float:
        """Mean score over the clips that could be scored."""
        return finite_mean(self.scores[name])


@dataclass(frozen=True)
class GuardClips:
    """The clips that the guard samples, and their measures.

    Args:
        prompts: one a clip.
        clip: their size.
        spec: sampler of the student.
        teacher: sampler of the teacher.
        measures: `reward`; where they count also `heldout_reward` and its parts, as `heldout_reward/part`,
            `imitated_reward`, `dynamic_degree`, `saturation` and the monitors of sound.
        latent_measures: those that take latents.
        seed: of the noise; not the evaluation's, since nothing may be chosen on the clips of the evaluation.
        batch_size: clips at a time.
    """

    prompts: Sequence[str]
    clip: ClipSpec
    spec: SamplerSpec
    teacher: SamplerSpec
    measures: Sequence[Measure]
    seed: int
    batch_size: int
    latent_measures: Sequence[Measure] = ()


class Guard:
    """Evaluates the student, saves the best one so far in `RUN/best`, and raises alarms.

    Its record is in `RUN/guard.json` and in each checkpoint, so that a resumed run decides like an uninterrupted one.

    Args:
        cfg: how often, and what counts as wrong.
        clips: what is sampled and measured.
        run: the folder of the record and the best student.
        runtime: the processes, which evaluate together, each a share of the clips.
    """

    def __init__(self, cfg: GuardConfig, clips: GuardClips, run: RunFolder, runtime: Runtime = ALONE) -> None:
        self.cfg, self._clips, self._run, self._runtime = cfg, clips, run, runtime
        self.evaluations: list[GuardEvaluation] = []
        self._teacher: Scores = {}

    @property
    def best(self) -> GuardEvaluation | None:
        """The best student so far: the highest held-out reward among those without a broken monitor."""
        return max(self._sound(), key=lambda evaluation: evaluation.mean(self._judge), default=None)

    @property
    def stops(self) -> bool:
        """True if the run must end."""
        return self.cfg.on_alarm == "stop" and any(evaluation.alarms for evaluation in self.evaluations)

    @property
    def shaping(self) -> float:
        """Factor of the weight on shaping."""
        alarms = sum(bool(evaluation.alarms) for evaluation in self.evaluations)
        return min(2.0**alarms, STRONGEST_SHAPING) if self.cfg.on_alarm == "shape" else 1.0

    @property
    def record(self) -> dict[str, Any]:
        """All evaluations, as JSON."""
        best = self.best
        return {
            "best": best and best.step,
            "teacher": self._teacher,
            "looks": [asdict(evaluation) for evaluation in self.evaluations],
        }

    def load_state(self, record: Mapping[str, Any]) -> None:
        """Load the record of a checkpoint; `RUN/guard.json` is written to agree with it.

        A best student that was damaged meanwhile counts as lost; if it is the student of this step, that is evaluated
        again.
        """
        self._teacher = record["teacher"]
        self.evaluations = [GuardEvaluation(**{**row, "alarms": tuple(row["alarms"])}) for row in record["looks"]]
        first = self.best
        while (best := self.best) and (damage := self._runtime.broadcast(self._damage(best))):
            if best is first:
                warn(f"the best student so far is lost: {damage}", where=str(self._run.best_student(best.step)))
            self.evaluations = [
                replace(evaluation, lost=True) if evaluation is best else evaluation for evaluation in self.evaluations
            ]
        if self._runtime.is_main:
            write_json(self._run.guard, self.record)

    def _damage(self, evaluation: GuardEvaluation) -> str | None:
        return find_damage(self._run.best_student(evaluation.step)) if self._runtime.is_main else None

    def is_due(self, step: int, last: int) -> bool:
        """True if the student must be evaluated after `step` of `last` steps."""
        seen = any(evaluation.step == step and not evaluation.lost for evaluation in self.evaluations)
        return not seen and (step % self.cfg.every == 0 or step == last)

    def evaluate(self, method: Method, step: int, drift: float) -> None:
        """Evaluate the student after `step` steps; all processes call it together."""
        if not self._teacher:
            self._teacher = self._score(EvaluatedModel("teacher", method.teacher.backbone, self._clips.teacher))
        self.evaluations = [evaluation for evaluation in self.evaluations if evaluation.step != step]
        seen = GuardEvaluation(step, self._score(EvaluatedModel("student", method.student, self._clips.spec)), drift)
        self.evaluations.append(replace(seen, alarms=tuple(self._alarms(seen))))
        if self.best is self.evaluations[-1]:
            save_weights(self._run.best, step, method.student.weights, self._runtime)
        if self._runtime.is_main:
            drop_former(self._run)
            write_json(self._run.guard, self.record)
            self._report()

    # ------------------------------------------------------------------------------------------------------- judging

    @property
    def _judge(self) -> str:
        return next(name for name in (HELDOUT, IMITATED, REWARD) if name in self._teacher)

    def _sound(self) -> list[GuardEvaluation]:
        return [evaluation for evaluation in self.evaluations if not evaluation.lost and not self._broken(evaluation)]

    def _broken(self, evaluation: GuardEvaluation) -> list[str]:
        """Monitors out of bounds around the teacher's values."""
        cfg, broken = self.cfg, []
        for name in (MOTION, SATURATION, LOUDNESS, SILENCE, CLIPPED):
            if name not in self._teacher:
                continue
            mean, guide = evaluation.mean(name), finite_mean(self._teacher[name])
            least, most = {
                MOTION: ((1 - cfg.motion_loss) * guide, math.inf),
                SATURATION: (-math.inf, (1 + cfg.saturation_gain) * guide),
                LOUDNESS: (guide - cfg.loudness_change, guide + cfg.loudness_change),
                SILENCE: (-math.inf, guide + cfg.silence_gain),
                CLIPPED: (-math.inf, guide + cfg.clipping_gain),
            }[name]
            if not least <= mean <= most:
                broken.append(f"{name.replace('_', ' ')} is {mean:.3g}, the teacher's {guide:.3g}")
        return broken

    def _alarms(self, evaluation: GuardEvaluation) -> list[str]:
        """A monitor that broke since the start, or a clear fall of a held-out score while the trained one rose.

        The parts of a held-out reward count too: a sum may rise while one of them falls. So does the pixel reward that
        a trained latent reward imitates.
        """
        alarms = self._broken(evaluation) if self.evaluations and not self._broken(self.evaluations[0]) else []
        best = self.best
        if best is None:
            return alarms
        rose = _change(evaluation.scores[REWARD], best.scores[REWARD])
        for name in (name for name in self._teacher if name.startswith((HELDOUT, IMITATED))):
            fell = _change(evaluation.scores[name], best.scores[name])
            if rose.mean > rose.ci95 and fell.mean < -fell.ci95:
                alarms.append(
                    f"since step {best.step} the reward rose by {rose.mean:.3g} +- {rose.ci95:.2g} and the"
                    f" {name.replace('_', ' ')} fell by {-fell.mean:.3g} +- {fell.ci95:.2g}"
                )
        return alarms

    def _score(self, arm: EvaluatedModel) -> Scores:
        clips, runtime = self._clips, self._runtime
        count = len(clips.prompts)
        scored = score_arm(
            arm, clips.prompts, clips.clip, clips.measures, latent_measures=clips.latent_measures,
            seed=clips.seed, batch_size=clips.batch_size, share=runtime.equal_share(count),
        )  # fmt: skip
        found = runtime.of_groups(runtime.gather(scored.metrics))
        return {name: [value for share in found for value in share[name]][:count] for name in found[0]}

    # ------------------------------------------------------------------------------------------------------ reporting

    def _report(self) -> None:
        evaluation, best, teacher = self.evaluations[-1], self.best, self._teacher
        shown = [
            f"{name.replace('_', ' ')} {evaluation.mean(name):.3g} ({finite_mean(teacher[name]):.3g})"
            for name in (REWARD, IMITATED, HELDOUT, MOTION, SATURATION, PSNR, DISPLACEMENT, *MONITORS)
            if name in teacher
        ]
        line = f"guard at step {evaluation.step} (teacher): {', '.join(shown)}, drift {evaluation.drift:.3g}"
        print(f"{line}; best so far" if best is evaluation else line, file=sys.stderr)  # noqa: T201
        for alarm in evaluation.alarms:
            kept = f"; the best student so far is kept in {self._run.best_student(best.step)}" if best else ""
            warn(f"reward hacking? {alarm}{kept}", where="guard")


def drop_former(run: RunFolder) -> None:
    """Delete former best students, except those that a checkpoint records as the best."""
    checkpoints = list_checkpoints(run.checkpoints)
    oldest = steps_done(checkpoints[0]) if checkpoints else 0
    for path in [path for path in list_checkpoints(run.best) if steps_done(path) <= oldest][:-1]:
        remove(path)


def finite_mean(values: Sequence[float]) -> float:
    """Mean of the values that are finite; minus infinity where none is, which is never the best."""
    numbers = finite(values)
    return math.fsum(numbers) / len(numbers) if numbers else -math.inf


def _change(after: Sequence[float], before: Sequence[float]) -> Estimate:
    """Mean change of clips that could be scored both times, with its interval."""
    pairs = [pair for pair in zip(after, before, strict=True) if all(map(math.isfinite, pair))]
    return paired_difference(*zip(*pairs, strict=True)) if pairs else Estimate(0.0, math.inf, 0)
