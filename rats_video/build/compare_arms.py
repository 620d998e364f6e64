"""The arms of a comparison: what each of them is, where it lies, what of it is done, and doing the rest."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from pydantic import BaseModel, ValidationError

from rats_video.assets import resolve_folder
from rats_video.backbones.base import PipelineBackbone
from rats_video.backbones.load import load_backbone
from rats_video.build.common import explain_memory
from rats_video.build.comparison import compare_files
from rats_video.build.compute import memory_advice
from rats_video.build.distill import build_roles, train_student
from rats_video.build.evaluate import REFERENCE, score_arms
from rats_video.build.finish import finish, is_finished
from rats_video.build.inference import in_turn, load_student
from rats_video.build.method import DECIDES, NOT_SCORED
from rats_video.build.real_data import pinned
from rats_video.build.reward import reward_folders
from rats_video.config.compare import CompareConfig, curve_steps, weights_key
from rats_video.config.compute import ComputeConfig
from rats_video.config.distill import DistillConfig
from rats_video.datasets.prompts import load_prompts
from rats_video.errors import UserError, first_line, warn
from rats_video.evaluation.compared import BASE, Cost
from rats_video.evaluation.judged import Judged
from rats_video.evaluation.stats import finite
from rats_video.evaluation.sweep import Arm, ArmScores
from rats_video.evaluation.tables import TEACHER, MetricValue
from rats_video.files import replacing, tidy, weights_digest, write_json
from rats_video.inference.sampler import SamplerSpec
from rats_video.reading import read_json, read_text
from rats_video.runtime import Runtime
from rats_video.training.checkpoint import load_student_weights
from rats_video.training.metrics import read_metrics
from rats_video.training.run_folder import RunFolder


class _Kept(BaseModel):
    """What is kept of an arm's scores: all but the features that its sets were measured from."""

    arm: str
    spec: SamplerSpec
    prompts: list[str]
    seconds: list[float]
    metrics: dict[str, list[float]]
    sets: dict[str, MetricValue]
    spreads: dict[str, dict[str, float]]
    reference: str


