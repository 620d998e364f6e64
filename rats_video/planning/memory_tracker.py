"""Counts bytes and FLOPs of real code that runs on meta tensors: shapes without values, nothing is computed."""

from __future__ import annotations

import math
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from rats_video.planning.operators import attention, run_operator

aten = torch.ops.aten
CPU = torch.device("cpu")

Workspace = Callable[[Any, Sequence[Any], Any], int]
"""`(operator, its arguments, its output) -> bytes` that it takes while it runs, beside its inputs and outputs."""


@dataclass
class Phase:
    """A stretch of the step.

    Args:
        start: live bytes by owner when it began.
        peak: live bytes by owner at its fullest moment; an owner is the phase that allocated them.
        flops: counted from matrix products, convolutions and attention, 2 a multiply-add.
    """

    start: Counter[str]
    peak: Counter[str] = field(default_factory=Counter)
    flops: float = 0.0


class MemoryTracker(TorchDispatchMode):
    """While entered: who holds how many bytes of meta tensors, the peak of every phase, and its FLOPs.

    Storages are followed by weak references, so that what autograd keeps counts as long as it keeps it.

    Args:
        workspace: what an operator takes for itself while it runs.
    """

    def __init__(self, workspace: Workspace | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._workspace = workspace or no_workspace
        self._alive: dict[int, weakref.ref[Any]] = {}
        self._total = self._fullest = 0
        self._kernels = MetaKernels()
        self.live: Counter[str] = Counter()
        self.phases: dict[str, Phase] = {}
        self.enter_phase("start")

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing here is compiled, and keeping Dynamo away costs more than most operators

    def __enter__(self) -> Self:
        self._kernels.__enter__()  # type: ignore[no-untyped-call]
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        self._kernels.__exit__(*error)  # type: ignore[no-untyped-call]

    @property
    def autocast(self) -> torch.dtype | None:
        """The precision of matrix products whose inputs are float32."""
        return self._kernels.autocast

    @autocast.setter
    def autocast(self, dtype: torch.dtype | None) -> None:
        self._kernels.autocast = dtype

    def enter_phase(self, name: str) -> None:
        """Count allocations from now on for `name`; a phase entered again goes on."""
        self.now = name
        self.phase = self.phases.setdefault(name, Phase(Counter(self.live)))
        self._fullest = max(self.phase.peak.total(), self._total)
        if self._total == self._fullest:
            self.phase.peak = Counter(self.live)

    def own(self, owner: str, tensors: Iterable[Tensor]) -> None:
        """Count tensors that were there before; one that has an owner keeps it."""
        for tensor in tensors:
            self._see(tensor, owner)

    @staticmethod
    def backward(loss: Tensor) -> None:
        """`loss.backward()`, which itself would leave our modes while checkpointed blocks are computed again."""
        run = torch.autograd.graph._engine_run_backward  # noqa: SLF001
        run((loss,), (torch.ones_like(loss),), False, False, (), allow_unreachable=True, accumulate_grad=True)  # noqa: FBT003

    def own_modules(self, owner: str, modules: Iterable[nn.Module]) -> None:
        """Count the weights and buffers of modules that were there before."""
        for module in modules:
            self.own(owner, [*module.parameters(), *module.buffers()])

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one operator and book it."""
        with torch._C.DisableTorchFunction():  # noqa: SLF001  # asking a tensor its shape would call `MetaKernels`
            return self._book(func, args, kwargs or {})

    def _book(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if func is aten._local_scalar_dense.default and args[0].is_meta:  # noqa: SLF001  # `.item()` of what has no value
            return args[0].dtype == torch.bool or 0.0  # what is asked, "are all clips finite?", is so
        if func is aten.copy_.default and args[1].is_meta and not args[0].is_meta:  # to the host, which is not counted
            return args[0]
        if func is aten._to_copy.default and args[0].is_meta and kwargs.get("device") == CPU:  # noqa: SLF001  # `.tolist()`
            return torch.zeros(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
        out, flops = run_operator(func, args, kwargs)
        self.phase.flops += flops
        for leaf in out if isinstance(out, list | tuple) else (out,):
            if isinstance(leaf, Tensor):
                self._see(leaf, self.now)
        extra = self._workspace(func, args, out)
        if self._total + extra > self._fullest:
            self._fullest = self._total + extra
            self.phase.peak = Counter(self.live)
            self.phase.peak[self.now] += extra
        return out

    def _see(self, tensor: Tensor, owner: str) -> None:
        if not tensor.is_meta:
            return
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()  # noqa: SLF001
        if key in self._alive:
            return

        def forget(_: Any) -> None:
            del self._alive[key]
            self._total -= size
            self.live[owner] -= size

        self._alive[key] = weakref.ref(storage, forget)
        self._total += size
        self.live[owner] += size


class MetaKernels(TorchFunctionMode):
    """Undoes the differences of torch between meta tensors and a GPU.

    Attention is fused (torch itself would spell out the S x S matrix that no GPU ever stores), and `autocast` casts
    the inputs of matrix products (torch has none for the meta device).
    """

    def __init__(self) -> None:
        super().__init__()
        self.autocast: torch.dtype | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Replace `scaled_dot_product_attention`, cast for `linear`."""
        kwargs = kwargs or {}
        if self.autocast is not None and func in {F.linear, torch.matmul, F.scaled_dot_product_attention}:
            args, kwargs = tree_map(self._cast, (args, kwargs))
        if func is F.scaled_dot_product_attention:
            names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
            given = dict(zip(names, args, strict=False)) | kwargs
            query, key, value = (given[name] for name in names[:3])
            if query.is_meta:
                heads = query.shape[1] // key.shape[1]  # grouped queries share keys
                if heads > 1:
                    key, value = (part.repeat_interleave(heads, dim=1) for part in (key, value))
                return attention(query, key, value, 0.0, False, attn_mask=given.get("attn_mask"))[0]  # noqa: FBT003
        return func(*args, **kwargs)

    def _cast(self, value: Any) -> Any:
        is_float = isinstance(value, Tensor) and value.is_meta and value.dtype == torch.float32
        return value.to(self.autocast) if is_float else value


def no_workspace(_func: Any, _args: Sequence[Any], _out: Any) -> int:
    """Nothing: what cuDNN takes is its own choice at run time."""
    return 0


def cpu_workspace(func: Any, args: Sequence[Any], out: Any) -> int:
    """Bytes that a float32 convolution takes on a CPU: blocked copies of its inputs, or a column matrix.

    Follows `ConvParams::use_mkldnn` of ATen/native/Convolution.cpp: single clips with small frames are unfolded.
    """
    packet = getattr(func, "overloadpacket", func)
    inputs: tuple[Any, ...]
    if packet is aten.convolution:
        image, weight, result, inputs = args[0], args[1], out, (args[0], args[1])
    elif packet is aten.convolution_backward:
        image, weight, result, inputs = args[1], args[2], args[0], (args[0], args[1], args[2])
    else:
        return 0
    kernel, batch = weight.shape[2:], len(image)
    is_pointwise = math.prod(kernel) == 1 and batch < 16 and torch.get_num_threads() == 1
    is_blocked = batch > 1 or math.prod(image.shape[:4]) > 20480 or min(kernel[-2:]) > 3  # as ATen has it
    if is_blocked and not is_pointwise:
        return sum(each.nbytes for each in inputs)
    columns = image.shape[1] * math.prod(kernel) * math.prod(result.shape[2:])
    return 0 if is_pointwise else int(batch * columns * image.element_size())
