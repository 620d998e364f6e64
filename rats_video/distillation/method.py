"""The method of a run, and what it is built from."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TypeVar

from torch import Tensor, nn

from rats_video.backbones.base import PipelineBackbone
from rats_video.backbones.features import middle_features
from rats_video.distillation.parallel import split_roles
from rats_video.distillation.real_data import build_real_data, open_real_data
from rats_video.distillation.roles import build_fake_score
from rats_video.distillation.run_rewards import loss_reward
from rats_video.distillation.settings import DistillConfig
from rats_video.distillation.teacher_identity import teacher_identity
from rats_video.distillation.vision import build_vision
from rats_video.errors import UserError
from rats_video.methods.base import Method
from rats_video.methods.context import MethodInputs
from rats_video.methods.rats import Rats, RatsConfig
from rats_video.methods.real_data import RealDataConfig, RealSource
from rats_video.methods.teacher import FrozenTeacherConfig, TeacherSampler
from rats_video.methods.teacher_cache import DiskRolloutCache
from rats_video.methods.vision import VisionConfig, VisionFeatures
from rats_video.rewards.remote import RankLink, RemoteReward
from rats_video.runtime import ALONE, Runtime
from rats_video.types import VelocityAndFeatures

Built = TypeVar("Built", bound=Method)
Network = TypeVar("Network", bound=nn.Module)


@dataclass(frozen=True)
class RunContext:
    """The run, as its method sees it while it is built; see `MethodContext`.

    Args:
        cfg: its settings.
        student: whole, as all roles are until the method is built.
        teacher: likewise.
        runtime: the processes.
        others: networks of the method's own.
    """

    cfg: DistillConfig
    student: PipelineBackbone
    teacher: PipelineBackbone
    runtime: Runtime = ALONE
    others: list[nn.Module] = field(default_factory=list)

    @property
    def seed(self) -> int:
        """The run's."""
        return self.cfg.seed

    @property
    def num_batches(self) -> int:
        """Batches of the run."""
        return math.ceil(self.cfg.training.steps / self.cfg.teacher.reuse)

    @property
    def temporal_stride(self) -> int:
        """Pixel frames of one latent frame."""
        return self.student.temporal_stride

    def inputs(self) -> MethodInputs:
        """Load reward, teacher and real clips.

        Raises:
            UserError: one of them cannot be loaded.
        """
        cfg, runtime = self.cfg, self.runtime
        is_remote = runtime.reward_ranks > 0
        reward = RemoteReward(RankLink.to_reward(runtime)) if is_remote else loss_reward(cfg, self.student)
        cache = None
        if isinstance(cfg.teacher, FrozenTeacherConfig) and cfg.teacher.cache:
            identity = teacher_identity(cfg, cfg.teacher)
            cache = DiskRolloutCache(Path(cfg.teacher.cache), identity, self.student.device, runtime)
        return {
            "student": self.student,
            "teacher": TeacherSampler(
                self.teacher, reward, cfg.teacher, cfg.shift, cache, predictions=cfg.method.compares_predictions
            ),
            "reward": reward,
            "student_config": cfg.student,
            "shift": cfg.shift,
            "real_data": build_real_data(cfg, self.student, runtime),
        }

    @cached_property
    def critic(self) -> PipelineBackbone:
        """A third role that trains, made when it is first asked for."""
        return build_fake_score(self.cfg, self.student, self.teacher)

    def critic_features(self) -> tuple[VelocityAndFeatures, int]:
        """Calls of the critic that also give its middle block's output, and the width of that."""
        return middle_features(self.critic)

    def place(self, network: Network) -> Network:
        """A network of the method's own that trains beside the roles: put where they are, and split as they are."""
        self.others.append(network.to(self.student.device))
        return network

    def mean_of_tokens(self, found: Tensor) -> Tensor:
        """Of means `[B]` over the tokens that this process has of each clip, those over all its tokens."""
        return self.runtime.mean_over_context(found)

    def vision(self, cfg: VisionConfig) -> VisionFeatures:
        """Frozen networks that see frames and read prompts; raises UserError if they cannot be loaded."""
        return build_vision(cfg, self.student.device)

    def clips(self, real: RealDataConfig) -> RealSource:
        """Real clips of a prepared cache."""
        return open_real_data(self.cfg, real, self.student, self.runtime).source


def build_method(
    cfg: DistillConfig, student: PipelineBackbone, teacher: PipelineBackbone, runtime: Runtime = ALONE
) -> Method:
    """The objective, on roles that are there already; what computes is then split over the processes.

    Raises:
        UserError: its reward or its real clips cannot be loaded, or the roles not be split.
    """
    return _split(context := RunContext(cfg, student, teacher, runtime), cfg.method.build(context))


def build_rats(
    cfg: DistillConfig, student: PipelineBackbone, teacher: PipelineBackbone, runtime: Runtime = ALONE
) -> Rats:
    """The same for RATS; raises UserError for another method."""
    return _split(context := RunContext(cfg, student, teacher, runtime), rats_of(cfg).build(context))


def _split(context: RunContext, method: Built) -> Built:
    """The method, built on this context, with its roles split over the processes: only now are all of them there."""
    roles = [context.student, context.teacher]
    if "critic" in vars(context):  # the method has asked for it
        roles.append(context.critic)
    split_roles(context.cfg, roles, context.others, context.runtime)
    return method


def rats_of(cfg: DistillConfig) -> RatsConfig:
    """The settings of RATS; raises UserError for another method."""
    if not isinstance(cfg.method, RatsConfig):
        raise UserError(f"is {cfg.method.kind}, which has no gate", where="method.kind", fix="only rats can do this")
    return cfg.method
