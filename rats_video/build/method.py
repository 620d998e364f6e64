"""The method a configuration names, with everything it needs."""

from __future__ import annotations

import math
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from rats_video.assets import resolve_folder
from rats_video.backbones.base import PipelineBackbone
from rats_video.backbones.features import middle_features
from rats_video.backbones.levers import use_levers
from rats_video.build.real_data import build_real_data, open_real_data
from rats_video.build.reward import loss_reward, reward_folders
from rats_video.config.compute import FullWeights, LoraWeights
from rats_video.config.distill import DistillConfig, FrozenTeacher
from rats_video.config.dmd2 import Dmd2Method
from rats_video.config.method import ImitationMethod, RatsMethod, ReflMethod
from rats_video.config.policy import GrpoMethod, RtdmdMethod
from rats_video.config.rivals import ConsistencyMethod, DollarMethod, FakeScoreConfig, T2VTurboMethod
from rats_video.distill.distribution import DistributionMatching
from rats_video.distill.ema import update_ema
from rats_video.distill.gate import build_gate
from rats_video.distill.method import Method
from rats_video.distill.step import Rats
from rats_video.distill.store import DiskGuideStore
from rats_video.distill.teacher import TeacherSampler
from rats_video.errors import UserError
from rats_video.files import weights_digest
from rats_video.rewards.remote import Link, RemoteReward
from rats_video.rivals.consistency import Consistency
from rats_video.rivals.discriminator import Discriminator, build_head
from rats_video.rivals.dmd2 import Dmd2
from rats_video.rivals.dollar import Dollar
from rats_video.rivals.grpo import Grpo
from rats_video.rivals.imitation import Imitation
from rats_video.rivals.refl import Refl
from rats_video.rivals.rtdmd import Rtdmd
from rats_video.rivals.t2v_turbo import T2VTurbo
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
        case RatsMethod():
            return build_rats(cfg, student, teacher, runtime)
        case ImitationMethod() as method:
            return Imitation(**_players(cfg, student, teacher, runtime), method=method)
        case ReflMethod() as method:
            return Refl(**_players(cfg, student, teacher, runtime), method=method)
        case Dmd2Method() as method:
            return build_dmd2(cfg, method, student, teacher, runtime)
        case GrpoMethod() as method:
            return Grpo(**_players(cfg, student, teacher, runtime), method=method)
        case RtdmdMethod() as method:
            return Rtdmd(**_with_scores(cfg, method.fake_score, student, teacher, runtime), method=method)
        case ConsistencyMethod() as method:
            num_batches = math.ceil(cfg.training.steps / cfg.teacher.reuse)
            return Consistency(**_players(cfg, student, teacher, runtime), method=method, num_batches=num_batches)
        case T2VTurboMethod() as method:
            return T2VTurbo(**_players(cfg, student, teacher, runtime), method=method)
        case DollarMethod() as method:
            return Dollar(**_with_scores(cfg, method.fake_score, student, teacher, runtime), method=method)


def build_rats(
    cfg: DistillConfig, student: PipelineBackbone, teacher: PipelineBackbone, runtime: Runtime = ALONE
) -> Rats:
    """Student, teacher, reward and gate, and real clips where there are any."""
    method = rats_of(cfg)
    gate = build_gate(method.gate, student.temporal_stride)
    return Rats(**_players(cfg, student, teacher, runtime), gate=gate, method=method)


def rats_of(cfg: DistillConfig) -> RatsMethod:
    """The settings of RATS; raises UserError where another method is trained."""
    if not isinstance(cfg.method, RatsMethod):
        raise UserError(f"is {cfg.method.kind}, which has no gate", where="method.kind", fix="only rats can do this")
    return cfg.method


def build_fake_score(cfg: DistillConfig, student: PipelineBackbone, teacher: PipelineBackbone) -> PipelineBackbone:
    """A third role that trains, of the student's kind of weights, for methods that model what the student makes.

    It starts as the base model: a full one as a copy of the teacher, an adapter as one that changes nothing.
    """
    match cfg.student.weights:
        case FullWeights():
            fake = teacher.twin()
            use_levers(cfg.compute, fake)
        case LoraWeights() as lora:
            with torch.random.fork_rng(devices=[]):  # A is drawn at random: by the run's seed
                torch.default_generator.manual_seed(cfg.seed + 1)
                fake = student.adapted("fake_score", lora)
    for weight in fake.weights.values():
        weight.requires_grad = True
    return fake


def build_matching(
    cfg: DistillConfig, fake_score: FakeScoreConfig, teacher: TeacherSampler, fake: PipelineBackbone
) -> DistributionMatching:
    """The two scores of distribution matching.

    Raises:
        UserError: the teacher moves after the student: there would be nothing to match.
    """
    if not isinstance(cfg.teacher, FrozenTeacher):
        raise UserError(
            "is the student's own average: matching what it makes would change nothing", where="teacher.kind",
            fix="set teacher.kind=frozen",
        )  # fmt: skip
    return DistributionMatching(teacher, fake, fake_score, cfg.shift)


def build_dmd2(
    cfg: DistillConfig, method: Dmd2Method, student: PipelineBackbone, teacher: PipelineBackbone, runtime: Runtime
) -> Dmd2:
    """Distribution matching with what the method asks for beside it."""
    players = _with_scores(cfg, method.fake_score, student, teacher, runtime)
    fake, gan, clips = players["matching"].fake, None, None
    if method.gan is not None:
        see, width = middle_features(fake)
        gan = Discriminator(see, build_head(width, cfg.seed + 2).to(student.device), method.gan)
    if method.ida is not None:  # adapters start alike, or their factors' mean would be no adapter between the two
        update_ema(fake.weights, student.weights, decay=0.0)
    if method.real_data is not None and (method.data_forcing or method.gan):
        real = open_real_data(cfg, method.real_data, student, runtime)
        clips = lru_cache(maxsize=1)(real.source)  # asked for in every round
    return Dmd2(**players, method=method, gan=gan, clips=clips, seed=cfg.seed)


def _players(
    cfg: DistillConfig, student: PipelineBackbone, teacher: PipelineBackbone, runtime: Runtime
) -> dict[str, Any]:
    """What every method has; see `distill.method.Players`."""
    reward = RemoteReward(Link.to_reward(runtime)) if runtime.reward_ranks > 0 else loss_reward(cfg, student)
    store = None
    if isinstance(cfg.teacher, FrozenTeacher) and cfg.teacher.cache:
        identity = teacher_identity(cfg, cfg.teacher)
        store = DiskGuideStore(Path(cfg.teacher.cache), identity, student.device, runtime)
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


def teacher_identity(cfg: DistillConfig, teacher: FrozenTeacher) -> dict[str, object]:
    """Everything a frozen teacher's rollout depends on besides prompts and noise, weights included."""
    folders = [resolve_folder(cfg.model, where="model"), *reward_folders(cfg.reward, where="reward")]
    if cfg.compute.decode.small is not None:  # what the reward saw
        folders.append(Path(cfg.compute.decode.small))
    return {
        "weights": weights_digest(folders, DECIDES),
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
