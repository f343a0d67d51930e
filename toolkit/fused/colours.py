"""The two convolutions of the autoencoder that have colours on one side; see `reference_pixels.py`.

Libraries multiply many channels by many, and make a multiple of so few first. Here they cost about what it takes to read or
write the many.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .group_norm import check
from .launch import launch, processors

PLACES = 9  # that a convolution of 3x3 reads
PIXELS = 64  # that one program makes
BYTES = 16384  # of what one program multiplies at a time
PROGRAMS = 4  # that a processor runs at the same time, each with what it multiplies next on its way
GATHERED = 256  # pixels that one program puts together


@triton.jit(do_not_specialize=["height", "width"])
def _from_colours(
    x, weight, out, height, width, channels,
    COLOURS: tl.constexpr, INPUTS: tl.constexpr, PIXELS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    picture = tl.program_id(1)
    positions = height * width
    columns, number = tl.arange(0, CHANNELS), tl.arange(0, INPUTS)
    inside, real = columns < channels, number < 9 * COLOURS
    place, colour = number // COLOURS, number % COLOURS
    down, across = place // 3 - 1, place % 3 - 1
    w = tl.load(weight + columns[None, :] * 9 * COLOURS + number[:, None], real[:, None] & inside[None, :], 0.0)  # fmt: skip
    pixels = tl.program_id(0) * PIXELS + tl.arange(0, PIXELS)
    there = pixels < positions
    line, column = (pixels // width)[:, None] + down[None, :], (pixels % width)[:, None] + across[None, :]  # fmt: skip
    mask = there[:, None] & real[None, :] & (line >= 0) & (line < height) & (column >= 0) & (column < width)  # fmt: skip
    given = x + picture.to(tl.int64) * positions * COLOURS
    step = (down * width + across) * COLOURS + colour
    numbers = tl.load(given + (pixels * COLOURS)[:, None] + step[None, :], mask, 0.0).to(w.dtype)
    found = tl.dot(numbers, w, input_precision="ieee").to(out.dtype.element_ty)
    to = out + picture.to(tl.int64) * positions * channels + pixels.to(tl.int64)[:, None] * channels
    tl.store(to + columns[None, :], found, there[:, None] & inside[None, :])


@triton.jit(do_not_specialize=["positions", "tiles"])
def _products(
    x, factors, weight, out, positions, channels, outputs, tiles,
    PIXELS: tl.constexpr, CHANNELS: tl.constexpr, OUTPUTS: tl.constexpr,
):  # fmt: skip
    """Of each pixel with the weights of all places, [B, outputs, positions]."""
    picture = tl.program_id(1)
    output, columns = tl.arange(0, OUTPUTS), tl.arange(0, CHANNELS)
    wanted, inside = output < outputs, columns < channels
    given = factors + picture * 2 * channels + columns
    factor = tl.load(given, inside, 0.0)[None, :]
    addend = tl.load(given + channels, inside, 0.0)[None, :]
    w = tl.load(weight + output[None, :] * channels + columns[:, None], inside[:, None] & wanted[None, :], 0.0)  # fmt: skip
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), num_stages=3):
        pixels = tile * PIXELS + tl.arange(0, PIXELS)
        there = (pixels < positions)[:, None]
        rows = (picture.to(tl.int64) * positions + pixels)[:, None] * channels
        value = tl.load(x + rows + columns[None, :], there & inside[None, :], 0.0).to(tl.float32)
        value = value * factor + addend
        value = value / (1.0 + tl.exp(-value))
        found = tl.dot(value.to(w.dtype), w, input_precision="ieee")
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


def from_colours(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """As `reference_pixels.from_colours`."""
    check(x)
    batch, height, width, colours = x.shape
    channels = len(weight)
    if weight.shape[1] != colours:
        raise ValueError(f"pixels have {colours} colours, the weight takes {weight.shape[1]}")
    out = x.new_empty(batch, height, width, channels, dtype=weight.dtype)
    launch(_from_colours, (triton.cdiv(height * width, PIXELS), batch))(
        x, weight.permute(0, 2, 3, 1).contiguous(), out, height, width, channels,
        COLOURS=colours, INPUTS=max(16, triton.next_power_of_2(PLACES * colours)), PIXELS=PIXELS,
        CHANNELS=max(16, triton.next_power_of_2(channels)), num_warps=4,
    )  # fmt: skip
    return out


def to_colours(x: torch.Tensor, factors: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:  # fmt: skip
    """As `reference_pixels.to_colours`."""
    check(x)
    batch, height, width, channels = x.shape
    colours, outputs = len(weight), PLACES * len(weight)
    products = x.new_empty(batch, outputs, height * width, dtype=torch.float32)
    out = x.new_empty(batch, height, width, colours, dtype=torch.float32)
    columns = max(16, triton.next_power_of_2(channels))
    pixels = max(16, BYTES // x.element_size() // columns)
    tiles = triton.cdiv(height * width, pixels)
    programs = min(tiles, triton.cdiv(PROGRAMS * processors(x.device), batch))
    launch(_products, (programs, batch))(
        x, factors, weight.permute(0, 2, 3, 1).contiguous(), products, height * width, channels, outputs, tiles,
        PIXELS=pixels, CHANNELS=columns, OUTPUTS=max(16, triton.next_power_of_2(outputs)), num_warps=4,
    )  # fmt: skip
    launch(_gathered, (triton.cdiv(height * width, GATHERED), batch))(
        products, bias, out, height, width, COLOURS=colours, PIXELS=GATHERED, num_warps=4
    )
    return out
