"""Group norm of pixels and what goes with it in the same pass; see `reference_pixels.py`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .launch import launch
from .reference_pixels import EPS, GROUPS

PARTS = 512  # of all pictures together: what a large card runs at the same time
NUMBERS = 4096  # that one program handles at a time
TURNS = 4  # of that, where nothing is summed up
STAGES = 3  # of that, on their way at the same time
PARTS_AT_A_TIME = 128


@triton.jit(do_not_specialize=["positions", "per_part"])  # else a new size is compiled anew
def _moments(
    x, y, shift, out, positions, channels, per_part,
    ADD: tl.constexpr, STEP: tl.constexpr, CHANNELS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    part, picture = tl.program_id(0), tl.program_id(1)
    columns = tl.arange(0, CHANNELS)
    inside = columns < channels
    start = part * per_part
    end = tl.minimum(start + per_part, positions)
    first = picture.to(tl.int64) * positions * channels
    # distances from some pixel are small, so that their squares lose nothing; y is not written to
    pivot_at = first + start.to(tl.int64) * channels + columns
    pivot = tl.load((y if ADD else x) + pivot_at, inside, 0.0).to(tl.float32)
    added = tl.zeros([CHANNELS], tl.float32)
    if ADD:
        added += tl.load(shift + columns, inside, 0.0)
        pivot += added
    sums = tl.zeros([STEP, CHANNELS], tl.float32)
    squares = tl.zeros([STEP, CHANNELS], tl.float32)
    for row in tl.range(start, end, STEP, num_stages=STAGES):
        rows = row + tl.arange(0, STEP)
        mask = (rows < end)[:, None] & inside[None, :]
        at = first + rows.to(tl.int64)[:, None] * channels + columns[None, :]
        value = tl.load(x + at, mask, 0.0).to(tl.float32)
        if ADD:
            value += tl.load(y + at, mask, 0.0).to(tl.float32) + added[None, :]
            rounded = value.to(x.dtype.element_ty)
            tl.store(x + at, rounded, mask)
            value = rounded.to(tl.float32)
        value = tl.where(mask, value - pivot[None, :], 0.0)
        sums += value
        squares += value * value
    count = (end - start).to(tl.float32)
    total = tl.sum(sums, 0)
    mean = total / count
    to = out + (picture * tl.num_programs(0) + part).to(tl.int64) * 3 * channels + columns
    tl.store(to, tl.zeros([CHANNELS], tl.float32) + count, inside)
    tl.store(to + channels, mean + pivot, inside)
    tl.store(to + 2 * channels, tl.sum(squares, 0) - total * mean, inside)


@triton.jit
def _source(position, picture, height, width):
    """Where a pixel of the result comes from, in units of C numbers."""
    line, place = position // (2 * width), position % (2 * width)
    down, across = line % 2, place % 2
    at = (picture.to(tl.int64) * (height + 1) + line // 2 + down) * (width + 1) + place // 2 + across  # fmt: skip
    return at * 4 + 2 * down + across


@triton.jit(do_not_specialize=["height", "width", "per_part"])
def _interleave(
    x, to, out, height, width, channels, per_part, STEP: tl.constexpr, CHANNELS: tl.constexpr
):
    part, picture = tl.program_id(0), tl.program_id(1)
    columns = tl.arange(0, CHANNELS)
    inside = columns < channels
    positions = 4 * height * width
    start = part * per_part
    end = tl.minimum(start + per_part, positions)
    pivot_at = _source(start, picture, height, width) * channels + columns
    pivot = tl.load(x + pivot_at, inside, 0.0).to(tl.float32)
    sums = tl.zeros([STEP, CHANNELS], tl.float32)
    squares = tl.zeros([STEP, CHANNELS], tl.float32)
    for row in range(start, end, STEP):
        rows = row + tl.arange(0, STEP)
        mask = (rows < end)[:, None] & inside[None, :]
        source = _source(rows, picture, height, width) * channels
        value = tl.load(x + source[:, None] + columns[None, :], mask, 0.0)
        target = (picture.to(tl.int64) * positions + rows) * channels
        tl.store(to + target[:, None] + columns[None, :], value, mask)
        value = tl.where(mask, value.to(tl.float32) - pivot[None, :], 0.0)
        sums += value
        squares += value * value
    count = (end - start).to(tl.float32)
    total = tl.sum(sums, 0)
    mean = total / count
    at = out + (picture * tl.num_programs(0) + part).to(tl.int64) * 3 * channels + columns
    tl.store(at, tl.zeros([CHANNELS], tl.float32) + count, inside)
    tl.store(at + channels, mean + pivot, inside)
    tl.store(at + 2 * channels, tl.sum(squares, 0) - total * mean, inside)


@triton.jit(do_not_specialize=["parts"])
def _factors(
    moments, weight, bias, shift, out, parts, channels, eps,
    SHIFT: tl.constexpr, IN_GROUP: tl.constexpr, PARTS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    group, picture = tl.program_id(0), tl.program_id(1)
    column = tl.arange(0, COLUMNS)
    inside = column < IN_GROUP
    column = group * IN_GROUP + column
    added = tl.zeros([COLUMNS], tl.float32)
    if SHIFT:
        added += tl.load(shift + column, inside, 0.0)
    moments += picture.to(tl.int64) * parts * 3 * channels
    base = moments + column[None, :]
    # distances from some mean are small, so that their squares lose nothing
    pivot = tl.load(moments + channels + group * IN_GROUP)
    if SHIFT:
        pivot += tl.load(shift + group * IN_GROUP)
    counts = tl.zeros([PARTS, COLUMNS], tl.float32)
    sums = tl.zeros([PARTS, COLUMNS], tl.float32)
    squares = tl.zeros([PARTS, COLUMNS], tl.float32)
    for part in range(0, parts, PARTS):
        rows = part + tl.arange(0, PARTS)
        mask = (rows < parts)[:, None] & inside[None, :]
        at = base + rows[:, None] * 3 * channels
        count = tl.load(at, mask, 0.0)
        distance = tl.load(at + channels, mask, 0.0) + added[None, :] - pivot
        counts += count
        sums += count * distance
        squares += tl.load(at + 2 * channels, mask, 0.0) + count * distance * distance
    total = tl.sum(tl.sum(counts, 1), 0)
    mean = tl.sum(tl.sum(sums, 1), 0) / total
    variance = tl.sum(tl.sum(squares, 1), 0) / total - mean * mean
    centre = mean + pivot
    factor = tl.load(weight + column, inside, 0.0) * tl.rsqrt(variance + eps)
    addend = tl.load(bias + column, inside, 0.0) + (added - centre) * factor
    to = out + picture * 2 * channels + column
    tl.store(to, factor, inside)
    tl.store(to + channels, addend, inside)


@triton.jit(do_not_specialize=["positions"])
def _normed(
    x, factors, out, positions, channels,
    SILU: tl.constexpr, TURNS: tl.constexpr, STEP: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    picture = tl.program_id(1)
    columns = tl.arange(0, CHANNELS)
    inside = columns < channels
    given = factors + picture * 2 * channels + columns
    factor = tl.load(given, inside, 0.0)[None, :]
    addend = tl.load(given + channels, inside, 0.0)[None, :]
    first = picture.to(tl.int64) * positions * channels
    for turn in tl.static_range(TURNS):
        rows = (tl.program_id(0) * TURNS + turn) * STEP + tl.arange(0, STEP)
        mask = (rows < positions)[:, None] & inside[None, :]
        at = first + rows.to(tl.int64)[:, None] * channels + columns[None, :]
        value = tl.load(x + at, mask, 0.0).to(tl.float32) * factor + addend
        if SILU:
            value = value / (1.0 + tl.exp(-value))
        tl.store(out + at, value.to(out.dtype.element_ty), mask)


def _sizes(batch: int, positions: int, channels: int) -> tuple[int, int, int, int]:
    """How many parts a picture gets, pixels of a part, pixels at a time, and channels rounded up."""
    columns = triton.next_power_of_2(channels)
    step = max(1, NUMBERS // columns)
    wanted = triton.cdiv(positions, max(1, PARTS // batch))
    per_part = triton.cdiv(wanted, step) * step
    return triton.cdiv(positions, per_part), per_part, step, columns


def check(*tensors: torch.Tensor) -> None:
    """Raise ValueError for pixels that do not lie one after the other."""
    for tensor in tensors:
        if tensor.dim() != 4 or not tensor.is_contiguous():
            raise ValueError(f"pixels must be contiguous [B, H, W, C], not {tuple(tensor.shape)} with {tensor.stride()}")  # fmt: skip


def moments(x: torch.Tensor) -> torch.Tensor:
    """As `reference_pixels.moments`."""
    check(x)
    return _moments_of(x, None, None)


def add(x: torch.Tensor, y: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    """As `reference_pixels.add`."""
    check(x, y)
    return _moments_of(x, y, shift)


def _moments_of(
    x: torch.Tensor, y: torch.Tensor | None, shift: torch.Tensor | None
) -> torch.Tensor:
    batch, height, width, channels = x.shape
    parts, per_part, step, columns = _sizes(batch, height * width, channels)
    out = x.new_empty(batch, parts, 3, channels, dtype=torch.float32)
    launch(_moments, (parts, batch))(
        x, x if y is None else y, out if shift is None else shift, out, height * width, channels, per_part,
        ADD=y is not None, STEP=step, CHANNELS=columns, STAGES=STAGES, num_warps=4,
    )  # fmt: skip
    return out


def interleave(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """As `reference_pixels.interleave`."""
    check(x)
    batch, height, width, channels = x.shape
    height, width, channels = height - 1, width - 1, channels // 4
    parts, per_part, step, columns = _sizes(batch, 4 * height * width, channels)
    to = x.new_empty(batch, 2 * height, 2 * width, channels)
    out = x.new_empty(batch, parts, 3, channels, dtype=torch.float32)
    launch(_interleave, (parts, batch))(
        x, to, out, height, width, channels, per_part, STEP=step, CHANNELS=columns, num_warps=4
    )
    return to, out


def factors(
    moments: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    shift: torch.Tensor | None = None,
) -> torch.Tensor:
    """As `reference_pixels.factors`."""
    batch, parts, _, channels = moments.shape
    in_group = channels // GROUPS
    out = moments.new_empty(batch, 2, channels)
    launch(_factors, (GROUPS, batch))(
        moments.contiguous(), weight, bias, weight if shift is None else shift, out, parts, channels, EPS,
        SHIFT=shift is not None, IN_GROUP=in_group, PARTS=PARTS_AT_A_TIME, COLUMNS=triton.next_power_of_2(in_group), num_warps=4,
    )  # fmt: skip
    return out


def normed(
    x: torch.Tensor, factors: torch.Tensor, silu: bool = True, in_place: bool = False
) -> torch.Tensor:
    """As `reference_pixels.normed`."""
    check(x)
    batch, height, width, channels = x.shape
    out = x if in_place else torch.empty_like(x)
    columns = triton.next_power_of_2(channels)
    step = max(1, NUMBERS // columns)
    launch(_normed, (triton.cdiv(height * width, step * TURNS), batch))(
        x, factors, out, height * width, channels,
        SILU=silu, TURNS=TURNS, STEP=step, CHANNELS=columns, num_warps=8,
    )  # fmt: skip
    return out
