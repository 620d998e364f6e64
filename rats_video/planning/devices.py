"""Speed and memory of devices: from data sheets, or by a quick measurement of a CPU."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from rats_video.errors import UserError

UTILISATION = 0.4  # of a GPU's dense peak; large matrix products reach more, convolutions and small ones less

MEASURED = 0.5  # of the speed of one large matrix product


@dataclass(frozen=True)
class Device:
    """TFLOP/s without sparsity: `half` for bfloat16, `conv` for float32 convolutions (TF32), `single` for float32.

    Args:
        name: as shown.
        memory: GiB; 0 where it is not known.
        half: bfloat16 matrix products.
        conv: float32 convolutions, which torch runs in TF32.
        single: float32 matrix products, which torch does not.
        utilisation: the share of it that is expected.
        bandwidth: GB/s of its memory.
    """

    name: str
    memory: float
    half: float
    conv: float
    single: float
    utilisation: float = UTILISATION
    bandwidth: float = 1000.0

    @property
    def is_cpu(self) -> bool:
        """Measured, not looked up."""
        return self.name == "cpu"


GPUS = {
    device.name: device
    for device in (
        Device("h100", 80, 989, 495, 67, bandwidth=3350),
        Device("h200", 141, 989, 495, 67, bandwidth=4800),
        Device("a100", 80, 312, 156, 19.5, bandwidth=2039),
        Device("l40s", 48, 362, 183, 91.6, bandwidth=864),
        Device("rtx4090", 24, 165, 82.6, 82.6, bandwidth=1008),
    )
}


def find_device(name: str) -> Device:
    """A device by name; "cpu" is measured, which takes some milliseconds.

    Raises:
        UserError: it is not in the table.
    """
    if name == "cpu":
        speed = _matmul_tflops(512, torch.device("cpu"), torch.float32)
        return Device("cpu", 0, speed, speed, speed, MEASURED, _copy_rate(2**24, torch.device("cpu")))
    if name not in GPUS:
        raise UserError(f"no such device: {name}", where="--device-name", fix=f"one of {', '.join([*GPUS, 'cpu'])}")
    return GPUS[name]


def detect_device(device: torch.device) -> Device:
    """The table's entry of the device at hand; one that is not in it is measured."""
    if device.type == "cpu":
        return find_device("cpu")
    name = torch.cuda.get_device_name(device).lower().replace(" ", "")
    for known in GPUS.values():
        if known.name in name:
            return known
    half = _matmul_tflops(4096, device, torch.bfloat16)
    single = _matmul_tflops(4096, device, torch.float32)
    memory = torch.cuda.get_device_properties(device).total_memory / 2**30
    return Device(name, memory, half, single, single, MEASURED, _copy_rate(2**28, device))


def _matmul_tflops(size: int, device: torch.device, dtype: torch.dtype) -> float:
    matrix = torch.ones(size, size, device=device, dtype=dtype)
    return 2 * size**3 / _least_seconds(lambda: matrix @ matrix) / 1e12


def _copy_rate(size: int, device: torch.device) -> float:
    """GB/s that `size` bytes are read and written at."""
    tensor = torch.ones(size // 4, device=device)
    return 2 * size / _least_seconds(tensor.clone) / 1e9


def _least_seconds(make: Callable[[], Tensor]) -> float:
    times = []
    for _ in range(4):  # the first is a warm-up
        began = time.perf_counter()
        make().flatten()[0].item()  # waits for the GPU
        times.append(time.perf_counter() - began)
    return min(times)
