"""A frozen base in few bits: the matrices of a denoiser's blocks, written out in full only while they multiply.

Weights alone, as in QLoRA (Dettmers et al., arXiv 2305.14314): what flows through the network, its gradient and the
adapters keep their precision.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BLOCKS = r"(.*\.)?\w*blocks\.\d+\..*"  # the rest, embeddings and the last layer, is small and delicate
NF4_BLOCK = 64  # weights with a scale of their own
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
"""The 16 values of 4-bit NormalFloat, appendix E of QLoRA."""


class LowBitLinear(nn.Linear):
    """A frozen linear layer whose matrix is held in few bits.

    Args:
        shape: of the matrix, `(out, in)`.
        codes: `[out, in]` in int8 or an 8-bit float; or uint8, NF4, two weights a byte, the first in the upper half,
            rows one after the other.
        scale: `[out, 1]` or `[1, 1]`; of NF4 `[blocks]`, the largest absolute weight of each 64.
        bias: `[out]`, or None.
    """

    def __init__(self, shape: tuple[int, int], codes: Tensor, scale: Tensor, bias: nn.Parameter | None) -> None:
        nn.Module.__init__(self)  # nn.Linear's own would make the matrix
        self.out_features, self.in_features = shape
        self.weight = nn.Parameter(codes, requires_grad=False)
        self.scale = nn.Parameter(scale, requires_grad=False)  # no buffer: what moves weights moves it along
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias, requires_grad=False))

    @classmethod
    def of(cls, matrix: Tensor, bits: str, bias: nn.Parameter | None = None) -> Self:
        """Quantise a matrix `[out, in]` to `int8`, `fp8` or `nf4`."""
        codes, scale = to_nf4(matrix) if bits == "nf4" else _rows(matrix, bits)
        return cls((len(matrix), matrix.shape[1]), codes, scale, bias)

    @property
    def bits(self) -> str:
        """The kind of codes: `int8`, `fp8` or `nf4`."""
        return {torch.int8: "int8", torch.uint8: "nf4"}.get(self.weight.dtype, "fp8")

    @property
    def traffic(self) -> float:
        """Bytes of memory that are read and written to unpack a weight into bfloat16, operator by operator."""
        return {"int8": 11.0, "fp8": 19.0, "nf4": 22.5}[self.bits]

    def matrix(self, dtype: torch.dtype) -> Tensor:
        """The matrix `[out, in]`."""
        return _unpack(self.weight, self.scale, (self.out_features, self.in_features), dtype)

    def forward(self, inputs: Tensor) -> Tensor:
        """`[..., in]` to `[..., out]`; the gradient reaches the inputs alone."""
        shape = (self.out_features, self.in_features)
        out: Tensor = _Product.apply(inputs, self.weight, self.scale, self.bias, shape)  # type: ignore[no-untyped-call]
        return out


class _Product(torch.autograd.Function):
    """A product whose backward unpacks the matrix again: autograd itself would keep every one in full."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None, shape: Any) -> Tensor:
        ctx.save_for_backward(codes, scale)
        ctx.shape = shape
        return F.linear(inputs, _unpack(codes, scale, shape, inputs.dtype), bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (gradient,) = gradients
        codes, scale = ctx.saved_tensors
        return gradient @ _unpack(codes, scale, ctx.shape, gradient.dtype), None, None, None, None


def _unpack(codes: Tensor, scale: Tensor, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """The matrix `shape` that codes and scales stand for; the arithmetic is in float32."""
    if codes.dtype != torch.uint8:
        return ((codes if codes.dtype == torch.int8 else codes.to(torch.float32)) * scale).to(dtype)
    levels = torch.tensor(NF4, device=codes.device)
    pairs = torch.cat([levels.repeat_interleave(16)[:, None], levels.repeat(16)[:, None]], dim=1)  # of each byte
    blocks = F.embedding(codes.int(), pairs).view(-1, NF4_BLOCK).mul_(scale[:, None])
    return blocks.flatten()[: shape[0] * shape[1]].view(shape).to(dtype)


def _rows(matrix: Tensor, bits: str) -> tuple[Tensor, Tensor]:
    """Torchao's `int8` or `fp8`, as exports have them: weights alone, symmetric, a scale each row."""
    from torchao.quantization import Float8Tensor, Int8Tensor, PerRow

    packed = (Int8Tensor if bits == "int8" else Float8Tensor).from_hp(matrix, granularity=PerRow())
    return packed.qdata, packed.scale.float()


def to_nf4(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Codes `[blocks * 32]` and scales `[blocks]` of a matrix, laid out as bitsandbytes does; the last may be padded.

    Scales are rounded to bfloat16, an error of 0.2% beside the codes' own of 9%: 4.25 bits a weight in place of 4.5.
    """
    weights = matrix.flatten().float()
    blocks = F.pad(weights, (0, -len(weights) % NF4_BLOCK)).view(-1, NF4_BLOCK)
    scale = blocks.abs().amax(dim=1).bfloat16()
    levels = torch.tensor(NF4, device=matrix.device)
    blocks = blocks / scale.float().clamp(min=torch.finfo(torch.float32).tiny)[:, None]  # it may hold zeros alone
    codes = torch.zeros_like(blocks, dtype=torch.uint8)
    for middle in (levels[1:] + levels[:-1]) / 2:  # eight times as fast as bucketize
        codes += blocks > middle
    upper, lower = codes.view(-1, 2).unbind(dim=1)
    return upper << 4 | lower, scale


def low_bit_layers(network: nn.Module) -> Iterator[LowBitLinear]:
    """The layers of a network that are in few bits."""
    return (module for module in network.modules() if isinstance(module, LowBitLinear))


def bits_of(network: nn.Module) -> str:
    """`int8`, `fp8` or `nf4`; `none` for a network that is not in few bits."""
    return next((layer.bits for layer in low_bit_layers(network)), "none")


def quantise(network: nn.Module, quantization: str) -> None:
    """Quantise the matrices of a network's blocks in place, one after the other; `none` leaves them."""
    for name, module in list(network.named_modules()):
        if quantization != "none" and isinstance(module, nn.Linear) and re.fullmatch(BLOCKS, name):
            network.set_submodule(name, LowBitLinear.of(module.weight.detach(), quantization, module.bias))


def stored_bits(config: Mapping[str, Any]) -> str:
    """The bits that a denoiser's `config.json` says its matrices are stored in: `none`, `int8`, `fp8` or `nf4`."""
    stored = str(config.get("quantization_config") or "")
    found = {"nf4": "nf4", "Int8WeightOnlyConfig": "int8", "Float8WeightOnlyConfig": "fp8"}
    return next((bits for name, bits in found.items() if name in stored), "none")
