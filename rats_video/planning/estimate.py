"""The needs of a run from the counts of its traces: memory by part, network calls, TFLOPs, seconds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from rats_video.backbones.compute import FullWeightsConfig
from rats_video.distillation.settings import DistillConfig
from rats_video.planning.devices import Device
from rats_video.planning.reading import Reading
from rats_video.planning.trace import AVERAGE, DENOISER, FLOPS, HELD, PICTURES, TEXT, TRAFFIC, TRAINED, Counts

UNPACKING = "unpacking the base"
GIB = 2**30
FRAGMENTED, CONTEXT = 1.05, 0.75 * GIB  # what a GPU must hold beyond live tensors: rounding and holes; CUDA itself


@dataclass(frozen=True)
class TracedCosts:
    """Counts of the traces of a configuration.

    Args:
        step: the denoiser's share of a step, and the weights.
        decode: of the latents.
        reward: of the clips.
        text: encoding the prompts of a batch.
        pictures: encoding the picture of one clip; nothing where clips are made from text alone.
        blocks: how many blocks the denoiser has.
        num_steps: student steps that were run.
        micro_batches: how many traced steps make an update of a process.
        clips: of a traced step.
    """

    step: Counts
    decode: Counts
    reward: Counts
    text: Counts
    pictures: Counts
    blocks: int
    num_steps: int
    micro_batches: int
    clips: int


@dataclass(frozen=True)
class Memory:
    """Bytes on one device.

    Args:
        held: always there, by part.
        phases: beside that, at each phase's fullest moment: bytes by the phase that allocated them.
    """

    held: Mapping[str, float]
    phases: Mapping[str, Mapping[str, float]]

    @property
    def fullest(self) -> str:
        """The phase with the peak."""
        return max(self.phases, key=lambda name: sum(self.phases[name].values()))

    @property
    def peak(self) -> float:
        """Bytes of live tensors, as `torch.cuda.max_memory_allocated` shows them."""
        return sum(self.held.values()) + sum(self.phases[self.fullest].values())

    @property
    def needed(self) -> float:
        """Bytes of a GPU, with the allocator's holes and the CUDA context."""
        return self.peak * FRAGMENTED + CONTEXT


def estimate_memory(cfg: DistillConfig, counted: TracedCosts, gpus: int = 1) -> Memory:
    """Live bytes of the second and later steps (the first has no optimizer state yet), on each of `gpus` devices."""
    weights = {part: size for (phase, part), size in counted.step.items() if phase == "weights"}
    trained = counted.step["parameters", TRAINED]
    eight_bit = cfg.training.optimizer.kind == "adamw8bit"
    held = {**weights, "optimizer": trained * 2.004 if eight_bit else 2 * weights[TRAINED]}  # 8 bytes a block of 2048
    phases = _phases(counted)
    if cfg.compute.cache_text:
        held[TEXT] = 0.0
        phases.pop("text", None)
    two_blocks = min(1.0, 2 / counted.blocks)  # the one at work and the one on its way
    if cfg.compute.offload != "none":
        held[DENOISER] *= two_blocks
    if cfg.parallel.shard and gpus > 1:
        gathered = two_blocks * max(held[DENOISER], held[TRAINED])
        held |= {part: held[part] / gpus for part in (DENOISER, TRAINED, AVERAGE, "optimizer") if part in held}
        held["gathered blocks"] = gathered
        spared = weights[TRAINED] * (1 - 1 / gpus)
        for phase in phases.values():
            for owner in ("gradients", "student backward"):
                phase[owner] = max(0.0, phase.get(owner, 0.0) - spared)
    return Memory(
        {part: size for part, size in held.items() if size > 0},
        {name: {owner: size for owner, size in parts.items() if size > 0} for name, parts in phases.items()},
    )


def _phases(counted: TracedCosts) -> dict[str, dict[str, float]]:
    """The step in order, decode and reward on top of what the denoiser holds when they come."""
    step, decode = counted.step, counted.decode
    phases = {
        name: _parts(step, name) for name in ("teacher rollout", "student rollout", "student backward", "optimizer")
    }
    for role in ("teacher", "student"):
        before = _held(step, f"{role} pixels")
        phases[f"{role} decode"] = _add(before, _parts(decode, f"{role} decode"))
        decoded = _add(before, _held(decode, f"{role} reward"))
        phases[f"{role} reward"] = _add(decoded, _parts(counted.reward, f"{role} reward"))
    before = _held(step, "student pixels")
    decoded = _add(before, _held(decode, "student reward"))
    phases["reward backward"] = _add(decoded, _parts(counted.reward, "reward backward"))
    phases["decode backward"] = _add(before, _parts(decode, "decode backward"))
    if counted.pictures:
        phases[PICTURES] = _add(_held(step, "optimizer"), _parts(counted.pictures, PICTURES))
    phases["text"] = _add(_held(step, "teacher rollout"), _parts(counted.text, "text"))
    return phases


