"""Configuration of `rats-video distill` and `rats-video run`."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from rats_video.config.compute import ComputeConfig, FullWeights, ParallelConfig, Weights
from rats_video.config.faults import FaultsConfig
from rats_video.config.guard import GuardConfig
from rats_video.config.method import Method, RatsMethod
from rats_video.config.objective import WITH_GRADIENT
from rats_video.config.reward import LatentRewardConfig, RewardConfig
from rats_video.config.rivals import T2VTurboMethod
from rats_video.config.schema import (
    ClipConfig,
    Config,
    NonNegativeInt,
    NumClips,
    OptimizerConfig,
    PositiveFloat,
    PositiveInt,
    Seed,
    SolverSteps,
)
from rats_video.config.watching import TrackingConfig, ValidationConfig
from rats_video.errors import UserError


class ShapesPrompts(Config):
    """Captions of the synthetic shapes, with their fixed split."""

    kind: Literal["shapes"] = "shapes"
    paths: int = Field(0, ge=0, le=64, description="prompts of each caption, each with a motion path; 0: captions only")


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


class FrozenTeacher(Config):
    """The base model, sampled with many steps."""

    kind: Literal["frozen"]
    num_steps: SolverSteps = Field(48, description="solver steps; a multiple of the student's, so that horizons nest")
    guidance_scale: PositiveFloat = 3.0
    reuse: PositiveInt = Field(1, description="student updates served by one teacher rollout")
    cache: str | None = Field(None, description="folder where rollouts are stored and found again by later runs")

    @property
    def guided(self) -> int:
        """Network evaluations of one guided call."""
        return 1 if self.guidance_scale == 1.0 else 2


class EmaTeacher(Config):
    """The running average of the student's weights, sampled with many steps (as published)."""

    kind: Literal["ema"]
    decay: float = Field(0.99, ge=0, lt=1)
    num_steps: SolverSteps = 48
    guidance_scale: PositiveFloat = Field(1.0, description="at the start")
    guidance_end: PositiveFloat = Field(1.0, description="at guidance_fade_steps: the student absorbs guidance itself")
    guidance_fade_steps: NonNegativeInt = 0
    reuse: PositiveInt = 1

    @property
    def guided(self) -> int:
        """Network evaluations of one guided call, while guidance lasts."""
        return 1 if self.guidance_scale == self.guidance_end == 1.0 else 2


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


class ShapesFeatures(Config):
    """Log-odds of a word reward that ships with the package (19 numbers): sees the shapes' words and damages alone."""

    kind: Literal["shapes"]
    path: str = Field("shapes-reward-heldout", description="folder of a word reward, or the name of an embedded one")


class I3dFeatures(Config):
    """Logits of I3D on Kinetics-400 (400 numbers): the network of the published Frechet video distances."""

    kind: Literal["i3d"]
    path: str = Field("models/I3D-Kinetics400", description="rgb_imagenet.pt as `rats-video rewards convert` leaves it")


class VideoMaeFeatures(Config):
    """Mean token of a VideoMAE (768 numbers for the base model): more for motion than I3D (arXiv 2404.12391)."""

    kind: Literal["videomae"]
    path: str = Field("models/videomae-base", description="folder of a hub download")


Features = Annotated[ShapesFeatures | I3dFeatures | VideoMaeFeatures, Field(discriminator="kind")]


class DiversityConfig(Config):
    """More clips of the same prompts from other noise: does a prompt still give more than one clip?"""

    prompts: NumClips = Field(16, description="of the held-out prompts that are evaluated, the first ones")
    clips: int = Field(2, ge=2, le=1000, description="of each; the first is there anyway")


class EvaluationConfig(Config):
    """`evaluate`."""

    nfe: tuple[SolverSteps, ...] = (3, 4, 5, 8)
    num_clips: NumClips = 64
    batch_size: NumClips = 32
    teacher_steps: SolverSteps = 50
    guidance_scale: PositiveFloat = 3.0
    features: Features | None = Field(None, description="in what Frechet video distance is taken; null leaves it out")
    diversity: DiversityConfig | None = Field(DiversityConfig(), description="null leaves it out")
    latency_clips: int = Field(3, ge=0, le=1000, description="clips sampled alone to time each arm; 0 leaves it out")


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
    method: Method
    teacher: Teacher
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
        if self.guard is not None and self.guard.on_alarm == "shape" and not isinstance(self.method, RatsMethod):
            raise ValueError(f"guard.on_alarm=shape strengthens the shaping of rats; {self.method.kind} has none")
        if self.method.companions and (self.parallel.shard or self.parallel.context > 1):
            raise ValueError(
                f"{self.method.kind} trains networks beside the student: set parallel.shard=false, parallel.context=1"
            )
        if min(self.student.num_steps) < self.method.least_steps:
            raise ValueError(f"{self.method.kind} learns from the steps before the last: student.num_steps=1 has none")
        if self.method.uses_path and isinstance(self.teacher, FrozenTeacher) and self.teacher.cache:
            raise ValueError(f"{self.method.kind} uses all of the teacher's path, unstored: set teacher.cache=null")
        return self

    @model_validator(mode="after")
    def _latents_stay_at_home(self) -> Self:
        if self.parallel.reward_ranks and isinstance(self.reward, LatentRewardConfig):
            raise ValueError("a latent reward is small and computes beside the student: set parallel.reward_ranks=0")
        if self.parallel.reward_ranks and isinstance(self.method, T2VTurboMethod) and self.method.video_reward:
            raise ValueError("a reward rank has one reward, not method.video_reward too: set parallel.reward_ranks=0")
        return self

    def evaluations(self, num_steps: int) -> float:
        """Network evaluations of an update at that many student steps, over all clips and processes.

        One call on one clip is one evaluation; with gradient it counts three, since backward is twice the work. A
        teacher's rollout that is found again in `teacher.cache` counts as well.
        """
        student = num_steps + (WITH_GRADIENT - 1) * len(self.student.gradient_steps(num_steps))
        teacher = self.teacher.num_steps * self.teacher.guided / self.teacher.reuse
        a_clip = self.method.evaluations(num_steps, student, teacher, self.teacher.guided)
        real = self.method.real_data
        num_real = 0 if real is None or real.weight == 0 else real.batch_size or self.training.batch_size
        return self.training.batch_size * a_clip + WITH_GRADIENT * num_real
