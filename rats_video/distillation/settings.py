"""Settings of `rats-video distill` and `rats-video run`."""

from __future__ import annotations

from typing import Any, Self

from pydantic import Field, model_validator

from rats_video.backbones.compute import ComputeConfig, FullWeightsConfig, ParallelConfig, WeightsConfig
from rats_video.backbones.kinds import AUTO, BackboneConfig
from rats_video.config.fields import ClipConfig, Config, NumClips, PositiveFloat, Seed
from rats_video.datasets.prompts.settings import PromptsConfig, ShapesPromptsConfig
from rats_video.diffusion.flow import FRESH_SHARES
from rats_video.evaluation.settings import EvaluationConfig
from rats_video.inference.sampler import SamplerSpec
from rats_video.inference.style import BaseLoraConfig
from rats_video.methods.base import WITH_GRADIENT, StepsConfig
from rats_video.methods.kinds import MethodConfig
from rats_video.methods.teacher import FrozenTeacherConfig, TeacherConfig
from rats_video.optim import late_restart
from rats_video.rewards.latent import LatentRewardConfig
from rats_video.rewards.reward import RewardConfig
from rats_video.training.guard import GuardConfig
from rats_video.training.settings import TrackingConfig, TrainingConfig, ValidationConfig


class StudentConfig(StepsConfig):
    """The few-step sampler that is trained."""

    weights: WeightsConfig = Field(FullWeightsConfig(), description="what of the denoiser is trained")
    init: str | None = Field(
        None,
        description="an earlier student to start from: a run, its student, a LoRA file, or a hub id; null = the base",
    )


class ComparisonConfig(Config):
    """`export comparison`."""

    num_videos: NumClips = Field(6, description="held-out prompts that are shown")


