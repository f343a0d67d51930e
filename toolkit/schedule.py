"""Klein's noise levels.

Source: the schedule of black-forest-labs/flux2 (`sampling.py`): a linear ramp, bent by a shift that is an empirical
function of the number of image tokens and of steps.
"""

from __future__ import annotations

import math

import torch

from .errors import InputError

MAX_STEPS = 50


def empirical_mu(image_seq_len: int, steps: int) -> float:
    """The shift's logarithm: linear in tokens at 10 and at 200 steps, and linear between the two.

    Args:
        image_seq_len: image tokens, W * H / 256 for a picture in px.
        steps: number of Euler steps.
    """
    at_10_steps = 8.73809524e-05 * image_seq_len + 1.89833333
    at_200_steps = 0.00016927 * image_seq_len + 0.45666666
    if image_seq_len > 4300:
        return at_200_steps
    slope = (at_200_steps - at_10_steps) / 190.0
    return slope * steps + (at_200_steps - 200.0 * slope)


def klein_sigmas(steps: int, image_seq_len: int, denoise: float = 1.0) -> torch.Tensor:
    """Noise levels for `steps` Euler steps.

    Args:
        steps: how many steps run, 1 to 50, whatever `denoise` is.
        image_seq_len: image tokens, W * H / 256 for a picture in px.
        denoise: share of the schedule, above 0 to 1: below 1 the tail of a schedule of `steps / denoise` steps.

    Returns:
        [steps + 1] float32, descending, ending in 0.

    Raises:
        InputError: steps or denoise out of range.
    """
    if not 1 <= steps <= MAX_STEPS:
        raise InputError(
            f"steps is {steps}.", f"Choose 1 to {MAX_STEPS}; the distilled Klein is made for 4."
        )
    if not 0.0 < denoise <= 1.0:
        raise InputError(
            f"denoise is {denoise:g}.",
            "Choose a value above 0 and at most 1; 1 starts from pure noise.",
        )
    total = int(steps / denoise)
    ramp = torch.linspace(1, 0, total + 1)
    shift = math.exp(empirical_mu(image_seq_len, total))
    return (shift / (shift + (1 / ramp - 1)))[-(steps + 1) :]
