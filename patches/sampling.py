"""Klein's few Euler steps through the host's own sampler."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import comfy.model_management
import comfy.samplers
import comfy.utils
import latent_preview
import torch

from ..toolkit.architecture import SPATIAL_FACTOR
from ..toolkit.clock import Pace
from ..toolkit.schedule import klein_sigmas
from . import fast_vae
from .deliver import Delivery, upload
from .euler import shortened
from .fused import engine_on
from .guard import doubted
from .noise import noise_for
from .references import REFERENCES
from .sampling_inputs import check_conditioning, check_latent, check_mask, check_model, check_sigmas
from .stay import ready_again, stay


def sample_klein(
    model: Any,
    positive: list,
    latent: dict,
    seed: int,
    steps: int,
    denoise: float,
    *,
    negative: list | None = None,
    cfg: float = 1.0,
    sigmas: torch.Tensor | None = None,
    watch: Callable[..., None] = lambda *step: None,
    preview: bool = True,
) -> dict:
    """Sample with Klein's own noise levels and Euler.

    Args:
        model: the host's ModelPatcher of a FLUX.2 model.
        positive: the host's CONDITIONING.
        latent: the host's LATENT, "samples" [B, 128, H/16, W/16], perhaps with "noise_mask" and "batch_index".
        seed: of the noise; the same noise as the host's own samplers make of it.
        steps: Euler steps.
        denoise: share of the schedule, above 0 to 1.
        negative: CONDITIONING of what to stay away from; only the undistilled base model has a use for it.
        cfg: how far away; at 1 the negative is not run.
        sigmas: [steps + 1] noise levels instead of Klein's own; `steps` and `denoise` are then not looked at.
        watch: called after each step with what the host's callback is given.
        preview: show how far it is, with a picture as the user has set it; else without one, for what nobody will see.

    Returns:
        A LATENT with the new samples, all else of the input kept.

    Raises:
        InputError: the model, a conditioning, the latent, its mask or the sigmas do not fit, or a number is out of range.
    """
    samples = latent["samples"]
    check_model(model)
    check_latent(samples)
    check_mask(latent.get("noise_mask"))
    check_conditioning(model, positive, negative, cfg)
    if sigmas is None:
        sigmas = klein_sigmas(steps, samples.shape[-2] * samples.shape[-1], denoise)
    else:
        check_sigmas(sigmas)
    device = torch.device(model.load_device)

    def run(doubts: list[Callable[[], bool]] | None = None) -> torch.Tensor:
        noise = noise_for(model, samples, seed, latent.get("batch_index"))
        guider, sampler = _guider(model, positive, negative, cfg), comfy.samplers.sampler_object("euler")  # fmt: skip
        show, pace = _show(model, len(sigmas) - 1, preview), Pace(device)
        first: contextlib.AbstractContextManager = contextlib.nullcontext()
        if ready_again(model, noise.tensor.shape, guider):
            stay(guider)
            sampler = shortened(sampler)
            if doubts is not None and negative is None and noise.own:
                first = _begun(model, latent, seed, noise.tensor, float(sigmas[0]), positive, doubts)  # fmt: skip

        def after_step(*step: Any) -> None:
            watch(*step)
            pace.step()
            show(*step)

        try:
            with first:
                noise.settle()
                return guider.sample(
                    noise.tensor,
                    upload(samples, device),
                    sampler,
                    sigmas,
                    denoise_mask=latent.get("noise_mask"),
                    callback=after_step,
                    disable_pbar=not comfy.utils.PROGRESS_BAR_ENABLED,
                    seed=seed,
                )
        except torch.cuda.OutOfMemoryError as error:
            # of the same type, as the host then frees what it holds
            raise torch.cuda.OutOfMemoryError(_too_large(samples, positive)) from error

    with doubted() as doubts:
        made = _hand_over(run(doubts), wanted=preview)
    if not all([doubt() for doubt in doubts]):  # each of them draws its conclusion
        made = _hand_over(run(), wanted=preview)
    return {**latent, "samples": made}


def _begun(
    model: Any, latent: dict, seed: int, noise: torch.Tensor, level: float, positive: list, doubts: list[Callable[[], bool]]
) -> contextlib.AbstractContextManager:  # fmt: skip
    """A run whose first step begins here, if it starts with nothing but noise at some level; see `FirstStep.run`."""
    engine = engine_on(model)
    if engine is None or "noise_mask" in latent or (level != 1 and latent["samples"].any()):
        return contextlib.nullcontext()
    return engine.first.run(model, seed, noise, level, positive, doubts)


def _hand_over(result: torch.Tensor, wanted: bool) -> torch.Tensor:
    """Latents where the host wants them; their picture is begun, if that is likely to be wanted next.

    The device is still at the last step: whoever waits for it before has it wait for them after that.
    """
    coming = Delivery(result, comfy.model_management.intermediate_device())
    if not wanted:
        return coming.arrived()
    fast_vae.latents.begin(tuple(result.shape), result)
    return fast_vae.latents.made(coming.arrived(wanted_there=True))


def _show(model: Any, steps: int, preview: bool) -> Callable[..., None]:
    """What tells the canvas how far it is."""
    if preview:
        return latent_preview.prepare_callback(model, steps)
    bar = comfy.utils.ProgressBar(steps)
    return lambda step, denoised, latents, total: bar.update_absolute(step + 1, total)


def _guider(model: Any, positive: list, negative: list | None, cfg: float) -> Any:
    """The host's guider, with the conditionings on the device: once, as the host would copy them at each step."""
    conditionings = {"positive": positive}
    # without it the host runs no second pass, as at cfg 1
    if negative is not None:
        conditionings["negative"] = negative
    guider = comfy.samplers.CFGGuider(model)
    device = model.load_device
    guider.inner_set_conds({
        name: [[upload(tensor, device), _with_moved_references(options, device)] for tensor, options in given]
        for name, given in conditionings.items()
    })  # fmt: skip
    guider.set_cfg(cfg)
    return guider


def _with_moved_references(options: dict, device: torch.device) -> dict:
    if REFERENCES not in options:
        return options
    return {**options, REFERENCES: [upload(latents, device) for latents in options[REFERENCES]]}


def _too_large(samples: torch.Tensor, positive: list) -> str:
    batch, _, down, across = samples.shape
    references = max((len(options.get(REFERENCES, ())) for _, options in positive), default=0)
    beside = f" with {references} reference image(s)" if references else ""
    return (
        f"{batch} picture(s) of {across * SPATIAL_FACTOR}x{down * SPATIAL_FACTOR}{beside} need more memory than this "
        "device has free. Make the picture or the references smaller or fewer, lower the batch size, or start ComfyUI "
        "with --lowvram."
    )
