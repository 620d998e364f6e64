"""`distill`: a configuration in, a trained student's folder out."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Collection
from pathlib import Path

import torch

from rats_video.assets import resolve_folder
from rats_video.backbones.base import PipelineBackbone
from rats_video.backbones.levers import use_decode_dtype, use_levers
from rats_video.backbones.load import load_backbone
from rats_video.backbones.small_decoder import load_small_decoder
from rats_video.backbones.text_cache import TextCache
from rats_video.build.common import claim_run, environment, record_session, refuse_changes
from rats_video.build.compute import (
    cached_text,
    check_compute,
    describe,
    encode_prompts,
    place,
    save_text,
)
from rats_video.build.dry_runs import Builders, can_plan, plan_of_run
from rats_video.build.guard import SEED_OFFSET, build_guard
from rats_video.build.method import build_method
from rats_video.build.observers import build_observers
from rats_video.build.parallel import serve_rewards, split_roles
from rats_video.build.reward import build_judges, check_rewards
from rats_video.config.compute import FullWeights, LoraWeights
from rats_video.config.distill import DistillConfig, EmaTeacher
from rats_video.config.load import load_config, write_resolved
from rats_video.config.method import ImitationMethod, RatsMethod
from rats_video.config.resume import changed_keys
from rats_video.datasets.prompts import PromptSplit, check_prompt, load_prompts
from rats_video.distill.ema import update_ema
from rats_video.errors import UserError, warn
from rats_video.files import write_json
from rats_video.rewards.remote import RemoteReward
from rats_video.runtime import Runtime
from rats_video.training.loop import train_loop
from rats_video.training.milestones import Milestones
from rats_video.training.run_folder import RunFolder
from rats_video.training.trackers import check_trackers


def build_backbone(cfg: DistillConfig, device: torch.device, *, text: TextCache | None = None) -> PipelineBackbone:
    """The base model, checked against the clip size and the way it is to be decoded.

    Where its prompts are encoded already, it comes without text encoder.
    """
    check_compute(cfg, device)
    folder, dtype = resolve_folder(cfg.model, where="model"), getattr(torch, cfg.compute.dtype)
    first = device if cfg.compute.offload == "none" and not cfg.parallel.shard else "cpu"
    backbone = load_backbone(folder, first, dtype, with_text=text is None)
    prepare_base(cfg, backbone, device)
    place(cfg, backbone, device)
    if cfg.compute.cache_text:
        backbone.cache_text(text or encode_prompts(cfg, backbone))
    return backbone


def prepare_base(cfg: DistillConfig, backbone: PipelineBackbone, device: torch.device) -> None:
    """Tell the base model what the run asks of it.

    Raises:
        UserError: it cannot make or decode such clips.
    """
    backbone.decoding, backbone.fps = cfg.compute.decode, cfg.clip.fps
    backbone.embedded_guidance = cfg.embedded_guidance
    if cfg.compute.decode.small is not None:
        backbone.small_decoder = load_small_decoder(
            Path(cfg.compute.decode.small),
            latent_channels=backbone.latent_channels,
            spatial_stride=backbone.spatial_stride,
            temporal_stride=backbone.temporal_stride,
            where="compute.decode.small",
        ).to(device)
    use_decode_dtype(backbone, getattr(torch, cfg.compute.decode.dtype))
    backbone.latent_shape(cfg.clip.spec)
    if backbone.small_decoder is not None or backbone.exact_window:
        return
    if cfg.compute.decode.offload:
        raise UserError(
            f"{backbone.family}'s VAE is not decoded frame by frame: nothing waits between frames",
            where="compute.decode.offload", fix="set it to false; compute.decode.checkpoint saves memory exactly",
        )  # fmt: skip
    if cfg.compute.decode.window is not None:
        raise UserError(
            f"each frame that {backbone.family}'s VAE decodes depends on later ones: a window would change them",
            where="compute.decode.window", fix="set it to null; compute.decode.checkpoint saves memory exactly",
        )  # fmt: skip


def checked_prompts(cfg: DistillConfig, backbone: PipelineBackbone) -> PromptSplit:
    """The run's prompts, each of them known to the model's text encoder; warns, once, of those it reads in part."""
    prompts = load_prompts(cfg.prompts)
    everything = (*prompts.train, *prompts.heldout)
    if backbone.unknown_words(" ".join(dict.fromkeys(" ".join(everything).split()))):  # once, before one by one
        for prompt in everything:
            check_prompt(prompt, backbone.unknown_words, where="prompts")
    if prompts.dropped:
        warn(f"{prompts.dropped} were there already and are left out", where="prompts")
    misread = Counter(filter(None, map(backbone.misread, everything)))
    for how, count in misread.items():
        warn(f"{count} of {len(everything)} are {how}", where="prompts")
    return prompts


def build_roles(cfg: DistillConfig, backbone: PipelineBackbone) -> tuple[PipelineBackbone, PipelineBackbone]:
    """Student and teacher: models of their own, or adapters on one denoiser; a frozen teacher is the base itself."""
    has_average = isinstance(cfg.teacher, EmaTeacher)
    match cfg.student.weights:
        case FullWeights():
            student, teacher = backbone.twin(), backbone.twin() if has_average else backbone
        case LoraWeights() as lora:
            with torch.random.fork_rng(devices=[]):  # A is drawn at random: by the run's seed
                torch.default_generator.manual_seed(cfg.seed)
                student = backbone.adapted("student", lora)
            average = lora.model_copy(update={"dtype": "float32"})  # small steps vanish in bfloat16
            teacher = backbone.adapted("teacher", average) if has_average else backbone
            if has_average:  # the average starts where the student does
                update_ema(teacher.weights, student.weights, decay=0.0)
    for weight in teacher.weights.values():
        weight.requires_grad = False
    use_levers(cfg.compute, student, teacher)
    return student, teacher


def prepare_run(cfg: DistillConfig, run: RunFolder, *, resume: bool, overwrite: bool) -> bool:
    """Claim the run's folder, or check that the run in it may be continued with this configuration.

    What a killed process left half-written in it is removed.

    Returns:
        Whether a run of exactly this configuration goes on.

    Raises:
        UserError: the folder holds something and neither flag is given, or `resume` meets another configuration.
    """
    run.tidy()
    before = None
    if claim_run(run.root, resume=resume, overwrite=overwrite):
        run.check_entries()
        before = load_config(DistillConfig, str(run.config.resolve()), group="distill")
        refuse_changes(run.root, changed_keys(before, cfg))
    write_resolved(cfg, run.config)
    return before == cfg


def train_student(
    cfg: DistillConfig,
    run: RunFolder,
    runtime: Runtime,
    *,
    resume: bool,
    overwrite: bool,
    milestones: Collection[int] = (),
) -> PipelineBackbone | None:
    """Train a student; everything that can be wrong with the configuration is found before the folder is touched.

    It is kept on its way as well, after each of the `milestones`.

    Returns:
        The student, which only its checkpoints hold whole if its weights are split; None on a reward rank.
    """
    if runtime.serves_reward:
        serve_rewards(cfg, runtime)
        return None
    for steps in cfg.student.num_steps:
        _check_horizons(cfg, steps)
    if cfg.parallel.shard and runtime.trainers == 1:
        raise UserError("one process has nobody to share the weights with", where="parallel.shard",
                        fix="start more with --gpus and --nodes, or set parallel.shard=false")  # fmt: skip
    check_trackers(cfg.tracking.trackers)
    rows = runtime.rows(cfg.training.batch_size)
    cfg.training.parts(rows.stop - rows.start)
    # No name for the base: where both roles have weights of their own, its memory is free again.
    text = cached_text(cfg, run.text)
    student, teacher = build_roles(cfg, build_backbone(cfg, runtime.device, text=text))
    prompts = checked_prompts(cfg, student)
    split_roles(cfg, student, teacher, runtime)
    method = build_method(cfg, student, teacher, runtime)
    try:
        judges = None
        if not isinstance(method.reward, RemoteReward):  # whose own process has checked it
            everything = (*prompts.train, *prompts.heldout)
            judges = check_rewards(cfg, method.reward, everything, runtime.device, student.latent_shape(cfg.clip.spec))
        if cfg.guard is not None or cfg.validation is not None:
            judges = judges or build_judges(cfg, method.reward, runtime.device)
        guard = None
        if cfg.guard is not None and judges is not None:
            guard = build_guard(cfg, cfg.guard, judges, prompts.heldout, run, runtime)
        observers = build_observers(cfg, judges, student, prompts.heldout, run, guard, runtime)
        observers.append(Milestones(milestones, student.weights, run, runtime))
        del judges  # what nobody needs any more makes room
        runtime.wait()  # all have looked at the folder before one changes it
        if runtime.is_main:
            goes_on = prepare_run(cfg, run, resume=resume, overwrite=overwrite)
            save_text(cfg, student, run.text)
            if can_plan(cfg) and not (goes_on and run.plan.is_file()):
                shares = runtime.trainers // runtime.context
                write_json(run.plan, plan_of_run(cfg, Builders(prepare_base, build_roles), runtime.device, shares))
            _record(cfg, run, student, runtime)
        runtime.wait()
        train_loop(method, cfg, prompts.train, run, runtime, guard, observers)
    finally:
        if isinstance(method.reward, RemoteReward):
            method.reward.close()
    return student


def _record(cfg: DistillConfig, run: RunFolder, student: PipelineBackbone, runtime: Runtime) -> None:
    """Write down and say what the run computes with."""
    world = runtime.trainers + runtime.reward_ranks
    in_force = describe(cfg, student) | ({"processes": str(world)} if world > 1 else {})
    record_session(run.environment, {**environment(runtime.device), "seeds": _seeds(cfg), **in_force})
    shown = "; ".join(f"{key} {value}" for key, value in in_force.items())
    print(f"distill on {runtime.device}: {shown}", file=sys.stderr)  # noqa: T201


def _seeds(cfg: DistillConfig) -> dict[str, int]:
    return {"training": cfg.seed} | ({} if cfg.guard is None else {"guard": cfg.seed + SEED_OFFSET})


def _check_horizons(cfg: DistillConfig, student_steps: int) -> None:
    if not cfg.method.uses_teacher:
        return
    weights = cfg.method.shaping.horizon_weights if isinstance(cfg.method, RatsMethod | ImitationMethod) else None
    if weights is not None and (len(weights) != student_steps or sum(weights) == 0):
        raise UserError(
            f"needs {student_steps} weights that are not all 0, got {list(weights)}",
            where="method.shaping.horizon_weights", fix="one a student step, or null",
        )  # fmt: skip
    if cfg.teacher.num_steps < student_steps:
        raise UserError(
            f"{cfg.teacher.num_steps} is fewer than the student's {student_steps}", where="teacher.num_steps"
        )
