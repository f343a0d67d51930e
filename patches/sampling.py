"""Klein's few Euler steps through the host's own sampler."""

from __future__ import annotations

from typing import Any

import comfy.model_base
import comfy.model_management
import comfy.sample
import comfy.samplers
import comfy.utils
import latent_preview

from ..toolkit.architecture import LATENT_CHANNELS, SPATIAL_FACTOR
from ..toolkit.errors import InputError
from ..toolkit.schedule import klein_sigmas


def sample_klein(
    model: Any, positive: list, latent: dict, seed: int, steps: int, denoise: float
) -> dict:
    """Sample with Klein's own noise levels, Euler, no negative.

    Args:
        model: the host's ModelPatcher of a FLUX.2 model.
        positive: the host's CONDITIONING.
        latent: the host's LATENT, "samples" [B, 128, H/16, W/16].
        seed: of the noise; the same noise as the host's own samplers make of it.
        steps: Euler steps.
        denoise: share of the schedule, above 0 to 1.

    Returns:
        A LATENT with the new samples, all else of the input kept.

    Raises:
        InputError: the model, the conditioning or the latent does not fit, or a number is out of range.
    """
    samples = latent["samples"]
    _check(model, positive, samples)
    sigmas = klein_sigmas(steps, samples.shape[-2] * samples.shape[-1], denoise)
    waits = not comfy.model_management.device_supports_non_blocking(model.load_device)
    # once, as the host would copy it at each step
    positive = [[tensor.to(model.load_device, non_blocking=not waits), options] for tensor, options in positive]  # fmt: skip
    noise = comfy.sample.prepare_noise(samples, seed, latent.get("batch_index"))
    guider = comfy.samplers.CFGGuider(model)
    guider.inner_set_conds({"positive": positive})
    guider.set_cfg(1.0)
    result = guider.sample(
        noise,
        samples,
        comfy.samplers.sampler_object("euler"),
        sigmas,
        denoise_mask=latent.get("noise_mask"),
        callback=latent_preview.prepare_callback(model, steps),
        disable_pbar=not comfy.utils.PROGRESS_BAR_ENABLED,
        seed=seed,
    )
    return {**latent, "samples": result.to(comfy.model_management.intermediate_device())}


def _check(model: Any, positive: list, samples: Any) -> None:
    if not isinstance(model.model, comfy.model_base.Flux2):
        raise InputError(
            f"The model is {type(model.model).__name__}, not FLUX.2.",
            "Connect a FLUX.2-Klein, as ArkFastLoader makes it.",
        )
    if samples.ndim != 4 or samples.shape[1] != LATENT_CHANNELS:
        raise InputError(
            f"The latent has {samples.shape[1]} channels, Klein's has {LATENT_CHANNELS} at 1/{SPATIAL_FACTOR} size.",
            "Use EmptyFlux2LatentImage, or encode the picture with the FLUX.2 VAE.",
        )
    wanted = model.model.diffusion_model.txt_in.weight.shape[1]
    for conditioning, _ in positive:
        if conditioning.shape[-1] != wanted:
            raise InputError(
                f"The conditioning has width {conditioning.shape[-1]}, this model reads {wanted}.",
                "Encode the prompt with the text encoder that belongs to the model.",
            )
