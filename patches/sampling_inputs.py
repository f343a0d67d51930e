"""What a sampler of Klein can be given, looked at before anything runs."""

from __future__ import annotations

import logging
import math
from typing import Any

import comfy.model_base
import torch

from ..toolkit.architecture import LATENT_CHANNELS, SPATIAL_FACTOR
from ..toolkit.errors import InputError
from .references import REFERENCES

HIGHEST_SIGMA = 1.0001  # pure noise, with room for rounding
log = logging.getLogger("ark")


def check_model(model: Any) -> None:
    """Refuse what is not FLUX.2.

    Args:
        model: the host's ModelPatcher.
    """
    if not isinstance(model.model, comfy.model_base.Flux2):
        raise InputError(
            f"The model is {type(model.model).__name__}, not FLUX.2.",
            "Connect a FLUX.2-Klein, as ArkFastLoader makes it.",
        )


def check_latent(samples: torch.Tensor) -> None:
    """Refuse a latent that is not [B, 128, H/16, W/16]."""
    if samples.ndim != 4 or samples.shape[1] != LATENT_CHANNELS:
        raise InputError(
            f"The latent has {samples.shape[1]} channels, Klein's has {LATENT_CHANNELS} at 1/{SPATIAL_FACTOR} size.",
            "Use EmptyFlux2LatentImage, or encode the picture with the FLUX.2 VAE.",
        )


def check_mask(mask: torch.Tensor | None) -> None:
    """Refuse a mask that says nothing about where to paint, and warn of one that lets nothing be painted.

    Args:
        mask: [H, W], [B, H, W] or [B, 1, H, W], 1 where the picture is made anew; any size, the host scales it.
    """
    if mask is None:
        return
    remedy = (
        "Paint a mask over the picture (right click, Open in MaskEditor), or leave the mask out."
    )
    if not 2 <= mask.ndim <= 4 or mask.numel() == 0:
        raise InputError(
            f"The noise mask has the shape {list(mask.shape)}, not [pictures, height, width].",
            remedy,
        )
    if mask.ndim == 4 and mask.shape[1] != 1:
        raise InputError(
            f"The noise mask has {mask.shape[1]} channels, not one.",
            "Convert it with Image to Mask.",
        )
    low, high = (float(value) for value in torch.aminmax(mask.float()))
    if not (math.isfinite(low) and math.isfinite(high)):
        raise InputError("The noise mask holds values that are not numbers.", remedy)
    if high <= 0:
        log.warning(
            "Ark sampler: the noise mask is empty, so the picture stays as it is. %s", remedy
        )


def check_conditioning(model: Any, positive: list, negative: list | None, cfg: float) -> None:
    """Refuse a prompt of another model's text encoder, references of another VAE, and cfg with nothing to go with it."""
    if negative is None and not math.isclose(cfg, 1.0):
        raise InputError(
            f"cfg is {cfg:g}, and there is no negative.",
            "Connect a negative conditioning, or set cfg to 1, for which the distilled Klein is made.",
        )
    wanted = model.model.diffusion_model.txt_in.weight.shape[1]
    for conditioning, options in [*positive, *(negative or [])]:
        if conditioning.shape[-1] != wanted:
            raise InputError(
                f"The conditioning has width {conditioning.shape[-1]}, this model reads {wanted}.",
                "Encode the prompt with the text encoder that belongs to the model.",
            )
        for reference in options.get(REFERENCES, ()):
            if reference.ndim != 4 or reference.shape[1] != LATENT_CHANNELS:
                raise InputError(
                    f"A reference latent has {reference.shape[1]} channels, Klein's has {LATENT_CHANNELS}.",
                    "Encode the reference image with the FLUX.2 VAE, or use ArkReferenceImages.",
                )


def check_sigmas(sigmas: torch.Tensor) -> None:
    """Refuse noise levels that are not Klein's: [steps + 1], from at most 1, which is pure noise."""
    remedy = "Take them from ArkScheduler or Flux2Scheduler."
    if sigmas.ndim != 1 or len(sigmas) < 2:
        raise InputError(
            f"The sigmas have the shape {list(sigmas.shape)}: they hold no step.", remedy
        )
    low, high = (float(value) for value in torch.aminmax(sigmas.float()))
    # written so that NaN is refused, too
    if not (low >= 0 and high <= HIGHEST_SIGMA):
        raise InputError(
            f"The sigmas go from {high:g} to {low:g}, those of Klein lie between 1 and 0.", remedy
        )
