"""The matrices of a model, in the precision that they are multiplied in: one small class each, behind one signature."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from .cublas import multiply

FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0
SMALLEST = 1e-12  # of a row's largest number, so that a row of zeros has a scale
MANY = 4096  # rows from which on a chosen algorithm is used: with fewer none was timed
# cuBLASLt's algorithms by rows, empty where torch's choice is as good
Chosen = tuple[tuple[int, bytes], ...]
Known = Mapping[tuple[int, int], Chosen]  # by outputs and inputs


@dataclass(frozen=True)
class Quantised:
    """Rows in fp8: `data * scale` is what they mean.

    Attributes:
        data: [count, K] float8_e4m3fn.
        scale: [count, 1] fp32.
    """

    data: torch.Tensor
    scale: torch.Tensor

    def __len__(self) -> int:
        return len(self.data)

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


def algorithm_for(rows: int, weight: torch.Tensor, known: Known) -> bytes:
    """The one for a matrix and the number of rows that is the nearest; empty for torch's choice."""
    chosen = known.get((weight.shape[0], weight.shape[1]), ()) if rows >= MANY else ()
    return min(chosen, key=lambda timed: abs(math.log(timed[0] / rows)))[1] if chosen else b""


@dataclass(frozen=True)
class Plain:
    """A matrix as the file has it.

    Attributes:
        weight: [out, in].
        quantises: whether it wants its input in fp8.
        known: what is fast, of matrices of all shapes, see `toolkit/matrices.py`.
    """

    weight: torch.Tensor
    quantises: bool = False
    known: Known = field(default_factory=dict)

    @property
    def features(self) -> int:
        """Width of the output."""
        return self.weight.shape[0]

    @property
    def dtype(self) -> torch.dtype:
        """Of the output."""
        return self.weight.dtype

    @property
    def device(self) -> torch.device:
        """That it lies on."""
        return self.weight.device

    def part(self, start: int, stop: int) -> Plain:
        """What gives some of the outputs, by reference."""
        return Plain(self.weight[start:stop], known=self.known)

    def __call__(self, x: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """[count, in] to [count, out]."""
        chosen = algorithm_for(len(x), self.weight, self.known)
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

    @property
    def dtype(self) -> torch.dtype:
        """Of the output."""
        return self.parts[0].dtype

    @property
    def device(self) -> torch.device:
        """That it lies on."""
        return self.parts[0].device

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
        known: see `Plain`.
    """

    weight: torch.Tensor
    scale: torch.Tensor
    dtype: torch.dtype
    quantises: bool = True
    known: Known = field(default_factory=dict)

    @classmethod
    def of(cls, weight: torch.Tensor, quantise: Callable[[torch.Tensor], Quantised], known: Known | None = None) -> Fp8:  # fmt: skip
        """Quantise a matrix [out, in], by a function as `quantise`."""
        rows = quantise(weight)
        return cls(rows.data, rows.scale.t().contiguous(), weight.dtype, known=known or {})

    @property
    def features(self) -> int:
        """Width of the output."""
        return self.weight.shape[0]

    @property
    def device(self) -> torch.device:
        """That it lies on."""
        return self.weight.device

    def part(self, start: int, stop: int) -> Fp8:
        """What gives some of the outputs, by reference."""
        return Fp8(self.weight[start:stop], self.scale[:, start:stop], self.dtype, known=self.known)  # fmt: skip

    def __call__(self, x: Quantised, out: torch.Tensor | None = None) -> torch.Tensor:
        """[count, in] to [count, out]."""
        if x.data.device.type == "cpu":  # has no such kernel
            result = (x.wide() @ (self.weight.float() * self.scale.t()).t()).to(self.dtype)
            return result if out is None else out.copy_(result)
        chosen = algorithm_for(len(x), self.weight, self.known)
        if chosen and (found := multiply(chosen, x.data, self.weight, out, (x.scale, self.scale))) is not None:  # fmt: skip
            return found
        return torch._scaled_mm(
            x.data, self.weight.t(), x.scale, self.scale, out_dtype=self.dtype, use_fast_accum=True, out=out
        )  # fmt: skip


Matrix = Plain | Joined | Fp8


def stack(parts: Sequence[tuple[Any, Matrix]], out: torch.Tensor | None = None) -> torch.Tensor:
    """Products one below the other.

    Args:
        parts: inputs [count, in] and their matrices, all with as many outputs.
        out: [sum of counts, out] to write to, None for a new one.
    """
    counts, first = [len(x) for x, _ in parts], parts[0][1]
    if out is None:
        out = torch.empty(sum(counts), first.features, dtype=first.dtype, device=first.device)
    for (x, matrix), lines in zip(parts, out.split(counts), strict=True):
        matrix(x, lines)
    return out


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
