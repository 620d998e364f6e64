"""What a student is trained on: RATS, or one of the objectives that it is compared with (`method.kind`)."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from rats_video.config.dmd2 import Dmd2Method
from rats_video.config.objective import WITH_GRADIENT, MethodConfig
from rats_video.config.policy import GrpoMethod, PolicyConfig, RtdmdMethod
from rats_video.config.rivals import ConsistencyMethod, DollarMethod, T2VTurboMethod
from rats_video.config.schema import Config, NonNegativeFloat, PositiveFloat, PositiveInt


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


class RatsMethod(MethodConfig):
    """Loss = -reward_weight * R_student + alpha * gate * shaping (+ real_data.weight * real_data)."""

    kind: Literal["rats"] = "rats"
    reward_weight: NonNegativeFloat = 1.0
    alpha: NonNegativeFloat = 1.0
    gate: Gate
    shaping: ShapingConfig = ShapingConfig()
    reward_margin: NonNegativeFloat | None = Field(
        None, description="cap the student's reward at the teacher's plus this; null leaves it uncapped, as published"
    )
    policy: PolicyConfig | None = Field(
        None, description="raise the reward by a policy gradient, as one without gradient needs; null = the direct one"
    )

    @property
    def uses_gradient(self) -> bool:
        """Whether the reward's own gradient is in the loss."""
        return self.reward_weight > 0 and self.policy is None

    @property
    def uses_teacher(self) -> bool:
        """Always: the gate compares with it."""
        return True

    def evaluations(self, num_steps: int, student: float, teacher: float, guided: float) -> float:  # noqa: ARG002
        """A rollout of each, and the policy's noisy ones."""
        policy = self.policy.evaluations(num_steps) if self.policy is not None and self.reward_weight > 0 else 0
        return teacher + student + policy


class ImitationMethod(MethodConfig):
    """Loss = shaping: the teacher's trajectory matched at every horizon, whatever the reward says."""

    kind: Literal["imitation"]
    shaping: ShapingConfig = ShapingConfig()

    @property
    def uses_teacher(self) -> bool:
        """Always."""
        return True

    def evaluations(self, num_steps: int, student: float, teacher: float, guided: float) -> float:  # noqa: ARG002
        """A rollout of each."""
        return teacher + student


class ReflMethod(MethodConfig):
    """Loss = -R_student, backpropagated through the last steps of the rollout alone (ReFL, DRaFT-K)."""

    kind: Literal["refl"]
    last_steps: PositiveInt = Field(1, description="K: steps of the rollout, the last ones, that carry gradient")
    reward_weight: PositiveFloat = 1.0

    @property
    def uses_gradient(self) -> bool:
        """Always."""
        return True

    def evaluations(self, num_steps: int, student: float, teacher: float, guided: float) -> float:  # noqa: ARG002
        """The student's rollout, with gradient in its last steps."""
        return num_steps + (WITH_GRADIENT - 1) * min(self.last_steps, num_steps)


Method = Annotated[
    RatsMethod
    | ImitationMethod
    | ReflMethod
    | GrpoMethod
    | RtdmdMethod
    | Dmd2Method
    | ConsistencyMethod
    | T2VTurboMethod
    | DollarMethod,
    Field(discriminator="kind"),
]  # fmt: skip
