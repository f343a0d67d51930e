"""Normal numbers on a device as torch draws them on a CPU.

torch draws from one Mersenne Twister, which takes 4 to 7 ns a number: 2 to 4 ms for a picture of 1024x1024, and a way to the
device. What the generator gives much later is a sum, bit by bit, of words that it gives next, and which ones depends on the
distance only: so a device can go on from many places at once.

Source: M. Matsumoto, T. Nishimura, Mersenne Twister, 1998 (the generator, and its characteristic polynomial); H. Haramoto et
al., Efficient Jump Ahead for F2-Linear Random Number Generators, 2008.
"""

from __future__ import annotations

from typing import Any

import torch

from .fused import reference
from .fused.reference_randn import DEGREE, GROUP, LAG, MATRIX, STATE

LOW_BITS = 31  # r of the paper, whose n, m and a are STATE, LAG and MATRIX
FIRST_WORD = 3  # in what torch gives as a generator's state, in numbers of 8 bytes


class CpuRandn:
    """Draws as `torch.randn` does with a generator on a CPU, bit for bit if that has AVX2.

    Args:
        count: of the numbers, a multiple of 16.
        parts: that are drawn at the same time.
        device: that draws them. Nothing is done there before the first draw.
        operations: has `jump` and `normal`, see `fused/reference_randn.py`.

    Raises:
        ValueError: the numbers cannot be drawn so.
    """

    def __init__(self, count: int, parts: int, device: torch.device, operations: Any = reference):
        self._count, self._each = count, -(-count // parts)
        if count % GROUP or self._each < STATE:
            raise ValueError(f"{count} numbers cannot be drawn in {parts} parts")
        self._device, self._operations = device, operations
        rows = [exponents(start) for start in range(0, count, self._each)]
        most = max(map(len, rows))
        filled = [row + [-1] * (most - len(row)) for row in rows]
        self._places = torch.tensor(filled, dtype=torch.int32)

    def randn(self, seed: int) -> torch.Tensor:
        """The numbers. The device is not waited for.

        Args:
            seed: 0 to 2**64 - 1.

        Returns:
            [count] fp32 on the device.
        """
        state = torch.Generator().manual_seed(seed).get_state().view(torch.int64)
        self._places = self._places.to(self._device)
        words = state[FIRST_WORD : FIRST_WORD + STATE].int()
        found = self._operations.jump(words, self._places, self._each)
        return self._operations.normal(found.view(-1)[: self._count])


def exponents(distance: int) -> list[int]:
    """Of x ** distance, modulo the generator's characteristic polynomial over two elements.

    Args:
        distance: words.

    Returns:
        Ascending, from 0 to 19936: the word that comes so much later is the sum of the ones at these places, bit by bit.
    """
    polynomial = _characteristic()
    terms = _ones(polynomial ^ (1 << DEGREE))
    found = 1
    for bit in f"{distance:b}":
        found = int(f"{found:b}", 4)  # its square has the same terms at twice the exponents
        found <<= bit == "1"
        while high := found >> DEGREE:
            found ^= high << DEGREE
            for term in terms:
                found ^= high << term
    return _ones(found)


def _characteristic() -> int:
    """A polynomial as the bits of a number; in the paper's words, with s = t**(n-1) + t**(m-1) and u = t**n + t**m."""
    powers = [1]  # of s
    for _ in range(LOW_BITS):
        powers.append(powers[-1] << (STATE - 1) ^ powers[-1] << (LAG - 1))
    found = MATRIX >> LOW_BITS & 1
    for number, power in enumerate(reversed(powers)):  # u * s**31, then u * a[i] * s**(30 - i)
        if number == 0 or MATRIX >> (number - 1) & 1:
            found ^= power << STATE ^ power << LAG
    return found


def _ones(number: int) -> list[int]:
    return [place for place, bit in enumerate(reversed(f"{number:b}")) if bit == "1"]
