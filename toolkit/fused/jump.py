"""Later states of a random generator; see `reference.jump`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .launch import launch
from .reference import STATE

AT_A_TIME = 128  # places
COLUMNS = 16  # words that one program makes


@triton.jit(do_not_specialize=["most"])
def _jump(words, places, out, most, STATE: tl.constexpr, AT_A_TIME: tl.constexpr, COLUMNS: tl.constexpr):  # fmt: skip
    state = tl.program_id(1)
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inside = columns < STATE
    sums = tl.zeros([AT_A_TIME, COLUMNS], tl.int32)
    for first in range(0, most, AT_A_TIME):
        numbers = first + tl.arange(0, AT_A_TIME)
        at = tl.load(places + state * most + numbers, numbers < most, 0)
        mask = (numbers < most)[:, None] & inside[None, :]
        sums ^= tl.load(words + at[:, None] + columns[None, :], mask, 0)
    y = tl.xor_sum(sums, 0).to(tl.uint32, bitcast=True)
    y ^= y >> 18
    y ^= (y << 15) & 0xEFC60000
    z = y
    for _ in tl.static_range(4):
        z = y ^ ((z << 7) & 0x9D2C5680)
    y = z ^ (z >> 11)
    y = z ^ (y >> 11)
    tl.store(out + state * STATE + columns, y.to(tl.int64), inside)


def jump(words: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """As `reference.jump`."""
    states, most = places.shape
    out = torch.empty(states, STATE, dtype=torch.int64, device=words.device)
    launch(_jump, (triton.cdiv(STATE, COLUMNS), states))(
        words, places, out, most, STATE=STATE, AT_A_TIME=AT_A_TIME, COLUMNS=COLUMNS, num_warps=4
    )
    return out


def compile_jump() -> None:
    """Compile the kernel for the current device; nothing is launched."""
    kinds = torch.int32, torch.int32, torch.int64
    _jump.warmup(*kinds, 1, STATE=STATE, AT_A_TIME=AT_A_TIME, COLUMNS=COLUMNS, num_warps=4, grid=(1, 1))  # fmt: skip
