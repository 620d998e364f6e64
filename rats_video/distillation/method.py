"""Builds the method that a configuration names."""

from __future__ import annotations

import math
from functools import lru_cache
from pathlib import Path
from typing import Any

from rats_video.assets import resolve_folder
from rats_video.backbones.base import PipelineBackbone
from rats_video.backbones.features import middle_features
from rats_video.distillation.real_data import build_real_data, open_real_data
from rats_video.distillation.roles import build_fake_score
from rats_video.distillation.run_rewards import loss_reward
from rats_video.distillation.settings import DistillConfig
from rats_video.errors import UserError
from rats_video.files import weights_digest
from rats_video.methods.base import Method
from rats_video.methods.consistency import Consistency, ConsistencyConfig
from rats_video.methods.discriminator import Discriminator, build_head
from rats_video.methods.distribution_matching import DistributionMatching, FakeScoreConfig
from rats_video.methods.dmd2 import Dmd2, Dmd2Config
from rats_video.methods.dollar import Dollar, DollarConfig
from rats_video.methods.gate import build_gate
from rats_video.methods.grpo import Grpo, GrpoConfig
from rats_video.methods.imitation import Imitation, ImitationConfig
from rats_video.methods.rats import Rats, RatsConfig
from rats_video.methods.refl import Refl, ReflConfig
from rats_video.methods.rtdmd import Rtdmd, RtdmdConfig
from rats_video.methods.t2v_turbo import T2VTurbo, T2VTurboConfig
from rats_video.methods.teacher import FrozenTeacherConfig, TeacherSampler
from rats_video.methods.teacher_cache import DiskRolloutCache
from rats_video.optim import ema_update_
from rats_video.rewards.remote import RankLink, RemoteReward
from rats_video.rewards.reward import reward_folders
from rats_video.runtime import ALONE, Runtime

NOT_SCORED = {"path": True, "head": True, "tokenizer": True, "chunk": True}
"""Keys of a reward that are in its weights' hash, or change no score."""

DECIDES = {".safetensors", ".json", ".txt", ".model"}
"""Files of a model's or a reward's folder that decide what it computes: weights, configuration, tokenizer."""


def build_method(  # noqa: PLR0911  # one a kind
    cfg: DistillConfig, student: PipelineBackbone, teacher: PipelineBackbone, runtime: Runtime = ALONE
) -> Method:
    """The objective, on roles that are there already.

    Raises:
        UserError: its reward or its real clips cannot be loaded.
    """
    match cfg.method:
        case RatsConfig():
            return build_rats(cfg, student, teacher, runtime)
        case ImitationConfig() as method:
            return Imitation(**_players(cfg, student, teacher, runtime), method=method)
        case ReflConfig() as method:
            return Refl(**_players(cfg, student, teacher, runtime), method=method)
        case Dmd2Config() as method:
            return build_dmd2(cfg, method, student, teacher, runtime)
        case GrpoConfig() as method:
            return Grpo(**_players(cfg, student, teacher, runtime), method=method)
        case RtdmdConfig() as method:
            return Rtdmd(**_with_scores(cfg, method.fake_score, student, teacher, runtime), method=method)
        case ConsistencyConfig() as method:
            num_batches = math.ceil(cfg.training.steps / cfg.teacher.reuse)
            return Consistency(**_players(cfg, student, teacher, runtime), method=method, num_batches=num_batches)
        case T2VTurboConfig() as method:
            return T2VTurbo(**_players(cfg, student, teacher, runtime), method=method)
        case DollarConfig() as method:
            return Dollar(**_with_scores(cfg, method.fake_score, student, teacher, runtime), method=method)


def build_rats(
    cfg: DistillConfig, student: PipelineBackbone, teacher: PipelineBackbone, runtime: Runtime = ALONE
) -> Rats:
    """Student, teacher, reward and gate, and real clips where there are any."""
    method = rats_of(cfg)
    gate = build_gate(method.gate, student.temporal_stride)
    return Rats(**_players(cfg, student, teacher, runtime), gate=gate, method=method)


def rats_of(cfg: DistillConfig) -> RatsConfig:
    """The settings of RATS; raises UserError where another method is trained."""
    if not isinstance(cfg.method, RatsConfig):
        raise UserError(f"is {cfg.method.kind}, which has no gate", where="method.kind", fix="only rats can do this")
    return cfg.method


