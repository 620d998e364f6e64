"""Seconds and bytes, measured alike on a CPU and a GPU."""

from __future__ import annotations

import argparse
import json
import statistics
import time
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

RESULTS = Path(__file__).parent / "results"
Benchmark = Callable[[argparse.Namespace], None]


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all tensors made inside it that are alive at once; `peak` is the most there were.

    What a kernel allocates and frees within itself is not seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run one operation and count what it made."""
        del types
        for tensor in tree_leaves((args, kwargs)):
            if isinstance(tensor, Tensor):
                self._add(tensor.untyped_storage(), count=False)  # made before: no part of this
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._add(tensor.untyped_storage(), count=True)
        return out

    def _add(self, storage: torch.UntypedStorage, *, count: bool) -> None:
        address = storage._cdata  # noqa: SLF001  # tells storages apart while they live
        if address in self._known:
            return
        self._known.add(address)
        size = storage.nbytes() if count else 0
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._drop, address, size)

    def _drop(self, address: int, size: int) -> None:
        self._known.discard(address)
        self.live -= size


def resident_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of these tensors, each storage once."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def peak_bytes(call: Callable[[], object], resident: Iterable[Tensor] = ()) -> int:
    """Most bytes alive at once during `call`, over and above (CPU) or with (GPU) what was alive before.

    Args:
        call: what is measured.
        resident: on a CPU, what to count as alive before; on a GPU the allocator knows.
    """
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated()
    before = resident_bytes(resident)
    with LiveBytes() as counted:
        call()
    return before + counted.peak


def seconds(call: Callable[[], object]) -> float:
    """Wall seconds of one call, with the GPU's work done."""
    synchronize()
    began = time.perf_counter()
    call()
    synchronize()
    return time.perf_counter() - began


def synchronize() -> None:
    """Wait for the GPU, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def interleaved(calls: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each call, `repeats` times in turn, so that a busy moment hits all alike; a first round warms up."""
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(repeats + 1):
        for name, call in calls.items():
            once = seconds(call)
            if turn:
                taken[name].append(once)
    return taken


def median_ratio(over: Sequence[float], under: Sequence[float]) -> float:
    """Median of the ratios of measurements made in the same turn."""
    return statistics.median(a / b for a, b in zip(over, under, strict=True))


def write_result(name: str, content: Mapping[str, object]) -> None:
    """Write `results/NAME.json` and print its plain figures."""
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n")
    print(json.dumps(content, indent=2))


def model_parser(description: str | None, *, repeats: int) -> argparse.ArgumentParser:
    """The options of a benchmark of the tiny model, or of Wan 2.1 1.3B of random weights on a GPU."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=["tiny", "wan21_1b"], default="tiny")
    parser.add_argument("--random", action="store_true", help="random weights; wan21_1b has no others here")
    parser.add_argument("--repeats", type=int, default=repeats)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser


def run_model(parser: argparse.ArgumentParser, *, tiny: Benchmark, wan21_1b: Benchmark) -> None:
    """Run the benchmark of the model that the command line asks for."""
    options = parser.parse_args()
    if options.model == "tiny":
        tiny(options)
    elif not options.random or not options.device.startswith("cuda"):
        parser.error("wan21_1b is measured with --random weights, on a GPU")
    else:
        wan21_1b(options)