def _parts(numbers: Counts, phase: str) -> dict[str, float]:
    return {
        owner: size for (name, owner), size in numbers.items()
        if name == phase and owner != FLOPS and not owner.startswith(HELD)
    }  # fmt: skip


def _held(numbers: Counts, phase: str) -> dict[str, float]:
    return {
        owner.removeprefix(HELD): size
        for (name, owner), size in numbers.items()
        if name == phase and owner.startswith(HELD)
    }


def _add(one: Mapping[str, float], other: Mapping[str, float]) -> dict[str, float]:
    return {
        name: one.get(name, 0.0) + other.get(name, 0.0) for name in [*one, *(key for key in other if key not in one)]
    }


def network_calls(cfg: DistillConfig) -> dict[str, float]:
    """Network evaluations a clip and a step, averaged over the run; guidance makes two of one."""
    teacher = cfg.teacher
    student = sum(cfg.student.num_steps) / len(cfg.student.num_steps)
    calls = {
        "teacher": teacher.num_steps * (1 + teacher.guided_share(cfg.training.steps)) * rollouts_per_clip(cfg),
        "student": student,
    }
    return calls | ({"policy": cfg.method.policy_samples * student} if cfg.method.policy_samples else {})


def rollouts_per_clip(cfg: DistillConfig) -> float:
    """Teacher rollouts a clip and a step: some serve several updates, and some clips do without."""
    return cfg.teacher.asked / cfg.teacher.reuse


def estimate_tflops(cfg: DistillConfig, counted: TracedCosts) -> dict[str, float]:
    """TFLOPs of one step by phase, averaged over the run."""
    step, decode, reward, rollouts = counted.step, counted.decode, counted.reward, rollouts_per_clip(cfg)
    scored = 1 + cfg.method.policy_samples  # student clips; the traced step itself calls the network for all of them
    student = network_calls(cfg)["student"] / counted.num_steps
    is_guided = cfg.teacher.guided_share(cfg.training.steps) > 0  # the traced call is two evaluations then
    teacher = network_calls(cfg)["teacher"] / (2 if is_guided else 1)
    found = {
        PICTURES: counted.pictures.get((PICTURES, FLOPS), 0.0) * counted.clips,
        "text": 0.0 if cfg.compute.cache_text else counted.text.get(("text", FLOPS), 0.0) * (1 + rollouts),
        "teacher rollout": step["teacher rollout", FLOPS] * teacher,
        "teacher decode": decode["teacher decode", FLOPS] * rollouts,
        "teacher reward": reward["teacher reward", FLOPS] * rollouts,
        "student rollout": step["student rollout", FLOPS] * student,
        "student decode": decode["student decode", FLOPS] * scored,
        "student reward": reward["student reward", FLOPS] * scored,
        "reward backward": reward.get(("reward backward", FLOPS), 0.0),
        "decode backward": decode.get(("decode backward", FLOPS), 0.0),
        "student backward": step["student backward", FLOPS] * student,
    }
    return {name: flops * counted.micro_batches / 1e12 for name, flops in found.items()}


def estimate_seconds(cfg: DistillConfig, tflops: Mapping[str, float], device: Device) -> dict[str, float]:
    """Seconds of one step by phase: TFLOPs over the device's peak in that precision and its utilisation."""
    denoising = device.half if cfg.compute.dtype == "bfloat16" else device.single
    rates = {"text": denoising, "teacher rollout": denoising, "student rollout": denoising}
    rates |= {"student backward": denoising}
    if cfg.compute.decode.dtype == "bfloat16":
        rates |= dict.fromkeys(("teacher decode", "student decode", "decode backward"), device.half)
    rates |= dict.fromkeys(("teacher reward", "student reward", "reward backward"), device.single)
    return {name: count / (rates.get(name, device.conv) * device.utilisation) for name, count in tflops.items()}