@dataclass(frozen=True)
class Entrant:
    """A student of one method and seed with its training, or the teacher or the base model without one.

    Args:
        method: its name in the table.
        seed: of its training; None of teacher and base.
        folder: its own: of a student a whole run as `distill` leaves it, in all cases `scores`.
        cfg: its training; None of teacher and base.
        specs: how it is sampled.
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
        """What its training cost."""
        return self.folder / "cost.json"


@dataclass(frozen=True)
class Look:
    """One way of sampling an entrant, as it was after `step` updates; None is at the end."""

    spec: SamplerSpec
    step: int | None = None

    def __str__(self) -> str:
        return f"{self.spec.nfe} NFE" + ("" if self.step is None else f" after {self.step} updates")


@dataclass(frozen=True)
class Study:
    """A whole comparison: who takes part, and who judges."""

    cfg: CompareConfig
    base: DistillConfig
    entrants: tuple[Entrant, ...]
    output: Path

    @staticmethod
    def of(cfg: CompareConfig, output: Path) -> Study:
        """Lay it out; everything that can be wrong with a configuration is found here.

        Raises:
            UserError: as `CompareConfig.arm` and `check_nfe`.
        """
        cfg.check_nfe()
        base, arms = pinned(cfg.base_config()), output / "arms"
        teacher = SamplerSpec(cfg.teacher_steps, base.shift, base.evaluation.guidance_scale)
        plain = tuple(SamplerSpec(nfe, base.shift) for nfe in cfg.nfe)
        entrants = [
            Entrant(TEACHER, None, arms / TEACHER, None, (teacher,)), Entrant(BASE, None, arms / BASE, None, plain)
        ]  # fmt: skip
        for seed in cfg.seeds:  # a whole seed of all methods is there before the next one begins
            for method in cfg.methods:
                arm = pinned(cfg.arm(method, seed, str(output / "teacher")))
                folder = arms / f"{method}-seed{seed}-{weights_key(arm)}"
                entrants.append(Entrant(method, seed, folder, arm, plain))
        return Study(cfg, base, tuple(entrants), output)

    @cached_property
    def prompts(self) -> list[str]:
        """Of the clips that are judged."""
        return in_turn(load_prompts(self.base.prompts).heldout, self.cfg.num_clips)

    @cached_property
    def _judges_key(self) -> dict[str, object]:
        """Everything that scores depend on besides who is judged and how it is sampled."""
        base = self.base
        folders = [resolve_folder(base.model, where="model"), *reward_folders(base.reward, where="reward")]
        if base.heldout_reward is not None:
            folders += reward_folders(base.heldout_reward, where="heldout_reward")
        judges = {"reward": base.reward, "heldout_reward": base.heldout_reward}
        without = NOT_SCORED | {"terms": {"__all__": {"reward": NOT_SCORED}}}
        return {
            **{key: judge and judge.model_dump(mode="json", exclude=without) for key, judge in judges.items()},
            "weights": weights_digest(folders, DECIDES),
            "clip": base.clip.model_dump(),
            "embedded_guidance": base.embedded_guidance,
            "dtype": base.compute.dtype,
            "prompts": self.prompts,
            "seed": self.cfg.clip_seed,
            "sets": base.evaluation.model_dump(mode="json", include={"features", "diversity"}),
        }

    def looks(self, entrant: Entrant) -> list[Look]:
        """All that is to be judged of an entrant: what it is at the end, then what it was on its way there."""
        if entrant.cfg is None:
            return [Look(spec) for spec in entrant.specs]
        on_the_way = SamplerSpec(self.cfg.curve_nfe, self.base.shift)
        ends = [Look(spec) for spec in dict.fromkeys((*entrant.specs, on_the_way))]
        return ends + [Look(on_the_way, step) for step in self.milestones(entrant)]

    def milestones(self, entrant: Entrant) -> list[int]:
        """Updates after which it is judged on its way; one that was trained before can only be where it was kept."""
        steps = [] if entrant.cfg is None else curve_steps(entrant.cfg, self.cfg.curve_points)
        if not is_trained(entrant):
            return steps
        return [step for step in steps if RunFolder(entrant.folder).milestone(step).is_dir()]

    def scores_file(self, entrant: Entrant, look: Look) -> Path:
        """Where the scores of a look lie, clip by clip; its name tells all they depend on."""
        spec = look.spec
        key = json.dumps([self._judges_key, spec.num_steps, spec.shift, spec.guidance_scale], sort_keys=True)
        step = "" if look.step is None else f"step{look.step}-"
        name = f"{step}nfe{spec.nfe}-{hashlib.sha256(key.encode()).hexdigest()[:12]}.json"
        return entrant.folder / "scores" / name

    def unscored(self, entrant: Entrant) -> list[Look]:
        """What of it is not judged yet."""
        return [look for look in self.looks(entrant) if not self.scores_file(entrant, look).is_file()]

    def unshown(self, entrant: Entrant) -> list[str]:
        """Prompts whose clips are to be laid beside the teacher's; only of the first student of each method."""
        if entrant.cfg is None or entrant.seed != self.cfg.seeds[0]:
            return []
        index = RunFolder(entrant.folder).comparison / "index.json"
        prompts = self.prompts[: self.base.comparison.num_videos]
        shown = [(row["prompt"], row["seed"]) for row in read_json(index)] if index.is_file() else []
        return [] if shown == [(prompt, self.cfg.clip_seed) for prompt in prompts] else prompts

    def is_done(self, entrant: Entrant) -> bool:
        """Whether it is trained, judged and shown."""
        return is_trained(entrant) and not self.unscored(entrant) and not self.unshown(entrant)

    def judged(self, entrant: Entrant) -> list[Judged]:
        """Its scores at the end, and cost; raises UserError if a file of them is damaged."""
        cost = None if entrant.cfg is None else Cost.model_validate_json(read_text(entrant.cost_file))
        found = [read_scores(self.scores_file(entrant, Look(spec))) for spec in entrant.specs]
        return [Judged(entrant.method, entrant.seed, scores, cost) for scores in found]

    def curve(self, entrant: Entrant) -> list[Judged]:
        """Its scores on its way and at the end, at the curve's NFE, each with its cost by then; none without training.

        Raises:
            UserError: a file of them is damaged.
        """
        if entrant.cfg is None:
            return []
        rows = read_metrics(RunFolder(entrant.folder).metrics)
        end = Cost.model_validate_json(read_text(entrant.cost_file))
        points = []
        for look in self.looks(entrant):
            if look.spec.nfe == self.cfg.curve_nfe:
                cost = end if look.step is None else cost_of(rows[: look.step], end.peak_bytes)
                scores = read_scores(self.scores_file(entrant, look))
                points.append(Judged(entrant.method, entrant.seed, scores, cost))
        return sorted(points, key=lambda point: point.cost.updates if point.cost else 0)


def is_trained(entrant: Entrant) -> bool:
    """Whether its student is finished, or it needs no training."""
    if entrant.cfg is None:
        return True
    run = RunFolder(entrant.folder)
    return run.config.is_file() and entrant.cost_file.is_file() and is_finished(entrant.cfg, run)


