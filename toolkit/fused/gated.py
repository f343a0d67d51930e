"""A product in bf16 and its SwiGLU in one kernel, on Hopper; see `reference.gated`.

A tile is as many gates as ups, and they meet in registers: neither is ever written, which saves more than half of what a
product and a kernel after it write and read. In fp8, where rows are quantised by their largest numbers, it would save less
than it costs.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl

from ..hardware import HOPPER, probe_hardware
from .launch import launch, processors
from .matrix import Activations, Matrix, Plain, Scaled, stack
from .modulate import line_of
from .rows import Rows
from .swiglu import swiglu

try:
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:  # an older Triton
    TensorDescriptor = None

ROWS, COLUMNS = 128, 128  # of a tile's result
DEPTH = 128  # bytes of a row that are read at a time, the widest swizzle of the copy engine
GROUP = 8  # tiles above one another that are at work together, as they share what they read
STAGES, WARPS = 4, 8
ALIGNED = 8  # numbers in 16 bytes, in which the copy engine counts
_refusals: list[str] = []  # why the kernel is not used any more
log = logging.getLogger("ark")


@triton.jit
def _tile(
    tile, x, weight, out, count, width: tl.constexpr, inputs: tl.constexpr,
    DEEP: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """One tile of the result. The matrix is [2, width, inputs]: a box of it has gates and their ups."""
    down, across = tl.cdiv(count, ROWS), tl.cdiv(width, COLUMNS)
    first = tile // (GROUP * across) * GROUP
    height = tl.minimum(down - first, GROUP)
    within = tile % (GROUP * across)
    row, column = (first + within % height) * ROWS, within // height * COLUMNS
    both = tl.zeros((ROWS, 2 * COLUMNS), tl.float32)
    for k in range(0, inputs, DEEP):
        w = tl.reshape(weight.load([0, column, k]), (2 * COLUMNS, DEEP))
        both = tl.dot(x.load([row, k]), w.T, both)
    gate, up = tl.split(tl.permute(tl.reshape(both, (ROWS, 2, COLUMNS)), (0, 2, 1)))
    out.store([row, column], (gate / (1.0 + tl.exp(-gate)) * up).to(out.dtype))


@triton.jit
def _gated(
    x0, weight0, out0, count0, x1, weight1, out1, count1, width: tl.constexpr, inputs: tl.constexpr, TWO: tl.constexpr,
    DEEP: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, GROUP: tl.constexpr, PROGRAMS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    tiles = tl.cdiv(count0, ROWS) * tl.cdiv(width, COLUMNS)
    for tile in tl.range(program, tiles, PROGRAMS, flatten=True):
        _tile(tile, x0, weight0, out0, count0, width, inputs, DEEP, ROWS, COLUMNS, GROUP)
    if TWO:
        start = (program + PROGRAMS - tiles % PROGRAMS) % PROGRAMS  # those first that have had less
        tiles = tl.cdiv(count1, ROWS) * tl.cdiv(width, COLUMNS)
        for tile in tl.range(start, tiles, PROGRAMS, flatten=True):
            _tile(tile, x1, weight1, out1, count1, width, inputs, DEEP, ROWS, COLUMNS, GROUP)


@triton.jit
def _place(attention, out, picture_step, token_step, out_step, width, txt_rows, txt_len, img_len, BLOCK: tl.constexpr):  # fmt: skip
    row, columns = tl.program_id(0), tl.arange(0, BLOCK)
    _, picture, token = line_of(row, txt_rows, txt_len, img_len)
    at = picture.to(tl.int64) * picture_step + token.to(tl.int64) * token_step + columns
    value = tl.load(attention + at, columns < width, 0.0)
    tl.store(out + row.to(tl.int64) * out_step + columns, value, columns < width)


def gated(
    parts: Sequence[tuple[Activations, Matrix]],
    rows: Rows,
    attention: torch.Tensor | Scaled | None = None,
    fp8: bool = False,
) -> Activations:
    """As `reference.gated`."""
    if not (fp8 or isinstance(attention, Scaled)) and all(within(matrix) for _, matrix in parts):
        try:
            return gated_product(parts, rows, attention)
        except torch.cuda.OutOfMemoryError:
            raise
        except Exception as error:  # what another Triton or driver may not do
            _refusals.append((str(error).splitlines() or [type(error).__name__])[0])
            log.warning("Ark fused: SwiGLU is computed apart from its product (%s).", _refusals[0])
    return swiglu(stack(parts), rows, attention, fp8)


def within(matrix: Matrix) -> bool:
    """Whether SwiGLU is computed within the product by a matrix."""
    if TensorDescriptor is None or _refusals:
        return False
    if not isinstance(matrix, Plain) or matrix.dtype != torch.bfloat16:
        return False
    aligned = matrix.weight.shape[0] % (2 * ALIGNED) == 0 == matrix.weight.shape[1] % ALIGNED
    here = probe_hardware(matrix.device).compute_capability == HOPPER
    return here and aligned and matrix.weight.is_contiguous()


def gated_product(
    parts: Sequence[tuple[Any, Any]], rows: Rows, attention: torch.Tensor | None = None
) -> torch.Tensor:
    """As `gated`, of one or two parts, by the kernel."""
    matrix = parts[0][1]
    width, before = matrix.features // 2, 0 if attention is None else attention.shape[2]
    out = torch.empty(rows.count, before + width, dtype=matrix.dtype, device=matrix.device)
    if attention is not None:
        launch(_place, (rows.count,))(
            attention, out, *attention.stride()[:2], out.stride(0), before, rows.txt, rows.txt_len, rows.img_len,
            BLOCK=triton.next_power_of_2(before), num_warps=4,
        )  # fmt: skip
    operands = []
    for (x, matrix), lines in zip(parts, out[:, before:].split([len(x) for x, _ in parts]), strict=True):  # fmt: skip
        if len(x):
            operands.append(_operands(x, matrix.weight, lines))
    programs = processors(out.device)
    launch(_gated, (programs,))(
        *operands[0], *operands[-1], width=width, inputs=matrix.weight.shape[1], TWO=len(operands) > 1,
        DEEP=DEPTH // out.element_size(), ROWS=ROWS, COLUMNS=COLUMNS, GROUP=GROUP, PROGRAMS=programs,
        num_warps=WARPS, num_stages=STAGES,
    )  # fmt: skip
    return out


def _operands(x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor) -> tuple:
    (count, width), inputs, deep = out.shape, x.shape[1], DEPTH // x.element_size()
    halves = TensorDescriptor(weight, [2, width, inputs], [width * inputs, inputs, 1], [2, COLUMNS, deep])  # fmt: skip
    return (
        TensorDescriptor.from_tensor(x, [ROWS, deep]),
        halves,
        TensorDescriptor.from_tensor(out, [ROWS, COLUMNS]),
        count,
    )
