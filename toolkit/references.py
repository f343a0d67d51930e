"""The size at which Klein sees a reference image."""

from __future__ import annotations

import math

from .architecture import SPATIAL_FACTOR
from .errors import InputError

MAX_REFERENCES = 4
MEGAPIXEL = 1024 * 1024  # px, as ComfyUI counts one
MAX_MEGAPIXELS = 4.0


def scaled_size(width: int, height: int, megapixels: float) -> tuple[int, int]:
    """A picture's size brought down to a number of pixels, its shape kept; a smaller picture stays as it is.

    Args:
        width: px.
        height: px.
        megapixels: at most, in units of 1024 * 1024 px.

    Returns:
        (width, height) in px; what is over a multiple of 16 is still to be cut off.

    Raises:
        InputError: a side would be shorter than 16 px.

    Source: black-forest-labs/flux2 and diffusers' `Flux2KleinPipeline` only ever make references smaller; the rounding
        is that of ComfyUI's ImageScaleToTotalPixels.
    """
    most = int(megapixels * MEGAPIXEL)
    if width * height > most:
        factor = math.sqrt(most / (width * height))
        width, height = round(width * factor), round(height * factor)
    if min(width, height) < SPATIAL_FACTOR:
        raise InputError(
            f"A reference image would be {width}x{height} px, and the model sees squares of {SPATIAL_FACTOR} px.",
            "Use a larger or less narrow image, or raise megapixels.",
        )
    return width, height


def centre_crop(length: int) -> tuple[int, int]:
    """Where the largest multiple of 16 in the middle of a side starts, and how long it is.

    Args:
        length: px.
    """
    over = length % SPATIAL_FACTOR
    return over // 2, length - over


def check_count(given: int) -> None:
    """Refuse more references than Klein was trained with.

    Raises:
        InputError: there are none, or more than four.
    """
    if not 1 <= given <= MAX_REFERENCES:
        raise InputError(
            f"There are {given} reference images, Klein takes 1 to {MAX_REFERENCES}.",
            "Connect fewer; those already in the conditioning and each picture of a batch count.",
        )
