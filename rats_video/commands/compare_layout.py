"""The arms of a comparison: their settings, folders and progress."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from pydantic import BaseModel, ValidationError

from rats_video.assets import resolve_folder
from rats_video.commands.compare_config import CompareConfig, curve_steps, weights_key
from rats_video.commands.finish import is_finished
from rats_video.commands.pins import pin_models
from rats_video.commands.prompts import cycle
from rats_video.datasets.prompts.split import load_prompts
from rats_video.distillation.real_data import with_data_digest
from rats_video.distillation.settings import DistillConfig
from rats_video.distillation.teacher_identity import DECIDES, NOT_SCORED
from rats_video.errors import UserError, first_line, warn
from rats_video.evaluation.compare_result import BASE, Cost
from rats_video.evaluation.compare_stats import StudentScores
from rats_video.evaluation.sweep import ArmScores
from rats_video.evaluation.tables import TEACHER, MetricValue
from rats_video.files import json_digest, weights_digest
from rats_video.inference.sampler import SamplerSpec
from rats_video.reading import read_json, read_text
from rats_video.rewards.reward import reward_folders
from rats_video.training.metrics import read_metrics
from rats_video.training.run_folder import RunFolder


class KeptScores(BaseModel):
    """An arm's saved scores: all but the features behind the metrics of sets."""

    arm: str
    spec: SamplerSpec
    prompts: list[str]
    seconds: list[float]
    metrics: dict[str, list[float]]
    sets: dict[str, MetricValue]
    spreads: dict[str, dict[str, float]]
    reference: str


@dataclass(frozen=True)
class Arm:
    """A student of one method and seed with its training, or the teacher or the base model without one.

    Args:
        method: its name in the table.
        seed: of its training; None of teacher and base.
        folder: its own, with `scores`; of a student also a whole run as `distill` leaves it.
        cfg: its training; None of teacher and base.
        specs: its samplers.
    """

    method: str
    seed: int | None
    folder: Path
    cfg: DistillConfig | None
    specs: tuple[SamplerSpec, ...]

    @property
    def title(self) -> str:
        """E.g. "rats, seed 0"."""
        return self.method if self.seed is None else f"{self.method}, seed {self.seed}"

    @property
    def cost_file(self) -> Path:
        """The file of its training's cost."""
        return self.folder / "cost.json"


@dataclass(frozen=True)
class ArmEvaluation:
    """A sampler and the step of the student it samples (None: the final one)."""

    spec: SamplerSpec
    step: int | None = None

    def __str__(self) -> str:
        return f"{self.spec.nfe} NFE" + ("" if self.step is None else f" after {self.step} updates")


