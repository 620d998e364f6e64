"""The run's own method on roles that are watched: which of them calls its network, in which phase, how often."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from rats_video.backbones.base import PipelineBackbone
from rats_video.backbones.features import middle_features
from rats_video.condition import Condition
from rats_video.distillation.roles import build_fake_score, build_roles
from rats_video.distillation.settings import DistillConfig
from rats_video.distillation.vision import Vision, vision_on_meta
from rats_video.meta import META
from rats_video.methods.base import Method
from rats_video.methods.context import MethodInputs
from rats_video.methods.real_data import RealDataConfig, RealSource
from rats_video.methods.teacher import TeacherSampler
from rats_video.methods.vision import VisionConfig, VisionFeatures
from rats_video.planning.memory_tracker import MemoryTracker
from rats_video.rewards.base import free_reward
from rats_video.types import PromptBatch, Trajectory, VelocityAndFeatures

TEACHER, STUDENT, SCORES = "teacher rollout", "student rollout", "scores"
SAMPLES, CRITIC = "critic samples", "critic forward"
"""Phases in which a network is called: by a rollout, by the loss for the scores at one noise level, and before that by
a critic's round, for the clips that it learns from and on them."""

TEACHER_PIXELS, PIXELS = "teacher pixels", "student pixels"
"""Phases that begin where a role's clips are decoded."""

CRITIC_PIXELS = "critic pixels"
"""Clips that a critic's round decodes are counted under this name; no phase begins there."""

Network = TypeVar("Network", bound=nn.Module)


@dataclass
class Watch:
    """The phases of a step, told to the tracker.

    Args:
        tracker: it books what is computed.
        in_critic: true while a critic's round is at work.
        in_rollout: true while the teacher is rolled out, not asked by the loss at one noise level.
        clips: network evaluations by phase, and clips that are decoded, summed over the batch.
    """

    tracker: MemoryTracker
    in_critic: bool = False
    in_rollout: bool = False
    clips: Counter[str] = field(default_factory=Counter)

    def enter(self, phase: str, clips: int) -> None:
        """So many clips are called or decoded in this phase, which begins or goes on."""
        self.tracker.enter_phase(phase)
        self.clips[phase] += clips


