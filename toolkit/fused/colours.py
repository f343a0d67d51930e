"""The two convolutions of the autoencoder that have colours on one side; see `reference_pixels.py`.

Libraries multiply many channels by many, and of so few they make a multiple first. What they cost is what the many channels
take to be read or written, and the norm beside them reads or writes the same.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .group_norm import check, divide
from .launch import launch

PLACES = 9  # that a convolution of 3x3 reads
PIXELS = 128  # at a time
CHANNELS = 128  # at a time, of those that are summed up
FOUND = 256  # pixels of a picture that one program puts together


@triton.jit(do_not_specialize=["height", "width", "per_part"])
def _from_colours(
    x, weight, out, found, height, width, channels, per_part,
    COLOURS: tl.constexpr, NUMBERS: tl.constexpr, PIXELS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    part, picture = tl.program_id(0), tl.program_id(1)
    positions = height * width
    start = part * per_part
    end = tl.minimum(start + per_part, positions)
    columns, number = tl.arange(0, CHANNELS), tl.arange(0, NUMBERS)
    inside, real = columns < channels, number < 9 * COLOURS
    place, colour = number // COLOURS, number % COLOURS
    down, across = place // 3 - 1, place % 3 - 1
    w = tl.load(weight + columns[None, :] * 9 * COLOURS + number[:, None], real[:, None] & inside[None, :], 0.0)  # fmt: skip
    count = 0.0
    mean = tl.zeros([CHANNELS], tl.float32)
    squares = tl.zeros([CHANNELS], tl.float32)
    first = picture.to(tl.int64) * positions
    for pixel in range(start, end, PIXELS):
        pixels = pixel + tl.arange(0, PIXELS)
        there = pixels < end
        y, z = (pixels // width)[:, None] + down[None, :], (pixels % width)[:, None] + across[None, :]  # fmt: skip
        mask = there[:, None] & real[None, :] & (y >= 0) & (y < height) & (z >= 0) & (z < width)
        at = (first + y * width + z) * COLOURS + colour[None, :]
        given = tl.load(x + at, mask, 0.0).to(w.dtype)
        value = tl.dot(given, w, input_precision="ieee").to(out.dtype.element_ty)
        mask = there[:, None] & inside[None, :]
        tl.store(out + (first + pixels)[:, None] * channels + columns[None, :], value, mask)
        # the moments of these, and what they make of those before
        value = tl.where(mask, value.to(tl.float32), 0.0)
        here = tl.minimum(end - pixel, PIXELS).to(tl.float32)
        centre = tl.sum(value, 0) / here
        distance = tl.where(mask, value - centre[None, :], 0.0)
        moved, both = centre - mean, count + here
        squares += tl.sum(distance * distance, 0) + moved * moved * (count * here / both)
        mean += moved * (here / both)
        count = both
    to = found + (picture * tl.num_programs(0) + part).to(tl.int64) * 3 * channels + columns
    tl.store(to, tl.zeros([CHANNELS], tl.float32) + count, inside)
    tl.store(to + channels, mean, inside)
    tl.store(to + 2 * channels, squares, inside)


@triton.jit(do_not_specialize=["positions"])
def _products(
    x, factors, weight, out, positions, channels, outputs,
    PIXELS: tl.constexpr, CHANNELS: tl.constexpr, OUTPUTS: tl.constexpr,
):  # fmt: skip
    """Of each pixel with the weights of all places, [B, outputs, positions]."""
    picture = tl.program_id(1)
    pixels, output = tl.program_id(0) * PIXELS + tl.arange(0, PIXELS), tl.arange(0, OUTPUTS)
    there, wanted = (pixels < positions)[:, None], output < outputs
    rows = (picture.to(tl.int64) * positions + pixels)[:, None] * channels
    given = factors + picture * 2 * channels
    found = tl.zeros([PIXELS, OUTPUTS], tl.float32)
    for first in range(0, channels, CHANNELS):
        columns = first + tl.arange(0, CHANNELS)
        inside = columns < channels
        factor = tl.load(given + columns, inside, 0.0)[None, :]
        addend = tl.load(given + channels + columns, inside, 0.0)[None, :]
        value = tl.load(x + rows + columns[None, :], there & inside[None, :], 0.0).to(tl.float32)
        value = value * factor + addend
        value = value / (1.0 + tl.exp(-value))
        w = tl.load(weight + output[None, :] * channels + columns[:, None], inside[:, None] & wanted[None, :], 0.0)  # fmt: skip
        found += tl.dot(value.to(w.dtype), w, input_precision="ieee")
    to = (picture * outputs + output).to(tl.int64)[None, :] * positions + pixels[:, None]
    tl.store(out + to, found, there & wanted[None, :])


@triton.jit(do_not_specialize=["height", "width"])
def _gathered(products, bias, out, height, width, COLOURS: tl.constexpr, PIXELS: tl.constexpr):
    picture = tl.program_id(1)
    positions = height * width
    pixels = tl.program_id(0) * PIXELS + tl.arange(0, PIXELS)
    there = pixels < positions
    line, column = pixels // width, pixels % width
    for colour in tl.static_range(COLOURS):
        found = tl.zeros([PIXELS], tl.float32) + tl.load(bias + colour)
        for place in tl.static_range(9):
            y, z = line + (place // 3 - 1), column + (place % 3 - 1)
            mask = there & (y >= 0) & (y < height) & (z >= 0) & (z < width)
            base = (picture * COLOURS + colour).to(tl.int64) * 9 + place
            found += tl.load(products + base * positions + y * width + z, mask, 0.0)
        tl.store(out + (picture.to(tl.int64) * positions + pixels) * COLOURS + colour, found, there)


def from_colours(x: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """As `reference_pixels.from_colours`."""
    check(x)
    batch, height, width, colours = x.shape
    channels = len(weight)
    parts, per_part = divide(batch, height * width, PIXELS)
    out = x.new_empty(batch, height, width, channels, dtype=weight.dtype)
    found = x.new_empty(batch, parts, 3, channels, dtype=torch.float32)
    launch(_from_colours, (parts, batch))(
        x, weight.permute(0, 2, 3, 1).contiguous(), out, found, height, width, channels, per_part,
        COLOURS=colours, NUMBERS=triton.next_power_of_2(PLACES * colours), PIXELS=PIXELS,
        CHANNELS=max(16, triton.next_power_of_2(channels)), num_warps=8,
    )  # fmt: skip
    return out, found


def to_colours(x: torch.Tensor, factors: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:  # fmt: skip
    """As `reference_pixels.to_colours`."""
    check(x)
    batch, height, width, channels = x.shape
    colours, outputs = len(weight), PLACES * len(weight)
    products = x.new_empty(batch, outputs, height * width, dtype=torch.float32)
    out = x.new_empty(batch, height, width, colours, dtype=torch.float32)
    launch(_products, (triton.cdiv(height * width, PIXELS), batch))(
        x, factors, weight.permute(0, 2, 3, 1).contiguous(), products, height * width, channels, outputs,
        PIXELS=PIXELS, CHANNELS=min(CHANNELS, triton.next_power_of_2(channels)), OUTPUTS=triton.next_power_of_2(outputs), num_warps=8,
    )  # fmt: skip
    launch(_gathered, (triton.cdiv(height * width, FOUND), batch))(
        products, bias, out, height, width, COLOURS=colours, PIXELS=FOUND, num_warps=4
    )
    return out