def train(entrant: Entrant, runtime: Runtime, milestones: Collection[int]) -> None:
    """Train its student, or go on where that was stopped; for who holds the folder's lock.

    It is kept after each of the `milestones` too.
    """
    assert entrant.cfg is not None
    cfg, run = entrant.cfg, RunFolder(entrant.folder)
    goes_on = run.config.is_file()
    is_cuda = runtime.device.type == "cuda"
    if is_cuda:
        torch.cuda.reset_peak_memory_stats(runtime.device)
    with explain_memory(lambda: memory_advice(cfg)):
        student = train_student(cfg, run, runtime, resume=goes_on, overwrite=not goes_on, milestones=milestones)
    assert student is not None
    cost = cost_of(read_metrics(run.metrics), torch.cuda.max_memory_allocated(runtime.device) if is_cuda else None)
    write_json(entrant.cost_file, cost.model_dump())
    finish(cfg, run, student)


def cost_of(rows: Sequence[Mapping[str, float]], peak_bytes: int | None) -> Cost:
    """What the updates of a log have cost."""
    return Cost(
        updates=len(rows),
        evaluations=sum(row["evaluations"] for row in rows),
        seconds=sum(row["seconds"] + row.get("saved_seconds", 0.0) for row in rows),
        peak_bytes=peak_bytes,
    )


def judge(study: Study, entrant: Entrant, runtime: Runtime) -> None:
    """Score what of it is not scored yet, and keep that clip by clip; for who holds the folder's lock."""
    missing = study.unscored(entrant)
    tidy(entrant.folder / "scores")
    for step in dict.fromkeys(look.step for look in missing):
        looks = [look for look in missing if look.step == step]
        backbone = _backbone(study, entrant, looks, runtime)
        arms = [Arm(entrant.method, backbone, look.spec) for look in looks]
        with explain_memory(lambda: f"set evaluation.batch_size below {study.base.evaluation.batch_size}"):
            found = score_arms(
                study.base, arms, study.prompts, study.base.clip.spec,
                seed=study.cfg.clip_seed, reference=entrant.folder / REFERENCE,  # here alone nobody else writes
            )  # fmt: skip
        for look, scores in zip(looks, found, strict=True):
            for name, values in scores.metrics.items():
                if bad := len(values) - len(finite(values)):
                    raise UserError(f"{name} of {bad} clips at {look} is no finite number", where=entrant.title)
            with replacing(study.scores_file(entrant, look), "scores") as partial:
                kept = _Kept.model_validate(scores, from_attributes=True)
                partial.write_text(kept.model_dump_json(), encoding="utf-8")


def show(study: Study, entrant: Entrant, prompts: Sequence[str], runtime: Runtime) -> None:
    """Lay its clips of some prompts beside the teacher's and the base model's; for who holds the folder's lock."""
    loaded, cfg = load_student(entrant.folder, runtime.device), study.cfg
    evaluation = study.base.evaluation.model_copy(update={"teacher_steps": cfg.teacher_steps})
    compare_files(
        study.base.model_copy(update={"evaluation": evaluation}), loaded, prompts,
        loaded.spec(cfg.curve_nfe), runtime, seed=cfg.clip_seed, output=RunFolder(entrant.folder).comparison,
    )  # fmt: skip


def _backbone(study: Study, entrant: Entrant, looks: Sequence[Look], runtime: Runtime) -> PipelineBackbone:
    """What these looks, which are all at the same step, look at."""
    step = looks[0].step
    if entrant.cfg is not None and step is None:
        loaded = load_student(entrant.folder, runtime.device)
        for look in looks:
            loaded.spec(look.spec.nfe)  # warns of one that it was not trained for
        return loaded.student
    base, dtype = study.base, getattr(torch, study.base.compute.dtype)
    backbone = load_backbone(resolve_folder(base.model, where="model"), runtime.device, dtype)
    backbone.fps, backbone.embedded_guidance = base.clip.fps, base.embedded_guidance
    if entrant.cfg is None or step is None:
        return backbone
    student, _ = build_roles(
        entrant.cfg.model_copy(update={"compute": ComputeConfig(dtype=base.compute.dtype)}), backbone
    )
    load_student_weights(RunFolder(entrant.folder).milestone(step), student.weights)
    return student


def read_scores(path: Path) -> ArmScores:
    """The scores that `judge` kept; raises UserError if they are damaged, and removes them: they can be made again."""
    try:
        return ArmScores(**dict(_Kept.model_validate_json(path.read_bytes())))
    except ValidationError as error:
        path.unlink()
        warn(f"damaged, and removed: {first_line(error)}", where=str(path))
        raise UserError("scores were damaged", where=str(path), fix="the same command makes them again") from error
