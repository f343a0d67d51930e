"""What a picture takes while the autoencoder computes it: measured once, an estimate for every other size."""

from __future__ import annotations

RECORDED = 3 << 30  # bytes that a run may need to be recorded; larger ones keep a card busy
SHARE = 16  # of the card's memory that a recording may keep: one in so many
ROOM = 512 << 20  # bytes beside the pixels: attention's scores, what convolutions work in
BAND = 1 << 18  # pixels at a time where memory is short
TENSORS = {
    "decode": (6.0, 3.0),
    "encode": (4.0, 2.5),
}  # of the largest size, needed at once: at one go, in bands
MOST = 15 << 27  # numbers of the largest tensor; from 16 << 27 on libraries count differently


def needed(way: str, pixels: int, width: int, itemsize: int, band: bool = False) -> int:
    """Bytes that a picture takes.

    Args:
        way: "decode" or "encode".
        pixels: of it.
        width: channels at the size of the picture.
        itemsize: bytes of a number.
        band: whether it is computed in bands.
    """
    at_once, in_bands = TENSORS[way]
    return int(pixels * width * itemsize * (in_bands if band else at_once)) + ROOM


def numbers(way: str, pixels: int, width: int) -> int:
    """Of the largest tensor of one picture; see `needed`."""
    return pixels * width * (2 if way == "decode" else 1)
