"""Configuration of `rats-video distill` and `rats-video run`."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from rats_video.config.compute import ComputeConfig, FullWeights, ParallelConfig, Weights
from rats_video.config.faults import FaultsConfig
from rats_video.config.guard import GuardConfig
from rats_video.config.reward import LatentRewardConfig, RewardConfig
from rats_video.config.schema import (
    ClipConfig,
    Config,
    NonNegativeFloat,
    NonNegativeInt,
    NumClips,
    OptimizerConfig,
    PositiveFloat,
    PositiveInt,
    Seed,
    SolverSteps,
)
from rats_video.errors import UserError


class ShapesPrompts(Config):
    """Captions of the synthetic shapes, with their fixed split."""

    kind: Literal["shapes"] = "shapes"


class FilePrompts(Config):
    """Lists as docs/prompts.md describes them: a packaged name (`video-train`, `video-heldout`) or a path."""

    kind: Literal["file"]
    train: str = Field(description="prompts to train on")
    heldout: str | None = Field(None, description="prompts for evaluation, none of them in the training file")
    heldout_share: float | None = Field(
        None, gt=0, lt=1, description="instead: share of `train` kept for evaluation, each prompt by its own hash"
    )

    @model_validator(mode="after")
    def _is_split_one_way(self) -> Self:
        if (self.heldout is None) == (self.heldout_share is None):
            raise ValueError("give either `heldout`, a file, or `heldout_share`")
        return self


class PreparedPrompts(Config):
    """Captions of clips that `prepare` has stored, split as they are; `compute.cache_text` takes their text as well."""

    kind: Literal["prepared"]
    path: str = Field(description="folder of the cache")


Prompts = Annotated[ShapesPrompts | FilePrompts | PreparedPrompts, Field(discriminator="kind")]


class SigmoidGate(Config):
    """Shaping weight `floor + (1 - floor) * sigmoid((R_teacher - R_student) / tau)` (RATS, gate)."""

    kind: Literal["sigmoid"]
    tau: PositiveFloat = Field(0.15, description="reward difference that moves the weight from 0.5 to 0.73")
    level: Literal["frame", "clip"] = Field("frame", description="one weight a latent frame, or one a clip")
    floor: float = Field(0.0, ge=0, le=1, description="shaping that always remains; 0 is the paper's gate")
    part: str | None = Field(
        None, description="part of the reward that drives the gate, e.g. a term of weight 0; null = the score itself"
    )


class ConstantGate(Config):
    """The same shaping weight whatever the rewards say."""

    kind: Literal["constant"]
    weight: float = Field(1.0, ge=0, le=1)


Gate = Annotated[SigmoidGate | ConstantGate, Field(discriminator="kind")]


class ShapingConfig(Config):
    """How student and teacher latents are compared at the horizons."""

    motion_weight: NonNegativeFloat = Field(0.5, description="weight of the motion term beside the appearance term")
    horizon_weights: tuple[NonNegativeFloat, ...] | None = Field(
        None, description="one weight a student step, first to last; null weighs all alike"
    )


class PolicyConfig(Config):
    """Noisy rollouts of the student, judged against one another (Flow-GRPO, arXiv 2505.05470): needs no gradient.

    All steps but the last, which draws no noise, learn from it, whatever `student.grad_steps`.
    """

    samples: NumClips = Field(
        4, ge=2, description="rollouts a prompt and update, all from the noise of its other rollouts"
    )
    noise: float = Field(0.3, gt=0, le=1, description="share of the noise that each step but the last draws anew")
    normalize: bool = Field(default=True, description="measure rewards in standard deviations of their group")


class RealDataConfig(Config):
    """Real clips, prepared by `rats-video prepare`, that the student's velocity is kept close to."""

    path: str = Field(description="the cache; its training clips of the run's size are used")
    weight: NonNegativeFloat = Field(0.1, description="of the term in the loss; 0 leaves it out")
    batch_size: NumClips | None = Field(
        None, description="real clips an update, over all processes; null = training.batch_size"
    )
    prompt_dropout: float = Field(0.0, ge=0, le=1, description="share of clips with the empty prompt for their own")
    digest: str | None = Field(None, description="of the cache's clips; the run writes it down")


class MethodConfig(Config):
    """Loss = -reward_weight * R_student + alpha * gate * shaping (+ real_data.weight * real_data)."""

    reward_weight: NonNegativeFloat = 1.0
    alpha: NonNegativeFloat = 1.0
    gate: Gate
    shaping: ShapingConfig = ShapingConfig()
    drift_weight: NonNegativeFloat = Field(
        0.0, description="pull of the weights towards where they started: half this times the squared distance"
    )
    reward_margin: NonNegativeFloat | None = Field(
        None, description="cap the student's reward at the teacher's plus this; null leaves it uncapped, as published"
    )
    policy: PolicyConfig | None = Field(
        None, description="raise the reward by a policy gradient, as one without gradient needs; null = the direct one"
    )
    real_data: RealDataConfig | None = Field(None, description="flow matching on real clips beside it; null = none")

    @property
    def uses_gradient(self) -> bool:
        """Whether the reward's own gradient is in the loss."""
        return self.reward_weight > 0 and self.policy is None


