"""A plan as text: tables, the assumptions behind them, and what to set where it does not fit."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rats_video.planning.estimate import UNPACKING, Plan
from rats_video.planning.memory import CONTEXT, FRAGMENTED, GIB
from rats_video.planning.memory_options import MemoryOption
from rats_video.planning.reading import READ_RATE, Reading

SHOWN = 0.005  # GiB or TFLOPs; smaller rows are left out where there are larger ones
CPU_TRUST = [
    "  A CPU's convolutions take a work area, which is counted; its speed is a guess from one matrix product.",
]
GPU_TRUST = [
    f"  {FRAGMENTED - 1:.0%} for the allocator and {CONTEXT / GIB:g} GiB for CUDA are assumed beside it. What cuDNN",
    "  takes while it convolves is not counted. Seconds are TFLOPs over an assumed share of the device's peak",
    "  (--utilisation); small operations and waiting come on top.",
]


def plan_lines(plan: Plan) -> list[str]:
    """The plan as lines of text."""
    memory, device = plan.memory, plan.device
    unit, scale = ("GiB", GIB) if memory.peak > GIB / 2 else ("MiB", 2**20)
    at_peak = memory.phases[memory.fullest]
    held = [(part, size / scale) for part, size in memory.held.items()]
    held += [(f"{owner} (at the peak, {memory.fullest})", size / scale) for owner, size in at_peak.items()]
    calls = ", ".join(f"{role} {count:g}" for role, count in plan.nfe.items())
    share = f"{device.utilisation:.0%} of {'the measured matrix product' if device.is_cpu else 'its data sheet'}"
    return [
        f"Architecture: {plan.source}; {plan.clips} clips a step on each of {plan.gpus} x {device.name}",
        "",
        *_table("parameters", "", [(part, float(count)) for part, count in plan.parameters.items()], "{:,.0f}"),
        "",
        *_table("memory of one device", unit, held, "{:.2f}", total="peak of live tensors"),
        *([] if device.is_cpu else [f"  {'needed of a GPU':<52}{memory.needed / GIB:>14.2f} GiB"]),
        "",
        *_reading(plan.reading, unit, scale),
        "",
        f"network calls a clip and step (NFE): {calls}",
        "",
        *_table("compute of a step", "TFLOPs", list(plan.tflops.items()), "{:.2f}", total="a step"),
        f"  expected: {plan.seconds_per_step:.3g} s a step, {plan.hours:.3g} h for {plan.steps} steps ({share})",
        *_unpacking(plan),
        *([f"  and the guard's looks: {plan.guard / 3600:.2g} h"] if plan.guard else []),
        "",
        "matched noise levels (student: teacher)",
        *_horizons(plan),
        "",
        "How this was found, and how far to trust it:",
        "  The run's own step was carried out on tensors without values, for a shallow denoiser and one with a block",
        "  more; all else follows in proportion. Memory is of live tensors from the second step on.",
        *(CPU_TRUST if device.is_cpu else GPU_TRUST),
        *(["  What parallel.shard saves is arithmetic, not run; parallel.context is not counted."] * (plan.gpus > 1)),
    ]


def advice_lines(plan: Plan, gpu_memory: float, options: Sequence[MemoryOption] | None, best: Plan) -> list[str]:
    """Lines that say if a run fits, and the cheapest settings that make it fit.

    Args:
        plan: as configured.
        gpu_memory: GiB there are.
        options: the cheapest that fit; empty if none is needed, None if none suffices.
        best: the plan with those options, or with all of them where none suffices.
    """
    needed, least = plan.memory.needed / GIB, best.memory.needed / GIB
    if options is None:
        lines = [f"Does not fit into {gpu_memory:g} GiB: even with every lever it needs {least:.1f} GiB."]
        if plan.gpus == 1:
            lines += ["More --gpus share the weights with parallel.shard=true; a shorter or smaller clip needs less."]
        return lines
    if not options:
        return [f"Fits into {gpu_memory:g} GiB: it needs {needed:.1f} GiB."]
    return [
        f"Does not fit into {gpu_memory:g} GiB: it needs {needed:.1f} GiB.",
        f"The cheapest settings that fit need {least:.1f} GiB:",
        *(f"  --set {option.setting:<44} # {option.cost}" for option in options),
    ]


def _table(title: str, unit: str, rows: Iterable[tuple[str, float]], form: str, *, total: str = "total") -> list[str]:
    rows = list(rows)
    whole = sum(value for _, value in rows)
    shown = [(name, value) for name, value in rows if value > min(SHOWN, whole / 1000)]
    return [
        f"{title}{f', {unit}' if unit else ''}",
        *(f"  {name:<52}{form.format(value):>14}" for name, value in [*shown, (total, whole)]),
    ]


def _unpacking(plan: Plan) -> list[str]:
    seconds = plan.seconds.get(UNPACKING, 0.0)
    if seconds == 0.0:
        return []
    share = seconds / plan.seconds_per_step
    return [f"  of these {seconds:.3g} s ({share:.1%}) unpack the base's matrices, for each call and in backward"]


def _reading(reading: Reading, unit: str, scale: int) -> list[str]:
    host = [
        f"  {'host memory meanwhile, each process':<52}{reading.host / scale:>14.2f}",
        f"  expected: {reading.seconds:.2g} s at {READ_RATE / 1e9:g} GB/s",
    ]
    rows = [(part, size / scale) for part, size in reading.disk.items()]
    return [*_table("reading the model from disk", unit, rows, "{:.2f}"), *host[: 1 + bool(rows)]]


def _horizons(plan: Plan) -> list[str]:
    lines = []
    for row in plan.horizons:
        teacher = " and ".join(f"{sigma:.4f}" for sigma in row["teacher"])
        how = "" if row["residual"] < 1e-6 else f", interpolated (nearest is {row['residual']:.4f} off)"
        expert = f", made by {row['expert']}" if "expert" in row else ""
        lines.append(f"  {row['num_steps']} steps  {row['student']:.4f}: {teacher}{how}{expert}")
    return lines
