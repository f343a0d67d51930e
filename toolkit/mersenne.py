"""Normal numbers as torch draws them on a CPU, in several threads at the same time.

torch draws from one Mersenne Twister, which takes 4 to 7 ns a number: 2 to 4 ms for a picture of 1024x1024. The state that it
will have many numbers later is a sum, bit by bit, of words that it gives next, and which ones depends on the distance only: so
a device can find it at once, and each thread goes on from one.

Source: M. Matsumoto, T. Nishimura, Mersenne Twister, 1998 (the generator, and its characteristic polynomial); H. Haramoto et
al., Efficient Jump Ahead for F2-Linear Random Number Generators, 2008.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from .fused import reference
from .fused.reference import STATE

WORDS, LAG, MATRIX = STATE, 397, 0x9908B0DF  # n, m and a of the paper, whose w is 32 and r is 31
BITS, LOW_BITS = 32, 31
DEGREE = WORDS * BITS - LOW_BITS
NEEDED = DEGREE + WORDS - 1  # words from which a later state is made
THREADS = 8  # at most
FIRST_WORD = 3  # in what torch gives as a generator's state, in numbers of 8 bytes
_threads = ThreadPoolExecutor(THREADS - 1, "ark-draw")


class JumpAhead:
    """Draws numbers in equal parts.

    Args:
        count: of the numbers, a multiple of 16, as torch draws others in another order.
        parts: of numbers for which a state is found at a time, the last one smaller; at least 2.
        device: that finds the states. Nothing is done there before the first draw.
        operations: has `jump`, see `fused/reference.py`.

    Raises:
        ValueError: the numbers cannot be drawn so.
    """

    def __init__(self, count: int, parts: int, device: torch.device, operations: Any = reference):
        self._each = -(-count // (parts * WORDS)) * WORDS  # so that states begin where torch's do
        if count % 16 or count <= self._each:
            raise ValueError(f"{count} numbers cannot be drawn in {parts} parts")
        self._device, self._operations = device, operations
        starts = range(self._each, count, self._each)
        self._exponents = [exponents(start - WORDS) for start in starts]

    @functools.cached_property
    def _buffers(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Words of the generator, with zeros behind them, the places of those that make states, and states."""
        most, pinned = max(map(len, self._exponents)), self._device.type == "cuda"
        filled = [row + [NEEDED] * (most - len(row)) for row in self._exponents]
        with torch.inference_mode(False):  # they are written to in any
            words = torch.zeros(NEEDED + WORDS, dtype=torch.int32, pin_memory=pinned)
            states = torch.empty(len(filled), WORDS, dtype=torch.int64, pin_memory=pinned)
            return words, torch.tensor(filled, dtype=torch.int32).to(self._device), states

    def randn(self, seed: int, out: torch.Tensor) -> torch.Generator:
        """As `torch.randn` with a generator of this seed. One thread at a time may call it.

        Args:
            seed: 0 to 2**64 - 1.
            out: contiguous, fp32, `count` numbers.

        Returns:
            The generator as it is after that.
        """
        first, *others = out.view(-1).split(self._each)
        generators = [torch.Generator().manual_seed(seed)]
        coming = [_threads.submit(_draw, first, generators[0])]
        for state in self._later_states(seed):
            generators.append(torch.Generator())
            generators[-1].set_state(state)
        given = list(zip(others, generators[1:], strict=True))
        coming += [_threads.submit(_draw, *each) for each in given[:-1]]
        _draw(*given[-1])
        for each in coming:
            each.result()
        return generators[-1]

    def _later_states(self, seed: int) -> Iterator[torch.Tensor]:
        """Of each part but the first, as torch takes them."""
        generator, (given, places, states) = torch.Generator().manual_seed(seed), self._buffers
        fresh = generator.get_state().view(torch.int64)
        pairs = torch.empty(NEEDED // 2, dtype=torch.int64)
        # all bits of two words, the later one below
        pairs.random_(-(1 << 63), None, generator=generator)
        given[:NEEDED].view(-1, 2).copy_(pairs.view(torch.int32).view(-1, 2).flip(1))
        found = self._operations.jump(given.to(self._device, non_blocking=True), places)
        states.copy_(found, non_blocking=True)
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()
        for words in states:
            state = fresh.clone()
            state[FIRST_WORD : FIRST_WORD + WORDS] = words
            yield state.view(torch.uint8)


def _draw(out: torch.Tensor, generator: torch.Generator) -> None:
    with torch.inference_mode():  # a mode is a thread's own
        out.normal_(generator=generator)


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
        powers.append(powers[-1] << (WORDS - 1) ^ powers[-1] << (LAG - 1))
    found = MATRIX >> LOW_BITS & 1
    for number, power in enumerate(reversed(powers)):  # u * s**31, then u * a[i] * s**(30 - i)
        if number == 0 or MATRIX >> (number - 1) & 1:
            found ^= power << WORDS ^ power << LAG
    return found


def _ones(number: int) -> list[int]:
    return [place for place, bit in enumerate(reversed(f"{number:b}")) if bit == "1"]
