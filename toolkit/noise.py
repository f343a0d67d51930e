"""The noise that a seed stands for, the same as ComfyUI's."""

from __future__ import annotations

import torch

from .architecture import LATENT_CHANNELS, SPATIAL_FACTOR


def klein_noise(seed: int, width: int, height: int) -> torch.Tensor:
    """Noise for one picture, drawn on the CPU whatever the model runs on.

    Args:
        seed: 0 to 2**64 - 1.
        width: px, a multiple of 16.
        height: px, a multiple of 16.

    Returns:
        [1, 128, H/16, W/16] float32.

    Source: `comfy.sample.prepare_noise` of comfyanonymous/ComfyUI; the generator here is one of its own.
    """
    shape = (1, LATENT_CHANNELS, height // SPATIAL_FACTOR, width // SPATIAL_FACTOR)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float32)