class WatchedRole:
    """A role whose decode costs nothing: the denoiser's share of a step, with a phase for each thing it does.

    Args:
        role: the run's own.
        name: "teacher", "student" or "critic".
        watch: told of each call.
        computes: false where calls are only counted.
    """

    def __init__(self, role: PipelineBackbone, name: str, watch: Watch, *, computes: bool) -> None:
        self._role, self._name, self.watch, self._computes = copy.copy(role), name, watch, computes
        if role.autocast is not None:  # torch has no autocast for meta tensors
            watch.tracker.autocast, self._role.autocast = role.autocast, None

    def __getattr__(self, key: str) -> Any:
        return getattr(self._role, key)

    def velocity(self, latents: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
        """The role's own, or zeros where calls are only counted."""
        phases = {
            "teacher": TEACHER if self.watch.in_rollout else SCORES,
            "student": SAMPLES if self.watch.in_critic else STUDENT,
            "critic": CRITIC if self.watch.in_critic else SCORES,
        }
        self.watch.enter(phases[self._name], len(latents))
        return self._role.velocity(latents, sigma, condition) if self._computes else torch.zeros_like(latents)

    def decode(self, latents: Tensor, grad_frames: range | None = None) -> Tensor:  # noqa: ARG002
        """A view of the latents."""
        if self.watch.in_critic and self._name == "student":  # without gradient
            self.watch.clips[CRITIC_PIXELS] += len(latents)
        else:
            self.watch.enter(TEACHER_PIXELS if self._name == "teacher" else PIXELS, len(latents))
        return latents[:, :1].transpose(1, 2)


class WatchedTeacher(TeacherSampler):
    """A teacher whose rollouts are told from the loss's calls of it."""

    def _rollout(self, *args: Any, **kwargs: Any) -> Trajectory:
        watch: Watch = self.backbone.watch  # type: ignore[attr-defined]  # a watched role
        watch.in_rollout = True
        try:
            return super()._rollout(*args, **kwargs)
        finally:
            watch.in_rollout = False


@dataclass(frozen=True)
class PlannedVision:
    """Vision features of frames whose decode cost nothing, and which have not their size."""

    vision: Vision
    height: int
    width: int

    @property
    def widths(self) -> Sequence[int]:
        """Its own."""
        return self.vision.widths

    @property
    def text_width(self) -> int:
        """Its own."""
        return self.vision.text_width

    def maps(self, frames: Tensor) -> tuple[Tensor, ...]:
        """Of frames of the run's size."""
        mean = frames.mean(dim=(1, 2, 3), keepdim=True)
        return self.vision.maps(mean.expand(-1, 3, self.height, self.width))

    def text(self, prompts: Sequence[str]) -> Tensor:
        """Of short prompts: nothing."""
        return torch.empty(len(prompts), self.text_width, device=META)


@dataclass
class PlannedRun:
    """The run, as its method sees it while it is planned; see `MethodContext`.

    Args:
        cfg: its settings.
        student: the role that trains, on the meta device.
        teacher: its teacher.
        role: the critic, for a method that has one.
        batch: that is worked on.
        teacher_steps: of a teacher's rollout.
        computes: false where calls are only counted.
    """

    cfg: DistillConfig
    student: PipelineBackbone
    teacher: PipelineBackbone
    role: PipelineBackbone | None
    batch: PromptBatch
    teacher_steps: int
    computes: bool = True
    num_batches: int = 1
    own: list[nn.Module] = field(default_factory=list)
    frozen: list[nn.Module] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.watch = Watch(MemoryTracker())
        self.seed, self.temporal_stride = self.cfg.seed, self.student.temporal_stride

    @staticmethod
    def on_meta(cfg: DistillConfig, base: PipelineBackbone, batch: PromptBatch) -> PlannedRun:
        """The run with roles on that model."""
        with META:  # adapters too
            student, teacher = build_roles(cfg, base)
            critic = build_fake_score(cfg, student, teacher) if cfg.method.critic_optimizer else None
        steps = cfg.teacher.num_steps if cfg.method.uses_trajectory else 1  # they are alike, if none is kept
        return PlannedRun(cfg, student, teacher, critic, batch, steps)

    def build(self) -> Method:
        """The method on watched roles."""
        return self.cfg.method.for_plan().build(self)

    def inputs(self) -> MethodInputs:
        """Watched roles, and a reward that costs nothing."""
        few = self.cfg.teacher.model_copy(update={"num_steps": self.teacher_steps})
        compares = self.cfg.method.compares_predictions
        return {
            "student": self._watched(self.student, "student"),
            "teacher": WatchedTeacher(
                self._watched(self.teacher, "teacher"), free_reward, few, self.cfg.shift, predictions=compares
            ),
            "reward": free_reward,
            "student_config": self.cfg.student,
            "shift": self.cfg.shift,
            "real_data": None,
        }

    def _watched(self, role: PipelineBackbone, name: str) -> Any:
        return WatchedRole(role, name, self.watch, computes=self.computes)

    @property
    def critic(self) -> Any:
        """The watched critic."""
        assert self.role is not None
        return self._watched(self.role, "critic")

    def critic_features(self) -> tuple[VelocityAndFeatures, int]:
        """The critic's, or zeros of their width."""
        critic = self.critic
        call, width = middle_features(critic)

        def counted(latents: Tensor, sigma: Tensor, condition: Condition) -> tuple[Tensor, Tensor]:
            return critic.velocity(latents, sigma, condition), latents.new_zeros(len(latents), 1, width)

        return (call if self.computes else counted), width

    def place(self, network: Network) -> Network:
        """The network without values."""
        self.own.append(network.to(self.batch.noise.device))
        return network

    def mean_of_tokens(self, found: Tensor) -> Tensor:
        """Itself."""
        return found

    def vision(self, cfg: VisionConfig) -> VisionFeatures:
        """The networks without weights, on frames of the run's size."""
        with META:
            vision = vision_on_meta(cfg)
        self.frozen.append(vision)
        return PlannedVision(vision, self.cfg.clip.height, self.cfg.clip.width)

    def clips(self, real: RealDataConfig) -> RealSource:  # noqa: ARG002
        """Real clips of the batch's size."""
        found = torch.empty_like(self.batch.noise), self.batch.condition(self.student)
        return lambda _index: found


def simulated(cfg: DistillConfig, num_steps: int) -> list[DistillConfig]:
    """The run at each noise level that its method may simulate the student to, the longest rollout last."""
    if not cfg.method.simulates(cfg.student):
        return [cfg]
    levels = sorted(cfg.student.gradient_steps(num_steps))
    one = [cfg.student.model_copy(update={"grad_steps": (level,)}) for level in levels]
    return [cfg.model_copy(update={"student": student}) for student in one]


def count_calls(cfg: DistillConfig, base: PipelineBackbone, batch: PromptBatch) -> dict[str, float]:
    """Network evaluations by phase, and decoded clips, a clip: of the method's own step, by roles that compute nothing.

    Of a critic one round counts, and of the teacher a rollout.
    """
    run = PlannedRun(cfg, base, base, base, batch, cfg.teacher.num_steps, computes=False)
    method = run.build()
    with run.watch.tracker:
        run.watch.in_critic = True
        for critic in method.critics.values():
            critic.loss(batch, 0)
        run.watch.in_critic = False
        method.step(batch)
    return {phase: clips / len(batch.prompts) for phase, clips in run.watch.clips.items()}
