"""The traces behind a plan: the run's own models and step on meta tensors; no weights are read."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from rats_video.backbones.architecture import build_on_meta, find_architecture, with_depths
from rats_video.backbones.base import PipelineBackbone
from rats_video.backbones.compute import ComputeConfig
from rats_video.backbones.text_cache import TextCache
from rats_video.distillation.roles import prepare_base
from rats_video.distillation.run_rewards import loss_reward_on_meta
from rats_video.distillation.settings import DistillConfig
from rats_video.errors import UserError
from rats_video.meta import META
from rats_video.planning.batch import longest_prompt, planned_batch
from rats_video.planning.devices import Device, detect_device
from rats_video.planning.estimate import Plan, make_plan
from rats_video.planning.horizons import horizon_rows
from rats_video.planning.memory import TracedCosts
from rats_video.planning.memory_tracker import MemoryTracker, Workspace, cpu_workspace, no_workspace
from rats_video.planning.reading import Reading, plan_reading
from rats_video.planning.trace import (
    FLOPS,
    Counts,
    at_full_depth,
    count_weights,
    given_pictures,
    trace_decode,
    trace_pictures,
    trace_reward,
    trace_step,
    trace_text,
)
from rats_video.planning.watched import PlannedRun, count_calls, simulated
from rats_video.rewards.latent import LatentRewardConfig
from rats_video.types import PromptBatch, Reward

OF_THE_DENOISER = ("dtype", "quantization", "activation_checkpointing", "activation_offload")
"""Settings of `compute` that decide what a trace of the denoiser counts."""


def can_plan(cfg: DistillConfig) -> bool:
    """True unless the method is a user's own code, which a plan does not run."""
    return cfg.method.kind != "custom"


