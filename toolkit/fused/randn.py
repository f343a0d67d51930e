"""A CPU's random numbers on a device; see `reference_randn.py`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .launch import launch
from .reference_randn import DEGREE, GROUP, LAG, STATE

AT_A_TIME = 128  # places
COLUMNS = 16  # words that one program adds up
STEP = STATE - LAG  # words that can be made at the same time
PAIRS = 256  # of numbers that one program makes
FIRST = {"STATE": STATE, "AT_A_TIME": AT_A_TIME, "COLUMNS": COLUMNS, "num_warps": 4}
GO_ON = {
    "STATE": STATE,
    "LAG": LAG,
    "STEP": STEP,
    "BLOCK": triton.next_power_of_2(STEP),
    "num_warps": 8,
}
# a product and a sum are rounded once where it says so, and nowhere else
NORMAL = {"PAIRS": PAIRS, "GROUP": GROUP, "num_warps": 4, "enable_fp_fusion": False}


@triton.jit(do_not_specialize=["most", "each"])
def _first(words, places, out, most, each, STATE: tl.constexpr, AT_A_TIME: tl.constexpr, COLUMNS: tl.constexpr):  # fmt: skip
    part = tl.program_id(1)
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inside = columns < STATE
    sums = tl.zeros([AT_A_TIME, COLUMNS], tl.int32)
    for first in range(0, most, AT_A_TIME):
        numbers = first + tl.arange(0, AT_A_TIME)
        at = tl.load(places + part * most + numbers, numbers < most, -1)
        mask = (at >= 0)[:, None] & inside[None, :]
        sums ^= tl.load(words + at[:, None] + columns[None, :], mask, 0)
    tl.store(out + part * each + columns, tl.xor_sum(sums, 0), inside)


@triton.jit(do_not_specialize=["each"])
def _go_on(words, each, STATE: tl.constexpr, LAG: tl.constexpr, STEP: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    words += tl.program_id(0) * each - STATE
    lanes = tl.arange(0, BLOCK)
    for first in range(STATE, each, STEP):
        at = words + first + lanes
        inside = (lanes < STEP) & (first + lanes < each)
        tl.debug_barrier()  # what was stored is loaded by others
        old = tl.load(at, inside, 0, volatile=True).to(tl.uint32, bitcast=True)
        next_one = tl.load(at + 1, inside, 0, volatile=True).to(tl.uint32, bitcast=True)
        before = tl.load(at + LAG, inside, 0, volatile=True).to(tl.uint32, bitcast=True)
        mixed = (old & 0x80000000) | (next_one & 0x7FFFFFFF)
        y = before ^ (mixed >> 1) ^ ((mixed & 1) * 0x9908B0DF)
        tl.store(at + STATE, y.to(tl.int32, bitcast=True), inside)


@triton.jit
def _uniform(y):
    y = y.to(tl.uint32, bitcast=True)
    y ^= y >> 11
    y ^= (y << 7) & 0x9D2C5680
    y ^= (y << 15) & 0xEFC60000
    y ^= y >> 18
    return (y & 0xFFFFFF).to(tl.int32).to(tl.float32) * 5.9604644775390625e-08


@triton.jit
def _log(x):
    bits = x.to(tl.int32, bitcast=True)
    mantissa = ((bits & 0x7FFFFF) | 0x3F000000).to(tl.float32, bitcast=True)
    small = mantissa < 0.707106781186547524
    exponent = ((bits >> 23) - 126 - small.to(tl.int32)).to(tl.float32)
    x = (mantissa - 1.0) + tl.where(small, mantissa, 0.0)
    squared = x * x
    y = tl.fma(x, 7.0376836292e-2, -1.1514610310e-1)
    y = tl.fma(y, x, 1.1676998740e-1)
    y = tl.fma(y, x, -1.2420140846e-1)
    y = tl.fma(y, x, 1.4249322787e-1)
    y = tl.fma(y, x, -1.6668057665e-1)
    y = tl.fma(y, x, 2.0000714765e-1)
    y = tl.fma(y, x, -2.4999993993e-1)
    y = tl.fma(y, x, 3.3333331174e-1)
    y = tl.fma(y * x, squared, exponent * -2.12194440e-4)
    return tl.fma(exponent, 0.693359375, x + tl.fma(squared, -0.5, y))


@triton.jit
def _normal(words, out, count, PAIRS: tl.constexpr, GROUP: tl.constexpr):
    HALF: tl.constexpr = GROUP // 2
    pairs = tl.program_id(0) * PAIRS + tl.arange(0, PAIRS)
    at = pairs // HALF * GROUP + pairs % HALF
    inside = at < count
    radius = tl.sqrt_rn(-2.0 * _log(1.0 - _uniform(tl.load(words + at, inside, 0))))
    x = 6.283185307179586 * _uniform(tl.load(words + at + HALF, inside, 0))
    octant = ((x * 1.27323954473516).to(tl.int32) + 1) & -2
    turns = octant.to(tl.float32)
    x = tl.fma(turns, -0.78515625, x)
    x = tl.fma(turns, -2.4187564849853515625e-4, x)
    x = tl.fma(turns, -3.77489497744594108e-8, x)
    squared = x * x
    cos = tl.fma(squared, 2.443315711809948e-5, -1.388731625493765e-3)
    cos = tl.fma(cos, squared, 4.166664568298827e-2) * squared
    cos = tl.fma(cos, squared, squared * -0.5) + 1.0
    sin = tl.fma(squared, -1.9515295891e-4, 8.3321608736e-3)
    sin = tl.fma(sin, squared, -1.6666654611e-1) * squared
    sin = tl.fma(sin, x, x)
    swapped = (octant & 2) != 0
    first, second = tl.where(swapped, sin, cos), tl.where(swapped, cos, sin)
    first = tl.where(((octant - 2) & 4) == 0, -first, first)
    second = tl.where((octant & 4) != 0, -second, second)
    tl.store(out + at, radius * first, inside)
    tl.store(out + at + HALF, radius * second, inside)


def jump(state: torch.Tensor, places: torch.Tensor, each: int) -> torch.Tensor:
    """As `reference.jump`."""
    parts, most = places.shape
    words = torch.empty(2 * STATE + DEGREE, dtype=torch.int32, device=places.device)
    words[:STATE].copy_(state, non_blocking=True)
    launch(_go_on, (1,))(words, len(words), **GO_ON)
    out = torch.empty(parts, each, dtype=torch.int32, device=places.device)
    launch(_first, (triton.cdiv(STATE, COLUMNS), parts))(words[STATE:], places, out, most, each, **FIRST)  # fmt: skip
    launch(_go_on, (parts,))(out, each, **GO_ON)
    return out


def normal(words: torch.Tensor) -> torch.Tensor:
    """As `reference.normal`."""
    out = torch.empty(words.shape, dtype=torch.float32, device=words.device)
    count = words.numel()
    launch(_normal, (triton.cdiv(count, 2 * PAIRS),))(words, out, count, **NORMAL)
    return out


def compile_randn() -> None:
    """Compile the kernels for the current device; nothing is launched."""
    _first.warmup(torch.int32, torch.int32, torch.int32, 1, 1, grid=(1, 1), **FIRST)
    _go_on.warmup(torch.int32, 1, grid=(1,), **GO_ON)
    _normal.warmup(torch.int32, torch.float32, 16, grid=(1,), **NORMAL)