def build_matching(
    cfg: DistillConfig, fake_score: FakeScoreConfig, teacher: TeacherSampler, fake: PipelineBackbone
) -> DistributionMatching:
    """The two scores of distribution matching.

    Raises:
        UserError: the teacher moves after the student: there would be nothing to match.
    """
    if not isinstance(cfg.teacher, FrozenTeacherConfig):
        raise UserError(
            "is the student's own average: matching what it makes would change nothing", where="teacher.kind",
            fix="set teacher.kind=frozen",
        )  # fmt: skip
    return DistributionMatching(teacher, fake, fake_score, cfg.shift)


def build_dmd2(
    cfg: DistillConfig, method: Dmd2Config, student: PipelineBackbone, teacher: PipelineBackbone, runtime: Runtime
) -> Dmd2:
    """Distribution matching with what the method asks for beside it."""
    players = _with_scores(cfg, method.fake_score, student, teacher, runtime)
    fake, gan, clips = players["matching"].fake, None, None
    if method.gan is not None:
        see, width = middle_features(fake)
        gan = Discriminator(see, build_head(width, cfg.seed + 2).to(student.device), method.gan)
    if method.ida is not None:  # adapters start alike, or their factors' mean would be no adapter between the two
        ema_update_(fake.weights, student.weights, decay=0.0)
    if method.real_data is not None and (method.data_forcing or method.gan):
        real = open_real_data(cfg, method.real_data, student, runtime)
        clips = lru_cache(maxsize=1)(real.source)  # asked for in every round
    return Dmd2(**players, method=method, gan=gan, clips=clips, seed=cfg.seed)


def _players(
    cfg: DistillConfig, student: PipelineBackbone, teacher: PipelineBackbone, runtime: Runtime
) -> dict[str, Any]:
    """What every method has; see `distill.method.Players`."""
    reward = RemoteReward(RankLink.to_reward(runtime)) if runtime.reward_ranks > 0 else loss_reward(cfg, student)
    store = None
    if isinstance(cfg.teacher, FrozenTeacherConfig) and cfg.teacher.cache:
        identity = teacher_identity(cfg, cfg.teacher)
        store = DiskRolloutCache(Path(cfg.teacher.cache), identity, student.device, runtime)
    return {
        "student": student,
        "teacher": TeacherSampler(teacher, reward, cfg.teacher, cfg.shift, store),
        "reward": reward,
        "student_config": cfg.student,
        "shift": cfg.shift,
        "real_data": build_real_data(cfg, student, runtime),
    }


def _with_scores(
    cfg: DistillConfig,
    fake_score: FakeScoreConfig,
    student: PipelineBackbone,
    teacher: PipelineBackbone,
    runtime: Runtime,
) -> dict[str, Any]:
    """The same with the two scores of distribution matching."""
    players, fake = _players(cfg, student, teacher, runtime), build_fake_score(cfg, student, teacher)
    return players | {"matching": build_matching(cfg, fake_score, players["teacher"], fake)}


def teacher_identity(cfg: DistillConfig, teacher: FrozenTeacherConfig) -> dict[str, object]:
    """Everything a frozen teacher's rollout depends on besides prompts and noise, weights included."""
    folders = [
        resolve_folder(cfg.model, where="model"),
        *reward_folders(cfg.reward, where="reward"),
        *cfg.backbone.sources(),
    ]
    if cfg.compute.decode.small is not None:  # what the reward saw
        folders.append(Path(cfg.compute.decode.small))
    return {
        "weights": weights_digest(folders, DECIDES),
        **cfg.model_dump(include={"backbone"}),
        "num_steps": teacher.num_steps,
        "guidance_scale": teacher.guidance_scale,
        "embedded_guidance": cfg.embedded_guidance,
        "shift": cfg.shift,
        "dtype": cfg.compute.dtype,
        "clip": cfg.clip.model_dump(),
        # What is left out is in the weights' hash, or changes nothing that a teacher does.
        "decode": cfg.compute.decode.model_dump(exclude={"checkpoint", "offload", "window", "small"}),
        "reward": cfg.reward.model_dump(exclude=NOT_SCORED | {"terms": {"__all__": {"reward": NOT_SCORED}}}),
    }