def unpacking_seconds(cfg: DistillConfig, counted: TracedCosts, device: Device) -> float:
    """Seconds of a step in which a base in few bits is written out, once a call whatever its batch; 0 for one in full.

    Its operators wait for the device's memory alone. A backward writes it out again, and so does a recomputed block.
    """
    teacher = cfg.teacher.num_steps * rollouts_per_clip(cfg)
    again = 2 if cfg.compute.activation_checkpointing else 1
    steps = [num_steps + again * len(cfg.student.gradient_steps(num_steps)) for num_steps in cfg.student.num_steps]
    calls = counted.micro_batches * (teacher + sum(steps) / len(steps))
    return calls * counted.step.get(("low bit", TRAFFIC), 0.0) / (device.bandwidth * 1e9)


def guard_seconds(cfg: DistillConfig, seconds: Mapping[str, float], clips: int, gpus: int) -> float:
    """Seconds that the guard's evaluations take: one of the teacher, the others of the student.

    The held-out reward is taken to cost as much as the trained one.

    Args:
        cfg: of the run.
        seconds: of a step of a process, by phase.
        clips: a process and a step.
        gpus: processes, which share the guard's clips.
    """
    if cfg.guard is None:
        return 0.0
    teacher = cfg.teacher
    call = seconds["teacher rollout"] / (network_calls(cfg)["teacher"] * clips)
    seen = (seconds["teacher decode"] + 2 * seconds["teacher reward"]) / (rollouts_per_clip(cfg) * clips)
    evaluations = len({*range(0, cfg.training.steps, cfg.guard.every), cfg.training.steps})
    calls = evaluations * cfg.student.num_steps[0] + teacher.num_steps * (1 if teacher.guidance_scale == 1.0 else 2)
    return -(-cfg.guard.num_clips // gpus) * (calls * call + (evaluations + 1) * seen)


@dataclass(frozen=True)
class Plan:
    """The expected needs of a run; see `report.py` for how it is shown.

    Args:
        source: where the architecture was read.
        device: on which it is planned, with the assumed utilisation.
        gpus: processes.
        clips: a process and a step, however many it works on at a time.
        parameters: by part.
        memory: held and by phase, bytes.
        nfe: network evaluations a clip and step.
        tflops: of a step, by phase.
        seconds: of a step, by phase.
        steps: of the run.
        horizons: student noise levels with the teacher's they are matched with.
        guard: seconds of the run beside its steps, for the guard's evaluations.
        reading: of the model, before the first step.
    """

    source: str
    device: Device
    gpus: int
    clips: int
    parameters: Mapping[str, int]
    memory: Memory
    nfe: Mapping[str, float]
    tflops: Mapping[str, float]
    seconds: Mapping[str, float]
    steps: int
    horizons: tuple[Mapping[str, Any], ...]
    guard: float
    reading: Reading
    is_full: bool = False

    @property
    def seconds_per_step(self) -> float:
        """Seconds of computing alone."""
        return sum(self.seconds.values())

    @property
    def hours(self) -> float:
        """Hours of the run's steps."""
        return self.seconds_per_step * self.steps / 3600

    def as_json(self) -> dict[str, Any]:
        """For `--json` and a run's plan.json; bytes, TFLOPs and seconds."""
        memory = self.memory
        return {
            **asdict(self),
            "peak_bytes": round(memory.peak), "peak_phase": memory.fullest, "needed_bytes": round(memory.needed),
            "seconds_per_step": self.seconds_per_step, "hours": self.hours, "reading_seconds": self.reading.seconds,
        }  # fmt: skip


def make_plan(cfg: DistillConfig, counted: TracedCosts, device: Device, *, gpus: int, clips: int, source: str,
              horizons: tuple[Mapping[str, Any], ...], reading: Reading) -> Plan:  # fmt: skip
    """Put the estimates together."""
    tflops = estimate_tflops(cfg, counted)
    seconds = estimate_seconds(cfg, tflops, device)
    if (unpacking := unpacking_seconds(cfg, counted, device)) > 0:
        seconds[UNPACKING] = unpacking
    return Plan(
        source=source, device=device, gpus=gpus, clips=clips,
        parameters={part: round(count) for (phase, part), count in counted.step.items() if phase == "parameters"},
        memory=estimate_memory(cfg, counted, gpus),
        nfe=network_calls(cfg), tflops=tflops, seconds=seconds,
        steps=cfg.training.steps, horizons=horizons, guard=guard_seconds(cfg, seconds, clips, gpus),
        reading=reading,
        is_full=isinstance(cfg.student.weights, FullWeightsConfig),
    )  # fmt: skip
