"""The run, as a method sees it while it is built."""

from __future__ import annotations

from typing import Protocol, TypedDict, TypeVar

from torch import Tensor, nn

from rats_video.methods.base import StepsConfig
from rats_video.methods.real_data import RealData, RealDataConfig, RealSource
from rats_video.methods.teacher import TeacherSampler
from rats_video.methods.vision import VisionConfig, VisionFeatures
from rats_video.types import Backbone, Reward, VelocityAndFeatures

Network = TypeVar("Network", bound=nn.Module)


class MethodInputs(TypedDict):
    """The fields that every method has; see `Method`."""

    student: Backbone
    teacher: TeacherSampler
    reward: Reward
    student_config: StepsConfig
    shift: float
    real_data: RealData | None


class MethodContext(Protocol):
    """The run, as a method sees it while it is built. A method calls `inputs` first."""

    @property
    def seed(self) -> int:
        """The run's."""
        ...

    @property
    def num_batches(self) -> int:
        """Batches of the run: each serves `teacher.reuse` updates."""
        ...

    @property
    def temporal_stride(self) -> int:
        """Pixel frames of one latent frame."""
        ...

    def inputs(self) -> MethodInputs:
        """Load reward, teacher and real clips."""
        ...

    @property
    def critic(self) -> Backbone:
        """A third role that trains, of the student's kind of weights; it starts as the base model."""
        ...

    def critic_features(self) -> tuple[VelocityAndFeatures, int]:
        """Calls of the critic that also give its middle block's output, and the width D of that.

        With `parallel.context` each process has the features of its own tokens.
        """
        ...

    def place(self, network: Network) -> Network:
        """A network of the method's own that trains beside the roles: put where they are, and split as they are."""
        ...

    def mean_of_tokens(self, found: Tensor) -> Tensor:
        """Of means `[B]` over the tokens that this process has of each clip, those over all its tokens."""
        ...

    def clips(self, real: RealDataConfig) -> RealSource:
        """Real clips of a prepared cache."""
        ...

    def vision(self, cfg: VisionConfig) -> VisionFeatures:
        """Frozen networks that see frames and read prompts, for a discriminator of pixels."""
        ...