class DistillConfig(Config):
    """Root of `distill` and `run`."""

    seed: Seed = 0
    model: str = Field(
        description="pipeline folder as diffusers saves it, an embedded one's name, or USER/NAME@REVISION on the hub"
    )
    architecture: str | None = Field(
        None, description="for `plan`, while the model folder is not there: a preset, e.g. wan21_1b"
    )
    backbone: BackboneConfig = Field(
        AUTO,
        exclude_if=lambda backbone: backbone == AUTO,
        description="the family that loads `model`, if none here knows it",
    )
    base_loras: tuple[BaseLoraConfig, ...] = Field(
        (), description="LoRAs under teacher and student, such as a style of yours: they are distilled with the model"
    )
    clip: ClipConfig = ClipConfig()
    shift: PositiveFloat = Field(3.0, description="sigma grid shift, of teacher and student")
    embedded_guidance: PositiveFloat = Field(
        6.0, description="scale told to a model that takes its guidance as an input (HunyuanVideo); others ignore it"
    )
    prompts: PromptsConfig = Field(ShapesPromptsConfig(), description="what clips are made of")
    reward: RewardConfig = Field(description="what the student is raised on")
    heldout_reward: RewardConfig | None = Field(None, description="never in the loss; reported beside the reward")
    method: MethodConfig = Field(description="what the student is trained on; its kind is rats unless named")
    teacher: TeacherConfig = Field(description="the many-step sampler that the student follows")
    student: StudentConfig = StudentConfig()
    guard: GuardConfig | None = GuardConfig()
    training: TrainingConfig
    compute: ComputeConfig = ComputeConfig()
    parallel: ParallelConfig = ParallelConfig()
    validation: ValidationConfig | None = None
    tracking: TrackingConfig = TrackingConfig()
    comparison: ComparisonConfig = ComparisonConfig()
    evaluation: EvaluationConfig = EvaluationConfig()

    @model_validator(mode="before")
    @classmethod
    def _method_is_rats_unless_named(cls, tree: Any) -> Any:
        if isinstance(tree, dict) and isinstance(tree.get("method"), dict):
            return tree | {"method": {"kind": "rats"} | tree["method"]}
        return tree

    @model_validator(mode="after")
    def _fits_the_method(self) -> Self:
        if self.guard is not None and self.guard.on_alarm == "shape" and not self.method.can_strengthen_shaping:
            raise ValueError(f"guard.on_alarm=shape strengthens the shaping of rats; {self.method.kind} has none")
        if self.student.sampler == "renoise" and (needs := self.method.needs_euler):
            raise ValueError(f"{self.method.kind} {needs}: set student.sampler=euler, or take method.kind=dmd2")
        if self.student.sampler == "cps" and (needs := self.method.needs_other_noise(FRESH_SHARES["cps"])):
            raise ValueError(f"{self.method.kind} {needs}: set student.sampler=euler")
        if min(self.student.num_steps) < self.method.least_steps:
            raise ValueError(f"{self.method.kind} learns from the steps before the last: student.num_steps=1 has none")
        if self.method.uses_trajectory and isinstance(self.teacher, FrozenTeacherConfig) and self.teacher.cache:
            raise ValueError(f"{self.method.kind} uses all of the teacher's path, unstored: set teacher.cache=null")
        if late := late_restart(self.method, self.training.steps, "method."):
            raise ValueError(late)
        return self

    @model_validator(mode="after")
    def _asks_the_teacher_as_it_can(self) -> Self:
        if self.teacher.asked < 1:
            if needs := self.method.needs_every_teacher:
                raise ValueError(f"{needs} of {self.method.kind} needs the teacher of every clip: set teacher.asked=1")
            if self.teacher.asked_by == "clip" and (self.parallel.shard or self.parallel.context > 1):
                raise ValueError("processes that share a teacher ask it together: set teacher.asked_by=update")
        if self.teacher.asked_follows and self.method.kind != "rats":
            raise ValueError(f"{self.method.kind} has no gate to follow: set teacher.asked_follows=null")
        if self.teacher.asked_follows and self.teacher.asked_least > self.teacher.asked:
            raise ValueError("teacher.asked_least is above teacher.asked, the share it falls from")
        return self

    @model_validator(mode="after")
    def _latents_stay_at_home(self) -> Self:
        if self.parallel.reward_ranks and isinstance(self.reward, LatentRewardConfig):
            raise ValueError("a latent reward is small and computes beside the student: set parallel.reward_ranks=0")
        if self.parallel.reward_ranks and self.method.further_rewards:
            raise ValueError("a reward rank has one reward, not method.video_reward too: set parallel.reward_ranks=0")
        return self

    @property
    def teacher_spec(self) -> SamplerSpec:
        """The teacher's sampler, as it teaches: an EMA teacher's at the start."""
        teacher = self.teacher
        return SamplerSpec(
            teacher.num_steps, self.shift, teacher.guidance_scale, teacher.negative_prompt, teacher.guidance_scale_2,
            teacher.further_guidance,
        )  # fmt: skip

    @property
    def judged_teacher(self) -> SamplerSpec:
        """The teacher's sampler, as it is evaluated and shown."""
        options = self.evaluation
        return SamplerSpec(
            options.teacher_steps, self.shift, options.guidance_scale, self.teacher.negative_prompt,
            options.guidance_scale_2, self.teacher.further_guidance,
        )  # fmt: skip

    def evaluations(self, num_steps: int, asked: float | None = None) -> float:
        """Network evaluations of an update at that many student steps, over all clips and processes.

        One call on one clip is one evaluation; with gradient it counts three, since backward is twice the work. A
        teacher's rollout that is found again in `teacher.cache` counts as well; one that serves several updates counts
        as its share of each. `asked` is the share of clips whose teacher was called; None takes `teacher.asked`, which
        is the mean, or with `teacher.asked_follows` the most.
        """
        share = self.teacher.asked if asked is None else asked
        teacher = self.teacher.num_steps * self.teacher.calls_per_step * share / self.teacher.reuse
        a_clip = self.method.evaluations_of(self.student, num_steps, teacher, self.teacher.calls_per_step)
        real = self.method.real_data
        num_real = 0 if real is None or real.weight == 0 else real.batch_size or self.training.batch_size
        return self.training.batch_size * a_clip + WITH_GRADIENT * num_real
