"""The matrices of a model, in the precision that they are multiplied in: one small class each, behind one signature."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from .cublas import multiply

FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0
SMALLEST = 1e-12  # of a row's largest number, so that a row of zeros has a scale
MANY = 4096  # rows from which on a chosen algorithm is used: with fewer none was timed
# cuBLASLt's algorithms by rows, empty where torch's choice is as good
Chosen = tuple[tuple[int, bytes], ...]


@dataclass(frozen=True)
class Quantised:
    """Rows in fp8: `data * scale` is what they mean.

    Attributes:
        data: [count, K] float8_e4m3fn.
        scale: [count, 1] fp32.
    """

    data: torch.Tensor
    scale: torch.Tensor

    def __getitem__(self, part: slice) -> Quantised:
        return Quantised(self.data[part], self.scale[part])

    def wide(self) -> torch.Tensor:
        """[count, K] fp32."""
        return self.data.float() * self.scale


Activations = torch.Tensor | Quantised


@dataclass(frozen=True)
class Scaled:
    """A tensor in fp8 with one scale: `data * scale[0]` is what it means.

    Attributes:
        data: float8_e4m3fn.
        scale: [2] fp32, the scale and one over it.
    """

    data: torch.Tensor
    scale: torch.Tensor

    def wide(self) -> torch.Tensor:
        """In fp32."""
        return self.data.float() * self.scale[0]

    def __getitem__(self, part: Any) -> Scaled:
        return Scaled(self.data[part], self.scale)

    def by_rows(self, rows: torch.Tensor) -> Quantised:
        """Some of the data [count, K] as rows, each with the same scale."""
        return Quantised(rows, self.scale[:1].expand(len(rows), 1).contiguous())


def algorithm_for(rows: int, known: Chosen) -> bytes:
    """The one for the number of rows that is the nearest; empty for torch's choice."""
    if rows < MANY or not known:
        return b""
    return min(known, key=lambda timed: abs(math.log(timed[0] / rows)))[1]


@dataclass(frozen=True)
class Plain:
    """A matrix as the file has it.

    Attributes:
        weight: [out, in].
        quantises: whether it wants its input in fp8.
        algorithms: what is known to be fast, see `toolkit/matrices.py`.
    """

    weight: torch.Tensor
    quantises: bool = False
    algorithms: Chosen = ()

    @property
    def features(self) -> int:
        """Width of the output."""
        return self.weight.shape[0]

    def part(self, start: int, stop: int) -> Plain:
        """What gives some of the outputs, by reference."""
        return Plain(self.weight[start:stop], algorithms=self.algorithms)

    def __call__(self, x: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """[count, in] to [count, out]."""
        chosen = algorithm_for(len(x), self.algorithms)
        if chosen and (found := multiply(chosen, x, self.weight, out)) is not None:
            return found
        return torch.mm(x, self.weight.t(), out=out)


@dataclass(frozen=True)
class Joined:
    """Matrices of the same input whose outputs stand side by side, each by reference.

    Attributes:
        parts: each [out, in].
        quantises: whether it wants its input in fp8.
    """

    parts: tuple[torch.Tensor, ...]
    quantises: bool = False

    @property
    def features(self) -> int:
        """Width of the output."""
        return sum(part.shape[0] for part in self.parts)

    def __call__(self, x: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """[count, in] to [count, out]."""
        out = x.new_empty(len(x), self.features) if out is None else out
        widths = [part.shape[0] for part in self.parts]
        for part, columns in zip(self.parts, out.split(widths, 1), strict=True):
            torch.mm(x, part.t(), out=columns)
        return out


@dataclass(frozen=True)
class Fp8:
    """A matrix in fp8, one scale an output; its input has one a row. Accumulates as the tensor cores do it fast.

    Attributes:
        weight: [out, in] float8_e4m3fn.
        scale: [1, out] fp32.
        dtype: of the output.
        quantises: whether it wants its input in fp8.
        algorithms: see `Plain`.
    """

    weight: torch.Tensor
    scale: torch.Tensor
    dtype: torch.dtype
    quantises: bool = True
    algorithms: Chosen = ()

    @classmethod
    def of(cls, weight: torch.Tensor, quantise: Callable[[torch.Tensor], Quantised], algorithms: Chosen = ()) -> Fp8:  # fmt: skip
        """Quantise a matrix [out, in], by a function as `quantise`."""
        rows = quantise(weight)
        return cls(rows.data, rows.scale.t().contiguous(), weight.dtype, algorithms=algorithms)

    @property
    def features(self) -> int:
        """Width of the output."""
        return self.weight.shape[0]

    def part(self, start: int, stop: int) -> Fp8:
        """What gives some of the outputs, by reference."""
        return Fp8(self.weight[start:stop], self.scale[:, start:stop], self.dtype, algorithms=self.algorithms)  # fmt: skip

    def __call__(self, x: Quantised, out: torch.Tensor | None = None) -> torch.Tensor:
        """[count, in] to [count, out]."""
        if x.data.device.type == "cpu":  # has no such kernel
            result = (x.wide() @ (self.weight.float() * self.scale.t()).t()).to(self.dtype)
            return result if out is None else out.copy_(result)
        chosen = algorithm_for(len(x.data), self.algorithms)
        if chosen and (found := multiply(chosen, x.data, self.weight, out, (x.scale, self.scale))) is not None:  # fmt: skip
            return found
        return torch._scaled_mm(
            x.data, self.weight.t(), x.scale, self.scale, out_dtype=self.dtype, use_fast_accum=True, out=out
        )  # fmt: skip


Matrix = Plain | Joined | Fp8


def quantise(x: torch.Tensor) -> Quantised:
    """[count, K] to fp8, each row by its largest number."""
    wide = x.float()
    scale = wide.abs().amax(1, keepdim=True).clamp(min=SMALLEST) / FP8_MAX
    return Quantised((wide / scale).clamp(-FP8_MAX, FP8_MAX).to(FP8), scale)


def to_fp8(x: torch.Tensor, limit: float | torch.Tensor | None = None) -> Scaled:
    """A tensor in fp8.

    Args:
        x: of any shape.
        limit: what its numbers never exceed; by default its largest one.
    """
    most = x.float().abs().amax() if limit is None else torch.as_tensor(limit, device=x.device)
    scale = most.float().clamp(min=SMALLEST) / FP8_MAX
    data = (x.float() / scale).clamp(-FP8_MAX, FP8_MAX).to(FP8)
    return Scaled(data, torch.stack((scale, 1 / scale)))
