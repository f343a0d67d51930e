"""Runs a model once at each size that will be needed, so that nobody waits for a compiler or a first kernel later."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch

from ..toolkit.architecture import LATENT_CHANNELS, SPATIAL_FACTOR
from ..toolkit.errors import InputError
from .sampling import sample_klein

LARGEST = 4096  # px


def parse_sizes(text: str) -> list[tuple[int, int]]:
    """Read sizes like "1024x1024, 832x1216".

    Returns:
        (width, height) of each in px, no size twice.

    Raises:
        InputError: a size cannot be read, is no multiple of 16, or is too large.
    """
    sizes: list[tuple[int, int]] = []
    for part in filter(None, re.split(r"[\s,;]+", text.lower())):
        match = re.fullmatch(r"(\d+)x(\d+)", part)
        size = (int(match[1]), int(match[2])) if match else (0, 0)
        if any(not SPATIAL_FACTOR <= n <= LARGEST or n % SPATIAL_FACTOR for n in size):
            raise InputError(
                f"{part} is not a size of whole {SPATIAL_FACTOR}s from {SPATIAL_FACTOR}x{SPATIAL_FACTOR} to {LARGEST}x{LARGEST}.",
                "Write sizes like 1024x1024, 832x1216.",
            )
        if size not in sizes:
            sizes.append(size)
    if not sizes:
        raise InputError("No size is given.", "Write sizes like 1024x1024, 832x1216.")
    return sizes


def prewarm(
    model: Any, sizes: list[tuple[int, int]], batch: int, advance: Callable[[], None]
) -> None:
    """Run one step at each size; what it makes is thrown away.

    Args:
        model: the host's ModelPatcher of a FLUX.2 model, with whatever was set on it.
        sizes: (width, height) in px.
        batch: pictures at once.
        advance: called after each size.
    """
    width = model.model.diffusion_model.txt_in.weight.shape[1]
    positive = [[torch.zeros(1, 512, width), {"pooled_output": None}]]
    for size in sizes:
        across, down = (length // SPATIAL_FACTOR for length in size)
        latent = {"samples": torch.zeros(batch, LATENT_CHANNELS, down, across)}
        sample_klein(model, positive, latent, 0, 1, 1.0, preview=False)
        advance()
