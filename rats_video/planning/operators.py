"""Operators on meta tensors, each derived once for the shapes it gets.

A model calls the same operators on the same shapes in every block, frame and step. Torch derives their outputs in
Python, which takes nearly all the time of a trace, so the second call gets what the first one found.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

aten = torch.ops.aten
attention = aten._scaled_dot_product_flash_attention_for_cpu  # noqa: SLF001  # the one with a meta kernel and a mask
attention_backward = aten._scaled_dot_product_flash_attention_for_cpu_backward  # noqa: SLF001

PLAIN = {bool, int, float, str, type(None), torch.dtype, torch.layout, torch.device, torch.memory_format}
META = torch.device("meta")
IN_PLACE: Literal["in place"] = "in place"


class Shape(NamedTuple):
    """A meta tensor: nothing else of it decides what an operator makes."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, tensor: Tensor) -> Shape:
        """The shape of a tensor."""
        return cls(tensor.shape, tensor.stride(), tensor.dtype)

    def build(self) -> Tensor:
        """A new tensor of this shape."""
        return torch.empty_strided(self.size, self.stride, dtype=self.dtype, device=META)


class Plain(NamedTuple):
    """A value, with its type because 1, 1.0 and True are equal."""

    kind: type
    value: Any


class Outcome(NamedTuple):
    """The outputs of an operator.

    Args:
        flops: it computes.
        made: new tensors, or None where a gradient is not asked for; IN_PLACE stands for the first argument.
        is_single: whether it returns the one tensor and not a tuple.
    """

    flops: float
    made: tuple[Shape | Literal["in place"] | None, ...]
    is_single: bool


def run_operator(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, float]:
    """The output of an operator and its FLOPs."""
    if _is_view(func):
        return func(*args, **kwargs), 0.0
    try:
        known = _outcome(func, _freeze(args), tuple([(name, _freeze(value)) for name, value in kwargs.items()]))
    except TypeError:  # an argument that no key can hold
        known = None
    if known is None:
        out = func(*args, **kwargs)
        return out, count_flops(func, args, kwargs, out)
    made = tuple([each.build() if type(each) is Shape else args[0] if each else None for each in known.made])
    return (made[0] if known.is_single else made or None), known.flops


@cache
def _is_view(func: Any) -> bool:
    """True if it returns a part of an argument, without changing it."""
    returns = (each.alias_info for each in func._schema.returns)  # noqa: SLF001
    return any(alias is not None and not alias.is_write for alias in returns)


def _freeze(value: Any) -> Any:
    if isinstance(value, Tensor):
        if not value.is_meta:
            raise TypeError("not on the meta device")
        return Shape.of(value)
    kind = type(value)
    if kind in PLAIN:
        return Plain(kind, value)
    if isinstance(value, (list, tuple)):  # twice as fast as `list | tuple`, and called for every operator
        return tuple(map(_freeze, value))
    raise TypeError(kind)


def _thaw(frozen: Any) -> Any:
    match frozen:
        case Shape():
            return frozen.build()
        case Plain(value=value):
            return value
    return [_thaw(each) for each in frozen]


@cache
def _outcome(func: Any, args: tuple[Any, ...], kwargs: tuple[tuple[str, Any], ...]) -> Outcome | None:
    """None where the output shares memory or is a value, or where an argument changes its shape."""
    given, named = _thaw(args), {name: _thaw(value) for name, value in kwargs}
    tensors = [each for each in tree_leaves([given, named]) if isinstance(each, Tensor)]
    before = [(Shape.of(each), _storage(each)) for each in tensors]
    out = func(*given, **named)
    if before != [(Shape.of(each), _storage(each)) for each in tensors]:
        return None
    outputs = (out,) if isinstance(out, Tensor) else () if out is None else out
    if not isinstance(outputs, list | tuple) or not all(isinstance(each, Tensor | None) for each in outputs):
        return None
    taken = {storage for _, storage in before}
    made: list[Shape | Literal["in place"] | None] = []
    for each in outputs:
        if each is None or each is given[0]:
            made.append(None if each is None else IN_PLACE)
            continue
        shape = Shape.of(each)
        is_whole = each.is_meta and each.untyped_storage().nbytes() == shape.build().untyped_storage().nbytes()
        if not is_whole or _storage(each) in taken:
            return None
        taken.add(_storage(each))
        made.append(shape)
    return Outcome(count_flops(func, given, named, out), tuple(made), isinstance(out, Tensor))


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)  # noqa: SLF001


def count_flops(func: Any, args: Sequence[Any], kwargs: dict[str, Any], out: Any) -> float:
    """FLOPs of one operator; 0 for those that are not matrix products."""
    packet = getattr(func, "overloadpacket", func)
    if packet is attention:
        return float(4 * math.prod(args[0].shape) * args[1].shape[2])
    if packet is attention_backward:  # one product is computed again
        return float(10 * math.prod(args[1].shape) * args[2].shape[2])
    counter = flop_registry.get(packet)
    return 0.0 if counter is None else float(counter(*args, **kwargs, out_val=out))