class PlanBuilder:
    """Traces of one model on one kind of device, each made once however many settings are tried.

    Args:
        cfg: the run.
        device: decides what operators take for themselves.
        gpus: processes that share a batch.

    Raises:
        UserError: the method is the user's own code.
    """

    def __init__(self, cfg: DistillConfig, device: Device, gpus: int) -> None:
        if not can_plan(cfg):
            raise UserError(
                "is code of your own, which plan does not run", where="method.kind", fix="plan a packaged method"
            )
        self._architecture = find_architecture(cfg.model, cfg.architecture, cfg.backbone)
        self._cpu, self._gpus = device.is_cpu, gpus
        self._made: dict[str, Any] = {}
        self._prompt = longest_prompt(cfg, has_tokenizer=self._architecture.folder is not None)

    @property
    def source(self) -> str:
        """The place that the architecture was read from."""
        return self._architecture.source

    def plan(self, cfg: DistillConfig, device: Device) -> Plan:
        """The plan of these settings.

        Raises:
            UserError: the model cannot make such a clip, or no layer is called as the adapter's targets say.
        """
        most = max(cfg.student.num_steps)
        longest = simulated(cfg, most)[-1]
        counted = TracedCosts(
            step=self._step(longest),
            decode=self._decode(cfg),
            reward=self._scores(cfg),
            text=self._text(cfg),
            pictures=self._pictures(cfg),
            blocks=sum(self._architecture.depths.values()),
            calls=self.calls(cfg),
            traced=self._counted(longest, most),
            micro_batches=self._micro_batches(cfg),
            rounds=cfg.method.critic_rounds,
            clips=self._clips(cfg),
        )
        base = self._base(cfg)
        return make_plan(
            cfg, counted, device, gpus=self._gpus, clips=self._share(cfg), source=self.source,
            horizons=tuple(horizon_rows(cfg, base)), reading=self._reading(cfg),
        )  # fmt: skip

    def _once(self, key: str, make: Callable[[], Any]) -> Any:
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]

    def _share(self, cfg: DistillConfig) -> int:
        """Clips of a process and an update."""
        return -(-cfg.training.batch_size // self._gpus)

    def _micro_batches(self, cfg: DistillConfig) -> int:
        return cfg.training.num_micro_batches(self._share(cfg))

    def _clips(self, cfg: DistillConfig) -> int:
        """Clips that a process works on at a time."""
        return self._share(cfg) // self._micro_batches(cfg)

    @property
    def can_window(self) -> bool:
        """True if the family's VAE can decode some latent frames with gradient and the others without."""
        return self._architecture.family.exact_window

    def can_be_small(self, cfg: DistillConfig) -> bool:
        """True if there may be a small decoder for the model's latents, and it is smaller than the VAE."""
        base = self._base(cfg)
        is_large = sum(weight.numel() for weight in base.vae.parameters()) > 2e7  # twice a TAEHV's
        return base.has_small_decoder and is_large and base.spatial_stride in {8, 16} and base.temporal_stride in {4, 8}

    def _base(self, cfg: DistillConfig) -> PipelineBackbone:
        """The model with a denoiser of one block, for all that does not depend on its depth."""
        dtype = cfg.compute.dtype
        shallow = self._architecture.cut(dict.fromkeys(self._architecture.depths, 1))
        base: PipelineBackbone = self._once(f"base {dtype}", lambda: build_on_meta(shallow, getattr(torch, dtype)))
        prepare_base(cfg, base, META)
        return base

    def _quantization(self, cfg: DistillConfig) -> str:
        """The base's bits: the run's, or those it is stored in."""
        asked = cfg.compute.quantization
        return self._architecture.quantization if asked == "none" else asked

    def _reading(self, cfg: DistillConfig) -> Reading:
        compute, bits = cfg.compute, self._quantization(cfg)
        key = f"reading {compute.dtype} {bits} {compute.offload} {cfg.parallel.shard}"
        reading: Reading = self._once(key, lambda: plan_reading(cfg, self._architecture, bits, is_cpu=self._cpu))
        return reading

    def _text(self, cfg: DistillConfig) -> Counts:
        def run() -> Counts:
            return trace_text(self._base(cfg), [self._prompt] * self._clips(cfg))

        numbers: Counts = self._once(f"text {cfg.compute.dtype} {self._clips(cfg)}", run)
        return numbers

    def calls(self, cfg: DistillConfig) -> dict[str, float]:
        """Network evaluations by phase, and decoded clips, a clip and step, averaged over the student's step counts.

        Of a critic one round counts, and of the teacher a rollout of every update.
        """
        each = [_mean([self._counted(one, n) for one in simulated(cfg, n)]) for n in cfg.student.num_steps]
        return _mean(each)

    def _counted(self, cfg: DistillConfig, num_steps: int) -> dict[str, float]:
        """The same at one step count: the method's own step, by roles that compute nothing."""

        def run() -> dict[str, float]:
            base = self._base(cfg)
            base.text_cache = self._once(f"text {cfg.compute.dtype}", lambda: self._text_cache(cfg))
            return count_calls(cfg, base, self._batch(cfg, base, num_steps))

        key = f"calls {cfg.student!r} {cfg.compute.dtype} {self._clips(cfg)} {num_steps}"
        numbers: dict[str, float] = self._once(key, run)
        return numbers

    def _batch(self, cfg: DistillConfig, backbone: PipelineBackbone, num_steps: int | None = None) -> PromptBatch:
        steps = num_steps or max(cfg.student.num_steps)
        batch = planned_batch(cfg, backbone, self._prompt, self._clips(cfg), steps)
        if not cfg.prompts.first_frame:
            return batch
        return replace(batch, given=given_pictures(self._base(cfg), cfg.clip.spec, len(batch.prompts)))

    def _pictures(self, cfg: DistillConfig) -> Counts:
        if not cfg.prompts.first_frame:
            return {}
        key = f"pictures {cfg.compute.dtype} {cfg.compute.decode.dtype}"
        numbers: Counts = self._once(key, lambda: trace_pictures(self._base(cfg), cfg.clip.spec))
        return numbers

    def _step(self, cfg: DistillConfig) -> Counts:
        """The share of the denoiser: its weights and its calls."""
        compute = ComputeConfig(**{name: getattr(cfg.compute, name) for name in OF_THE_DENOISER})
        cfg = cfg.model_copy(update={"compute": compute})
        micro_batches, is_gpu = self._micro_batches(cfg), not self._cpu
        key = f"step {cfg.student!r} {compute!r} {self._clips(cfg)}"

        def at(depths: Mapping[str, int]) -> Counts:
            base = with_depths(self._base(cfg), self._architecture, depths, self._quantization(cfg))
            prepare_base(cfg, base, META)
            base.text_cache = self._once(f"text {compute.dtype}", lambda: self._text_cache(cfg))
            run = PlannedRun.on_meta(cfg, base, self._batch(cfg, base))
            found = trace_step(run, micro_batches=micro_batches, foreach=is_gpu)
            return found | count_weights(run, base, self._reward(cfg))

        numbers: Counts = self._once(key, lambda: at_full_depth(at, self._architecture.depths))
        return numbers

    def _text_cache(self, cfg: DistillConfig) -> TextCache:
        with MemoryTracker():
            prompts = (self._prompt, cfg.teacher.negative_prompt)
            return TextCache({prompt: self._base(cfg).encode_text([prompt]) for prompt in prompts})

    def _reward(self, cfg: DistillConfig) -> Reward:
        reward: Reward = self._once("reward", lambda: loss_reward_on_meta(cfg))
        return reward

    @property
    def _workspace(self) -> Workspace:
        return cpu_workspace if self._cpu else no_workspace

    def _decode(self, cfg: DistillConfig) -> Counts:
        """The share of the VAE: nothing where neither reward nor discriminator needs pixels."""
        judged = cfg.method.pixel_gradient == cfg.method.uses_gradient  # by the reward alone
        if isinstance(cfg.reward, LatentRewardConfig) and judged:
            return dict.fromkeys((("teacher decode", FLOPS), ("student decode", FLOPS)), 0.0)

        def run() -> Counts:
            base = self._base(cfg)
            return trace_decode(
                base, self._batch(cfg, base), with_gradient=cfg.method.pixel_gradient, workspace=self._workspace
            )

        numbers: Counts = self._once(f"decode {cfg.compute.decode!r} {self._clips(cfg)}", run)
        return numbers

    def _scores(self, cfg: DistillConfig) -> Counts:
        """The share of the reward."""

        def run() -> Counts:
            clip, clips = cfg.clip, self._clips(cfg)
            size = (clip.num_frames, 3, clip.height, clip.width)
            if isinstance(cfg.reward, LatentRewardConfig):
                size = self._base(cfg).latent_shape(clip.spec)
            return trace_reward(
                self._reward(cfg), torch.empty(clips, *size, device=META),
                [self._prompt] * clips, with_gradient=cfg.method.uses_gradient, workspace=self._workspace,
            )  # fmt: skip

        numbers: Counts = self._once(f"scores {self._clips(cfg)}", run)
        return numbers


def plan_of_run(cfg: DistillConfig, device: torch.device, processes: int = 1) -> dict[str, Any]:
    """The plan that a run keeps, as JSON, for the device it is about to run on.

    Args:
        cfg: of the run.
        device: of this process.
        processes: that share a batch.
    """
    where = detect_device(device)
    return PlanBuilder(cfg, where, processes).plan(cfg, where).as_json()


def _mean(each: Sequence[dict[str, float]]) -> dict[str, float]:
    return {phase: sum(found[phase] for found in each) / len(each) for phase in each[0]}