class FrozenTeacher(Config):
    """The base model, sampled with many steps."""

    kind: Literal["frozen"]
    num_steps: SolverSteps = Field(48, description="solver steps; a multiple of the student's, so that horizons nest")
    guidance_scale: PositiveFloat = 3.0
    reuse: PositiveInt = Field(1, description="student updates served by one teacher rollout")
    cache: str | None = Field(None, description="folder where rollouts are stored and found again by later runs")


class EmaTeacher(Config):
    """The running average of the student's weights, sampled with many steps (as published)."""

    kind: Literal["ema"]
    decay: float = Field(0.99, ge=0, lt=1)
    num_steps: SolverSteps = 48
    guidance_scale: PositiveFloat = Field(1.0, description="at the start")
    guidance_end: PositiveFloat = Field(1.0, description="at guidance_fade_steps: the student absorbs guidance itself")
    guidance_fade_steps: NonNegativeInt = 0
    reuse: PositiveInt = 1


Teacher = Annotated[FrozenTeacher | EmaTeacher, Field(discriminator="kind")]


class StudentConfig(Config):
    """The few-step sampler that is trained."""

    num_steps: tuple[SolverSteps, ...] = Field((4,), min_length=1, description="NFE trained for; several take turns")
    grad_steps: PositiveInt | tuple[NonNegativeInt, ...] | None = Field(
        None, description="how many of the last steps carry gradient, or which (0 is the first); null = all"
    )
    weights: Weights = FullWeights()

    @model_validator(mode="after")
    def _every_nfe_learns(self) -> Self:
        for num_steps in self.num_steps:
            if isinstance(self.grad_steps, tuple) and not self.gradient_steps(num_steps):
                raise ValueError(
                    f"no step of {num_steps} (0 to {num_steps - 1}) is in grad_steps {list(self.grad_steps)}"
                )
        return self

    def gradient_steps(self, num_steps: int) -> tuple[int, ...]:
        """Which of `num_steps` solver steps carry gradient."""
        match self.grad_steps:
            case None:
                return tuple(range(num_steps))
            case int(last):
                return tuple(range(max(0, num_steps - last), num_steps))
            case chosen:
                return tuple(step for step in chosen if step < num_steps)


class TrainingConfig(Config):
    """The optimisation."""

    steps: PositiveInt = 150
    batch_size: NumClips = Field(8, description="clips an update, over all processes")
    micro_batch_size: PositiveInt | None = Field(
        None, description="clips a process works on at a time; gradients add up, memory does not; null = all of its own"
    )
    optimizer: OptimizerConfig
    checkpoint_every: PositiveInt = Field(50, description="steps")
    max_skipped: NonNegativeInt = Field(
        16, description="clips whose reward is not a finite number that a run may leave out before it stops"
    )
    faults: FaultsConfig = FaultsConfig()
    keep_checkpoints: PositiveInt = Field(2, description="how many are kept, newest first")

    def parts(self, clips: int) -> int:
        """In how many parts a process works on its `clips` of an update.

        Raises:
            UserError: they would not be equal.
        """
        size = min(self.micro_batch_size or clips, clips)
        if clips % size:
            raise UserError(
                f"{size} does not divide the {clips} clips of a process", where="training.micro_batch_size",
                fix="use 1 or another divisor",
            )  # fmt: skip
        return clips // size


class ComparisonConfig(Config):
    """`export comparison`."""

    num_videos: NumClips = 6


class EvaluationConfig(Config):
    """`evaluate`."""

    nfe: tuple[SolverSteps, ...] = (3, 4, 5, 8)
    num_clips: NumClips = 64
    batch_size: NumClips = 32
    teacher_steps: SolverSteps = 50
    guidance_scale: PositiveFloat = 3.0


class DistillConfig(Config):
    """Root of `distill` and `run`."""

    seed: Seed = 0
    model: str = Field(description="pipeline folder as diffusers saves it, or the name of an embedded one")
    architecture: str | None = Field(
        None, description="for `plan`, while the model folder is not there: a preset, e.g. wan21_1b"
    )
    clip: ClipConfig = ClipConfig()
    shift: PositiveFloat = Field(3.0, description="sigma grid shift, of teacher and student")
    embedded_guidance: PositiveFloat = Field(
        6.0, description="scale told to a model that takes its guidance as an input (HunyuanVideo); others ignore it"
    )
    prompts: Prompts = ShapesPrompts()
    reward: RewardConfig
    heldout_reward: RewardConfig | None = Field(None, description="never in the loss; reported beside the reward")
    method: MethodConfig
    teacher: Teacher
    student: StudentConfig = StudentConfig()
    guard: GuardConfig | None = GuardConfig()
    training: TrainingConfig
    compute: ComputeConfig = ComputeConfig()
    parallel: ParallelConfig = ParallelConfig()
    comparison: ComparisonConfig = ComparisonConfig()
    evaluation: EvaluationConfig = EvaluationConfig()

    @model_validator(mode="after")
    def _latents_stay_at_home(self) -> Self:
        if self.parallel.reward_ranks and isinstance(self.reward, LatentRewardConfig):
            raise ValueError("a latent reward is small and computes beside the student: set parallel.reward_ranks=0")
        return self
