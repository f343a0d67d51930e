"""A CPU's random numbers in plain torch: the meaning of the kernels in `randn.py`. See `toolkit/mersenne.py`."""

from __future__ import annotations

import math

import torch

# of a Mersenne Twister: words of its state, between the two of them that a later one is made of, and what its lowest bit adds
STATE, LAG, MATRIX = 624, 397, 0x9908B0DF
DEGREE = 19937  # of its polynomial: later words are sums of so many
TOP, LEFT = 0x9D2C5680, 0xEFC60000  # masks of what is done to each word that it gives
GROUP = 16  # numbers that are made together
# of Cephes, in the order in which they are used: a logarithm's, what it takes for that of 2, and pi / 4 in three parts
LOG = 7.0376836292e-2, -1.1514610310e-1, 1.1676998740e-1, -1.2420140846e-1, 1.4249322787e-1, -1.6668057665e-1, 2.0000714765e-1, -2.4999993993e-1, 3.3333331174e-1  # fmt: skip
LOG2 = -2.12194440e-4, 0.693359375
QUARTER = 0.78515625, 2.4187564849853515625e-4, 3.77489497744594108e-8
COS = 2.443315711809948e-5, -1.388731625493765e-3, 4.166664568298827e-2
SIN = -1.9515295891e-4, 8.3321608736e-3, -1.6666654611e-1
HALF_ROOT = 0.707106781186547524


def compile_randn() -> None:
    """What makes the next numbers come as fast as those after them."""


def jump(state: torch.Tensor, places: torch.Tensor, each: int) -> torch.Tensor:
    """Words of a Mersenne Twister from several places on.

    Args:
        state: [624] int32, as its seed has made it; on the host.
        places: [parts, most] int32, each row filled up with -1; each of the first words of a part is the sum, bit by bit, of
            words that stand so much after it.
        each: words of a part, at least 624.

    Returns:
        [parts, each] int32, as it keeps them: without what it does to each word that it gives.
    """
    words = _go_on(state[None].to(places.device), STATE + int(places.max()) + STATE)[0]
    windows, found = words[STATE:].unfold(0, STATE, 1), []
    for row in places:
        y = windows[row[row >= 0]]
        while len(y) > 1:
            half = len(y) // 2
            y = torch.cat((y[:half] ^ y[half : 2 * half], y[2 * half :]))
        found.append(y[0])
    return _go_on(torch.stack(found), each).int()


def _go_on(given: torch.Tensor, count: int) -> torch.Tensor:
    """[B, count] words, of which [B, 624] are there."""
    found = torch.empty(len(given), count, dtype=torch.int64, device=given.device)
    found[:, :STATE] = given.long() & 0xFFFFFFFF
    for first in range(STATE, count, STATE - LAG):
        last = min(first + STATE - LAG, count)
        old, next_one = (found[:, first - STATE + late : last - STATE + late] for late in (0, 1))
        mixed = (old & 0x80000000) | (next_one & 0x7FFFFFFF)
        before = found[:, first - STATE + LAG : last - STATE + LAG]
        found[:, first:last] = before ^ (mixed >> 1) ^ (mixed & 1) * MATRIX
    return found


def normal(words: torch.Tensor) -> torch.Tensor:
    """Normal numbers of a generator's words, as torch makes them on a CPU with AVX2.

    Args:
        words: [N] int32, see `jump`; N is a multiple of 16.

    Returns:
        [N] fp32. Where torch's compiler has made one rounding of a product and a sum there is one here.
    """
    y = words.view(-1, 2, GROUP // 2).long() & 0xFFFFFFFF
    y = y ^ (y >> 11)
    y = y ^ ((y << 7) & TOP)
    y = y ^ ((y << 15) & LEFT)
    y = y ^ (y >> 18)
    uniform = (y & 0xFFFFFF).float() * 2**-24
    # not of fp32, which MKL does not round right
    radius = (-2 * _log(1 - uniform[:, 0])).double().sqrt().float()
    sin, cos = _sin_cos(2 * math.pi * uniform[:, 1])
    return torch.stack((radius * cos, radius * sin), 1).flatten()


def _fma(a: torch.Tensor, b: torch.Tensor | float, c: torch.Tensor | float) -> torch.Tensor:
    """One rounding of a * b + c; the numbers are fp32."""
    a, b, c = (torch.as_tensor(x, dtype=torch.float32).double() for x in (a, b, c))
    return (a * b + c).float()


def _log(x: torch.Tensor) -> torch.Tensor:
    mantissa, exponent = torch.frexp(x)
    small = mantissa < HALF_ROOT
    exponent = (exponent - small.int()).float()
    x = mantissa - 1 + torch.where(small, mantissa, 0)
    squared, y = x * x, torch.full_like(x, LOG[0])
    for factor in LOG[1:]:
        y = _fma(y, x, factor)
    y = _fma(y * x, squared, exponent * LOG2[0])
    return _fma(exponent, LOG2[1], x + _fma(squared, -0.5, y))


def _sin_cos(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    octant = ((x * (4 / math.pi)).int() + 1) & ~1
    for part in QUARTER:
        x = _fma(octant.float(), -part, x)
    squared = x * x
    cos = _fma(_fma(squared, COS[0], COS[1]), squared, COS[2]) * squared
    cos = _fma(cos, squared, squared * -0.5) + 1
    sin = _fma(_fma(squared, SIN[0], SIN[1]), squared, SIN[2]) * squared
    sin = _fma(sin, x, x)
    swapped = octant & 2 != 0
    sin, cos = torch.where(swapped, cos, sin), torch.where(swapped, sin, cos)
    turned = (octant - 2) & 4 == 0
    return torch.where(octant & 4 != 0, -sin, sin), torch.where(turned, -cos, cos)