@dataclass(frozen=True)
class CompareLayout:
    """A whole comparison: its arms, and the base that scores them all."""

    cfg: CompareConfig
    base: DistillConfig
    arms: tuple[Arm, ...]
    output: Path

    @staticmethod
    def of(cfg: CompareConfig, output: Path) -> CompareLayout:
        """The layout of a configuration, all of whose mistakes are found here.

        Raises:
            UserError: as `CompareConfig.arm` and `check_nfe`.
        """
        cfg.check_nfe()
        base, root = with_data_digest(pin_models(cfg.base_config())), output / "arms"
        teacher = replace(base.judged_teacher, num_steps=cfg.teacher_steps)
        plain = tuple(SamplerSpec(nfe, base.shift) for nfe in cfg.nfe)
        arms = [
            Arm(TEACHER, None, root / TEACHER, None, (teacher,)), Arm(BASE, None, root / BASE, None, plain)
        ]  # fmt: skip
        for seed in cfg.seeds:  # all methods of one seed come before the next seed
            for method in cfg.methods:
                arm = with_data_digest(pin_models(cfg.arm(method, seed, str(output / "teacher"))))
                folder = root / f"{method}-seed{seed}-{weights_key(arm)}"
                own = tuple(replace(spec, sampler=arm.student.sampler) for spec in plain)
                arms.append(Arm(method, seed, folder, arm, own))
        return CompareLayout(cfg, base, tuple(arms), output)

    @cached_property
    def prompts(self) -> list[str]:
        """The prompts of the scored clips."""
        return cycle(load_prompts(self.base.prompts).heldout, self.cfg.num_clips)

    @cached_property
    def _rewards_key(self) -> dict[str, object]:
        """Everything that scores depend on besides the model and its sampler."""
        base = self.base
        folders = [resolve_folder(base.model, where="model"), *reward_folders(base.reward, where="reward")]
        if base.heldout_reward is not None:
            folders += reward_folders(base.heldout_reward, where="heldout_reward")
        rewards = {"reward": base.reward, "heldout_reward": base.heldout_reward}
        without = NOT_SCORED | {"terms": {"__all__": {"reward": NOT_SCORED}}}
        return {
            **{key: reward and reward.model_dump(mode="json", exclude=without) for key, reward in rewards.items()},
            "weights": weights_digest(folders, DECIDES),
            "clip": base.clip.model_dump(),
            "embedded_guidance": base.embedded_guidance,
            "dtype": base.compute.dtype,
            "prompts": self.prompts,
            "seed": self.cfg.clip_seed,
            "sets": base.evaluation.model_dump(mode="json", include={"features", "diversity"}),
        }

    def evaluations(self, arm: Arm) -> list[ArmEvaluation]:
        """All evaluations of an arm: first of the final student, then of its snapshots."""
        if arm.cfg is None:
            return [ArmEvaluation(spec) for spec in arm.specs]
        midway = SamplerSpec(self.cfg.curve_nfe, self.base.shift, sampler=arm.cfg.student.sampler)
        ends = [ArmEvaluation(spec) for spec in dict.fromkeys((*arm.specs, midway))]
        return ends + [ArmEvaluation(midway, step) for step in self.milestones(arm)]

    def milestones(self, arm: Arm) -> list[int]:
        """Steps of the snapshots that are scored; of a student that is trained already, only those that were saved."""
        steps = [] if arm.cfg is None else curve_steps(arm.cfg, self.cfg.curve_points)
        if not is_trained(arm):
            return steps
        return [step for step in steps if RunFolder(arm.folder).milestone(step).is_dir()]

    def scores_file(self, arm: Arm, evaluation: ArmEvaluation) -> Path:
        """The file of an evaluation's scores by clip; its name has a digest of all they depend on."""
        spec = evaluation.spec
        rare = [
            spec.guidance_scale_2,
            None if spec.further is None else spec.further.model_dump(mode="json"),
            None if spec.sampler == "euler" else spec.sampler,
        ]
        known = [value for value in rare if value is not None]  # older scores stay valid
        key = json_digest([self._rewards_key, spec.num_steps, spec.shift, spec.guidance_scale, *known])
        step = "" if evaluation.step is None else f"step{evaluation.step}-"
        name = f"{step}nfe{spec.nfe}-{key[:12]}.json"
        return arm.folder / "scores" / name

    def unscored(self, arm: Arm) -> list[ArmEvaluation]:
        """The evaluations of an arm that have no scores yet."""
        return [evaluation for evaluation in self.evaluations(arm) if not self.scores_file(arm, evaluation).is_file()]

    def unshown(self, arm: Arm) -> list[str]:
        """Prompts whose clips are not yet written beside the teacher's; only for the first seed of each method."""
        if arm.cfg is None or arm.seed != self.cfg.seeds[0]:
            return []
        index = RunFolder(arm.folder).comparison / "index.json"
        prompts = self.prompts[: self.base.comparison.num_videos]
        shown = [(row["prompt"], row["seed"]) for row in read_json(index)] if index.is_file() else []
        return [] if shown == [(prompt, self.cfg.clip_seed) for prompt in prompts] else prompts

    def is_done(self, arm: Arm) -> bool:
        """True if an arm is trained, scored and shown."""
        return is_trained(arm) and not self.unscored(arm) and not self.unshown(arm)

    def scores(self, arm: Arm) -> list[StudentScores]:
        """An arm's final scores, and its cost; raises UserError if a file of scores is damaged."""
        cost = None if arm.cfg is None else Cost.model_validate_json(read_text(arm.cost_file))
        found = [read_scores(self.scores_file(arm, ArmEvaluation(spec))) for spec in arm.specs]
        return [StudentScores(arm.method, arm.seed, scores, cost) for scores in found]

    def curve(self, arm: Arm) -> list[StudentScores]:
        """Scores of an arm's snapshots and final student at the curve's NFE, each with its cost by then.

        Raises:
            UserError: a file of them is damaged.
        """
        if arm.cfg is None:
            return []
        rows = read_metrics(RunFolder(arm.folder).metrics)
        end = Cost.model_validate_json(read_text(arm.cost_file))
        points = []
        for evaluation in self.evaluations(arm):
            if evaluation.spec.nfe == self.cfg.curve_nfe:
                cost = end if evaluation.step is None else cost_of(rows[: evaluation.step], end.peak_bytes)
                scores = read_scores(self.scores_file(arm, evaluation))
                points.append(StudentScores(arm.method, arm.seed, scores, cost))
        return sorted(points, key=lambda point: point.cost.updates if point.cost else 0)


def is_trained(arm: Arm) -> bool:
    """True if an arm's student is finished, or it needs no training."""
    if arm.cfg is None:
        return True
    run = RunFolder(arm.folder)
    return run.config.is_file() and arm.cost_file.is_file() and is_finished(arm.cfg, run)


def cost_of(rows: Sequence[Mapping[str, float]], peak_bytes: int | None) -> Cost:
    """The cost of the updates of a log."""
    return Cost(
        updates=len(rows),
        evaluations=sum(row["evaluations"] for row in rows),
        seconds=sum(row["seconds"] + row.get("saved_seconds", 0.0) for row in rows),
        peak_bytes=peak_bytes,
    )


def read_scores(path: Path) -> ArmScores:
    """Saved scores; damaged ones are removed, since they can be made again, and raise UserError."""
    try:
        return ArmScores(**dict(KeptScores.model_validate_json(path.read_bytes())))
    except ValidationError as error:
        path.unlink()
        warn(f"damaged, and removed: {first_line(error)}", where=str(path))
        raise UserError("scores were damaged", where=str(path), fix="the same command makes them again") from error
