"""FLUX.2's autoencoder as two functions over plain records of weights; knows no host."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from .fused import reference
from .pixel_layers import USUAL, Choices, Conv, Level, Matrix, Middle, Norm
from .pixels import Network, Pixels, collect

PACK = 2  # pixels of the encoder's result along each side of a latent position


@dataclass(frozen=True)
class Decoder:
    """Weights of the way from latents to a picture.

    Attributes:
        mean: [128] fp32, as `deviation`, of the latents.
        widen: what the host calls post_quant_conv.
    """

    mean: torch.Tensor
    deviation: torch.Tensor
    widen: Matrix
    first: Conv
    middle: Middle
    levels: list[Level]
    norm: Norm
    last: Conv


@dataclass(frozen=True)
class Encoder:
    """Weights of the way back; `narrow` gives the mean only."""

    first: Conv
    levels: list[Level]
    middle: Middle
    norm: Norm
    last: Conv
    narrow: Matrix
    mean: torch.Tensor
    deviation: torch.Tensor


def decode(
    weights: Decoder,
    latents: torch.Tensor,
    operations: Any = reference,
    choices: Choices = USUAL,
) -> torch.Tensor:
    """Latents to a picture.

    Args:
        weights: of the decoder; the dtype of its matrices is the one that it computes in.
        latents: [B, 128, H / 16, W / 16], as the transformer makes them.
        operations: between the convolutions, see `fused/reference_pixels.py`.
        choices: how.

    Returns:
        [B, H, W, 3] fp32, about -1 to 1.
    """
    if choices.band and len(latents) > 1:
        return torch.cat([decode(weights, one, operations, choices) for one in latents.split(1)])
    z = latents.float() * weights.deviation[:, None, None] + weights.mean[:, None, None]
    batch, channels, height, width = z.shape
    z = z.view(batch, channels // PACK**2, PACK, PACK, height, width).permute(0, 4, 2, 5, 3, 1)
    z = z.reshape(batch, PACK * height, PACK * width, -1)
    return to_pixels(weights, z, operations, choices)


def to_pixels(
    weights: Decoder, z: torch.Tensor, operations: Any = reference, choices: Choices = USUAL
) -> torch.Tensor:
    """As `decode`, of what the encoder made, [B, H / 8, W / 8, 32]."""
    network, dtype = Network(operations, choices), weights.first.weight.dtype
    z = z.to(dtype)
    z = F.linear(z, weights.widen.weight, weights.widen.bias.to(dtype))
    x: Any = network.middle(Pixels(network.convolve(z, weights.first.weight), weights.first.bias), weights.middle)  # fmt: skip
    for number, (blocks, up) in enumerate(weights.levels):
        for block in blocks:
            x = network.block(x, block)
        if up is not None:
            following = weights.levels[number + 1][0][0]
            x = network.upsample(x, up, lasting=following.shortcut is None)
    factors, bands = network.factors(x, weights.norm), list(network.bands(x.size))
    size = (*x.size[:3], len(weights.last.bias))
    return collect(size, bands, lambda band: network.to_colours(x, factors, weights.last, band))


def encode(
    weights: Encoder,
    pixels: torch.Tensor,
    operations: Any = reference,
    choices: Choices = USUAL,
) -> torch.Tensor:
    """A picture to latents, the mean of what the encoder says.

    Args:
        weights: of the encoder; the dtype of its matrices is the one that it computes in.
        pixels: [B, H, W, 3] from -1 to 1, H and W multiples of 16.
        operations: between the convolutions, see `fused/reference_pixels.py`.
        choices: how.

    Returns:
        [B, 128, H / 16, W / 16] fp32, as the transformer reads them.
    """
    if choices.band and len(pixels) > 1:
        return torch.cat([encode(weights, one, operations, choices) for one in pixels.split(1)])
    z = from_pixels(weights, pixels, operations, choices)
    batch, height, width, channels = z.shape
    z = z.view(batch, height // PACK, PACK, width // PACK, PACK, channels).permute(0, 5, 2, 4, 1, 3)
    z = z.reshape(batch, channels * PACK**2, height // PACK, width // PACK)
    return (z - weights.mean[:, None, None]) / weights.deviation[:, None, None]


def from_pixels(
    weights: Encoder, pixels: torch.Tensor, operations: Any = reference, choices: Choices = USUAL
) -> torch.Tensor:
    """As `encode`, but what the encoder itself makes: [B, H / 8, W / 8, outputs of `narrow`] fp32."""
    network = Network(operations, choices)
    x = Pixels(
        operations.from_colours(pixels.contiguous(), weights.first.weight), weights.first.bias
    )
    for blocks, down in weights.levels:
        for block in blocks:
            x = network.block(x, block)
        x = x if down is None else network.downsample(x, down)
    x = network.middle(x, weights.middle)
    factors, bands = network.factors(x, weights.norm), list(network.bands(x.size))
    size = (*x.size[:3], len(weights.last.bias))
    y = collect(size, bands, lambda band: network.convolve_normed(x, factors, weights.last, band, last_use=True))  # fmt: skip
    y = (y.float() + weights.last.bias).to(y.dtype)
    return F.linear(y, weights.narrow.weight, weights.narrow.bias.to(y.dtype)).float()
