"""The needs of a run from the counts of its traces: network calls, TFLOPs, seconds, with its memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from rats_video.backbones.compute import FullWeightsConfig
from rats_video.distillation.settings import DistillConfig
from rats_video.planning.devices import Device
from rats_video.planning.memory import Memory, TracedCosts, estimate_memory
from rats_video.planning.reading import Reading
from rats_video.planning.trace import FLOPS, PICTURES, TRAFFIC
from rats_video.planning.watched import CRITIC, CRITIC_PIXELS, PIXELS, SAMPLES, SCORES, STUDENT, TEACHER, TEACHER_PIXELS

UNPACKING = "unpacking the base"


def network_calls(cfg: DistillConfig, calls: Mapping[str, float], rounds: int) -> dict[str, float]:
    """Network evaluations a clip and a step, averaged over the run; guidance makes two of one.

    Args:
        cfg: of the run.
        calls: by phase, of one teacher rollout and one critic's round.
        rounds: of the critic.
    """
    teacher, found = cfg.teacher, {}
    if TEACHER in calls:
        share = 1 + teacher.guided_share(cfg.training.steps)
        found["teacher"] = teacher.num_steps * share * rollouts_per_clip(cfg, calls)
    policy = cfg.method.policy_samples * sum(cfg.student.num_steps) / len(cfg.student.num_steps)
    found["student"] = calls[STUDENT] - policy
    others = {"policy": policy, "scores": calls.get(SCORES, 0.0)}
    others["critic"] = rounds * (calls.get(SAMPLES, 0.0) + calls.get(CRITIC, 0.0))
    return found | {name: count for name, count in others.items() if count}


def rollouts_per_clip(cfg: DistillConfig, calls: Mapping[str, float]) -> float:
    """Teacher rollouts a clip and a step: some serve several updates, some clips do without, and some methods."""
    return cfg.teacher.asked / cfg.teacher.reuse if TEACHER in calls else 0.0


def estimate_tflops(cfg: DistillConfig, counted: TracedCosts) -> dict[str, float]:
    """TFLOPs of one step by phase, averaged over the run."""
    step, decode, reward, calls = counted.step, counted.decode, counted.reward, counted.calls
    rollouts, scored = rollouts_per_clip(cfg, calls), calls.get(PIXELS, 0.0)
    judged = rollouts * (TEACHER_PIXELS in calls)  # a teacher that is only followed is not decoded
    in_graph, is_judged = scored * cfg.method.pixel_gradient, cfg.method.uses_gradient == cfg.method.pixel_gradient
    is_guided = cfg.teacher.guided_share(cfg.training.steps) > 0  # the traced call is two evaluations then
    teacher = network_calls(cfg, calls, counted.rounds).get("teacher", 0.0) / (2 if is_guided else 1)
    if cfg.method.uses_trajectory:  # all of it was traced
        teacher /= cfg.teacher.num_steps

    def of_step(phase: str, calling: str) -> float:
        """What a phase of the traced step computes, for as many calls as there are on average."""
        flops, rounds = step.get((phase, FLOPS), 0.0), counted.rounds if phase.startswith("critic") else 1
        return flops * rounds * calls[calling] / counted.traced[calling] if flops else 0.0

    found = {
        PICTURES: counted.pictures.get((PICTURES, FLOPS), 0.0) * counted.clips,
        "text": 0.0 if cfg.compute.cache_text else
                counted.text.get(("text", FLOPS), 0.0) * (1 + rollouts + counted.rounds),
        "critic samples": of_step("critic samples", SAMPLES),
        "critic forward": of_step("critic forward", CRITIC),
        "critic backward": of_step("critic backward", CRITIC),
        "critic decode": decode["teacher decode", FLOPS] * counted.rounds * calls.get(CRITIC_PIXELS, 0.0),
        "teacher rollout": step.get((TEACHER, FLOPS), 0.0) * teacher,
        "teacher decode": decode["teacher decode", FLOPS] * judged,
        "teacher reward": reward["teacher reward", FLOPS] * judged,
        "student rollout": of_step("student rollout", STUDENT),
        "scores": of_step("scores", SCORES),
        "student decode": decode["student decode", FLOPS] * scored,
        "student reward": reward["student reward", FLOPS] * scored * is_judged,
        "reward backward": reward.get(("reward backward", FLOPS), 0.0) * in_graph,
        "decode backward": decode.get(("decode backward", FLOPS), 0.0) * in_graph,
        "student backward": of_step("student backward", STUDENT),
    }  # fmt: skip
    return {name: flops * counted.micro_batches / 1e12 for name, flops in found.items()}


def _of_one_clip(counted: TracedCosts, clips: int) -> dict[str, float]:
    """TFLOPs of one network evaluation, one decode and one reward, of a clip."""
    traced = 1e12 * clips / counted.micro_batches
    return {
        STUDENT: counted.step[STUDENT, FLOPS] / (counted.traced[STUDENT] * traced),
        "teacher decode": counted.decode["teacher decode", FLOPS] / traced,
        "teacher reward": counted.reward["teacher reward", FLOPS] / traced,
    }


def estimate_seconds(cfg: DistillConfig, tflops: Mapping[str, float], device: Device) -> dict[str, float]:
    """Seconds of one step by phase: TFLOPs over the device's peak in that precision and its utilisation."""
    denoising = device.half if cfg.compute.dtype == "bfloat16" else device.single
    ours = ("text", TEACHER, STUDENT, SCORES, SAMPLES, CRITIC, "critic backward", "student backward")
    rates = dict.fromkeys(ours, denoising)
    if cfg.compute.decode.dtype == "bfloat16":
        rates |= dict.fromkeys(("teacher decode", "critic decode", "student decode", "decode backward"), device.half)
    rates |= dict.fromkeys(("teacher reward", "student reward", "reward backward"), device.single)
    return {name: count / (rates.get(name, device.conv) * device.utilisation) for name, count in tflops.items()}


