"""A result that is not finite is never handed on while another kernel can do better.

Low-precision kernels can overflow; the picture is black then. NaN and Inf survive every later step, so one look at the
end of a run sees them all, with one synchronisation a run.
"""

from __future__ import annotations

import logging
from typing import Any

import torch

OVERRIDE = "optimized_attention_override"
SAMPLER_SAMPLE = "sampler_sample"  # the host's WrappersMP.SAMPLER_SAMPLE
KEY = "ark_guard"
PLAIN = "ark_plain"  # in a run's options: everything on the host's own code
log = logging.getLogger("ark")


def add_guard(model: Any, kernel: str) -> None:
    """Repeat a run of a MODEL's clone on the host's own code if its result is not finite; later runs go there at once.

    Args:
        model: the host's ModelPatcher, with an attention override or the fused engine; a guard that it has goes.
        kernel: what they are called, for the message.
    """
    remove_guard(model)

    def guarded(executor, guider, sigmas, extra_args, *args, **kwargs):
        if guarded.failed:
            return executor(guider, sigmas, _on_the_host(extra_args), *args, **kwargs)
        samples = executor(guider, sigmas, extra_args, *args, **kwargs)
        if is_finite(samples):
            return samples
        again = executor(guider, sigmas, _on_the_host(extra_args), *args, **kwargs)
        if is_finite(again):
            guarded.failed = True
            log.warning(
                "Ark: %s gave numbers that are not finite. The run was repeated on ComfyUI's own code, which is used from "
                "now on. Choose something else in ArkSageCombustion.",
                kernel,
            )
        else:
            log.warning(
                "Ark: the model gives numbers that are not finite, on ComfyUI's own code, too. "
                "Look at its file, its LoRAs and its precision."
            )
        return again

    wrapper: Any = guarded
    wrapper.failed = False  # for who reports, too
    model.add_wrapper_with_key(SAMPLER_SAMPLE, KEY, wrapper)


def is_finite(samples: torch.Tensor) -> bool:
    """Whether there is neither NaN nor Inf in it; waits for the device."""
    return bool(torch.isfinite(samples).all())


def remove_guard(model: Any) -> None:
    """Undo `add_guard`."""
    model.remove_wrappers_with_key(SAMPLER_SAMPLE, KEY)


def _on_the_host(extra_args: dict) -> dict:
    options = extra_args["model_options"]
    transformer = {k: v for k, v in options["transformer_options"].items() if k != OVERRIDE}
    transformer[PLAIN] = True
    return {**extra_args, "model_options": {**options, "transformer_options": transformer}}
