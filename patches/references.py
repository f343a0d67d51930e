"""Reference images for editing: scaled, encoded, and put into the conditioning as the host's own nodes do."""

from __future__ import annotations

from typing import Any

import comfy.model_management
import comfy.utils
import node_helpers
import torch

from ..toolkit.architecture import LATENT_CHANNELS
from ..toolkit.errors import InputError
from ..toolkit.references import centre_crop, check_count, scaled_size

REFERENCES = "reference_latents"  # the host's key in a conditioning's options


def add_references(
    conditioning: list, vae: Any, images: list, megapixels: float
) -> tuple[list, dict]:
    """Let a prompt speak about pictures.

    Args:
        conditioning: the host's CONDITIONING; references that it has already stay in front.
        vae: the host's VAE of FLUX.2.
        images: IMAGEs, each [B, H, W, C] from 0 to 1, in the order in which the prompt counts them.
        megapixels: larger pictures are made smaller, to so many times 1024 * 1024 px.

    Returns:
        The conditioning with the references, and an empty LATENT of the first new one's size.

    Raises:
        InputError: too many pictures, one is too small, or the VAE is of another model.
    """
    pictures = [picture for image in images for picture in image.split(1)]
    present = max((len(options.get(REFERENCES, ())) for _, options in conditioning), default=0)
    check_count(present + len(pictures))
    fitted = [fit(picture, megapixels) for picture in pictures]
    latents = [vae.encode(picture) for picture in fitted]
    if latents[0].shape[1] != LATENT_CHANNELS:
        raise InputError(
            f"The VAE makes latents of {latents[0].shape[1]} channels, Klein's have {LATENT_CHANNELS}.",
            "Connect the FLUX.2 VAE.",
        )
    empty = torch.zeros(
        1, *latents[0].shape[1:], device=comfy.model_management.intermediate_device()
    )
    values = {REFERENCES: latents}
    referenced = node_helpers.conditioning_set_values(conditioning, values, append=True)
    return referenced, {"samples": empty}


def fit(picture: torch.Tensor, megapixels: float) -> torch.Tensor:
    """Scale and cut a picture for the model.

    Args:
        picture: [1, H, W, C] from 0 to 1; of C the first three are used.
        megapixels: at most, in units of 1024 * 1024 px.

    Returns:
        [1, H', W', 3] in multiples of 16.
    """
    height, width = picture.shape[1:3]
    across, down = scaled_size(width, height, megapixels)
    channels = picture[..., :3].movedim(-1, 1)
    if (across, down) != (width, height):
        channels = comfy.utils.common_upscale(channels, across, down, "lanczos", "disabled")
    (top, tall), (left, wide) = centre_crop(down), centre_crop(across)
    return channels[:, :, top : top + tall, left : left + wide].movedim(1, -1)