def unpacking_seconds(cfg: DistillConfig, counted: TracedCosts, device: Device) -> float:
    """Seconds of a step in which a base in few bits is written out, once a call whatever its batch; 0 for one in full.

    Its operators wait for the device's memory alone. A backward writes it out again, and so does a recomputed block.
    """
    calls, numbers = counted.calls, cfg.student.num_steps
    again = 2 if cfg.compute.activation_checkpointing else 1
    backward = sum(map(cfg.student.most_gradient_steps, numbers)) / len(numbers)
    found = cfg.teacher.num_steps * rollouts_per_clip(cfg, calls) + calls[STUDENT] + again * backward
    found += calls.get(SCORES, 0.0) + counted.rounds * (calls.get(SAMPLES, 0.0) + (1 + again) * calls.get(CRITIC, 0.0))
    traffic = counted.step.get(("low bit", TRAFFIC), 0.0)
    return counted.micro_batches * found * traffic / (device.bandwidth * 1e9)


def guard_seconds(cfg: DistillConfig, call: float, seen: float, gpus: int) -> float:
    """Seconds that the guard's evaluations take: one of the teacher, the others of the student.

    Args:
        cfg: of the run.
        call: seconds of a network evaluation of a clip.
        seen: seconds of decoding a clip and scoring it by both rewards.
        gpus: processes, which share the guard's clips.
    """
    if cfg.guard is None:
        return 0.0
    teacher = cfg.teacher
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
    tflops, nfe = estimate_tflops(cfg, counted), network_calls(cfg, counted.calls, counted.rounds)
    seconds = estimate_seconds(cfg, tflops, device)
    if (unpacking := unpacking_seconds(cfg, counted, device)) > 0:
        seconds[UNPACKING] = unpacking
    looks = estimate_seconds(cfg, _of_one_clip(counted, clips), device)
    seen = looks["teacher decode"] + 2 * looks["teacher reward"]  # the held-out reward's cost is taken to be the same
    return Plan(
        source=source, device=device, gpus=gpus, clips=clips,
        parameters={part: round(count) for (phase, part), count in counted.step.items() if phase == "parameters"},
        memory=estimate_memory(cfg, counted, gpus),
        nfe=nfe, tflops=tflops, seconds=seconds,
        steps=cfg.training.steps, horizons=horizons, guard=guard_seconds(cfg, looks[STUDENT], seen, gpus),
        reading=reading,
        is_full=isinstance(cfg.student.weights, FullWeightsConfig),
    )  # fmt: skip
