"""Configuration of `rats-video compare`, and the distillation of each arm."""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import Field, StringConstraints, model_validator

from rats_video.config.explain import nearest
from rats_video.config.fields import Config, NumClips, PositiveFloat, PositiveInt, Seed, SolverSteps
from rats_video.config.load import load_config
from rats_video.distillation.resume import deciding
from rats_video.distillation.settings import DistillConfig
from rats_video.errors import UserError
from rats_video.files import json_digest
from rats_video.methods.teacher import FrozenTeacherConfig
from rats_video.optim import late_restart

Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][\w.-]*$", max_length=64)]
RESERVED = {"teacher", "base"}
SHARED = ("model", "clip", "shift", "prompts", "embedded_guidance")
"""Keys of a distillation that all arms have from the base: without them their clips are not comparable."""


class CompareConfig(Config):
    """Root of `compare`: the same teacher, prompts, noise and budget for every method."""

    base: str = Field(description="distill config, by name or path: model, prompts, clip, and the judges of all arms")
    overrides: tuple[str, ...] = Field(
        (), description="`a.b=value` each, of every arm's distill config, the base's too"
    )
    methods: dict[Name, str | tuple[str, ...]] = Field(
        min_length=1, description="by name: a distill config, or a list of overrides of the base"
    )
    trained_nfe: tuple[SolverSteps, ...] = Field(
        (3, 4, 5, 8), min_length=1, description="NFE that every student is trained for, in turns"
    )
    nfe: tuple[SolverSteps, ...] = Field((3, 4, 5, 8), min_length=1, description="NFE that it is judged at")
    seeds: tuple[Seed, ...] = Field((0, 1, 2), min_length=1, description="one student a method and seed")
    budget: PositiveFloat = Field(
        description="network evaluations of a student's training, with gradient three each, its teacher's included"
    )
    num_clips: NumClips = Field(256, description="held-out clips that every student is judged on at each NFE")
    clip_seed: Seed = Field(1, description="of the noise of those clips, the same for all")
    curve_points: PositiveInt = Field(4, le=100, description="times that each is judged on its way, the end included")
    curve_nfe: SolverSteps = Field(4, description="NFE that it is judged at then")
    teacher_steps: SolverSteps = Field(50, description="solver steps of the teacher that is judged beside them")

    @model_validator(mode="after")
    def _says_each_once(self) -> Self:
        for key in ("nfe", "seeds", "trained_nfe"):
            values = getattr(self, key)
            if len(set(values)) < len(values):
                raise ValueError(f"{key} names one twice: {list(values)}")
        if taken := RESERVED & self.methods.keys():
            raise ValueError(f"{min(taken)} is in every comparison and no name of a method")
        return self

    def only(self, names: tuple[str, ...]) -> CompareConfig:
        """The same with these methods alone; raises UserError for one that it has not."""
        for name in names:
            if name not in self.methods:
                known = list(self.methods)
                fix = f"{nearest(name, known)} available: {', '.join(known)}".lstrip()
                raise UserError(f"no method {name!r}", where="--methods", fix=fix)
        return self.model_copy(update={"methods": {name: self.methods[name] for name in names}})

    def base_config(self) -> DistillConfig:
        """The distillation whose model, prompts and rewards all arms share."""
        return load_config(DistillConfig, self.base, group="distill", overrides=self.overrides)

    def arm(self, method: str, seed: int, teacher_cache: str) -> DistillConfig:
        """The distillation of a method from a seed, as long as the budget allows; only its last student counts.

        Raises:
            UserError: its config does not load, differs from the base where all must be alike, cannot train at an NFE,
                or the budget is below one update.
        """
        given = self.methods[method]
        name, own = (given, ()) if isinstance(given, str) else (self.base, given)
        forced = (f"seed={seed}", "guard=null", f"student.num_steps={list(self.trained_nfe)}")
        try:
            cfg = load_config(DistillConfig, name, group="distill", overrides=[*self.overrides, *own, *forced])
        except UserError as error:
            raise UserError(error.what, where=f"methods.{method}: {error.where}", fix=error.fix) from error
        self._check(method, cfg)
        steps = updates_within(self.budget, cfg)
        if steps < 1:
            raise UserError(
                f"{self.budget:,.0f} network evaluations are less than one update of {method}, which takes "
                f"{mean_evaluations(cfg):,.0f}", where="budget", fix="give more with --budget",
            )  # fmt: skip
        if late := late_restart(cfg, steps):
            raise UserError(late, where=f"methods.{method}", fix="the budget sets the steps")
        changes: dict[str, object] = {"training": cfg.training.model_copy(update={"steps": steps})}
        if isinstance(cfg.teacher, FrozenTeacherConfig) and not cfg.method.uses_trajectory:
            changes["teacher"] = cfg.teacher.model_copy(update={"cache": teacher_cache})
        return cfg.model_copy(update=changes)

    def _check(self, method: str, cfg: DistillConfig) -> None:
        base = self.base_config()
        if differ := [key for key in SHARED if getattr(cfg, key) != getattr(base, key)]:
            raise UserError(
                f"{', '.join(differ)} differ from those of {self.base}", where=f"methods.{method}",
                fix="arms can only be compared on the same clips: change them for all by `base` or `overrides`",
            )  # fmt: skip
        if cfg.method.uses_teacher and cfg.teacher.num_steps < max(self.trained_nfe):
            raise UserError(
                f"{max(self.trained_nfe)} is above the {cfg.teacher.num_steps} steps of {method}'s teacher",
                where="trained_nfe", fix="train for fewer, or give the teacher more steps",
            )  # fmt: skip

    def check_nfe(self) -> None:
        """Raise UserError for an NFE at which the teacher itself has no more steps."""
        if max(self.nfe) > self.teacher_steps:
            raise UserError(
                f"{max(self.nfe)} is above the teacher's {self.teacher_steps} steps", where="nfe",
                fix="judge at fewer, or set teacher_steps",
            )  # fmt: skip


def mean_evaluations(cfg: DistillConfig) -> float:
    """Network evaluations of an update, over the NFE that take turns."""
    return sum(map(cfg.evaluations, cfg.student.num_steps)) / len(cfg.student.num_steps)


def updates_within(budget: float, cfg: DistillConfig) -> int:
    """Updates that a budget of network evaluations allows."""
    return int(budget // mean_evaluations(cfg))


def curve_steps(cfg: DistillConfig, points: int) -> list[int]:
    """Updates after which a snapshot of an arm's student is saved and scored, without the end."""
    steps = cfg.training.steps
    return sorted({steps * point // points for point in range(1, points)} - {0})


def weights_key(cfg: DistillConfig) -> str:
    """Digest of the settings that decide a run's weights: runs that share it end with the same student."""
    return json_digest(deciding(cfg))[:12]
