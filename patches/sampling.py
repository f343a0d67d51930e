"""Klein's few Euler steps through the host's own sampler."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import comfy.model_management
import comfy.sample
import comfy.samplers
import comfy.utils
import latent_preview
import torch

from ..toolkit.architecture import SPATIAL_FACTOR
from ..toolkit.clock import Pace
from ..toolkit.late import Coming, Late
from ..toolkit.schedule import klein_sigmas
from . import fast_vae
from .deliver import deliver, pinned, upload
from .euler import is_hosts, shortened
from .guard import KEY, SAMPLER_SAMPLE
from .references import REFERENCES
from .sampling_inputs import check_conditioning, check_latent, check_mask, check_model, check_sigmas
from .stay import ready_again, stay

SEEING_NOISE = "outer_sample", SAMPLER_SAMPLE  # of the host's WrappersMP
_late = Late("ark-noise")


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
    noise = _Noise(model, samples, seed, latent.get("batch_index"))
    guider = _guider(model, positive, negative, cfg)
    sampler = _sampler(model, guider, noise)
    show, pace = _show(model, len(sigmas) - 1, preview), Pace(device)

    def after_step(*step: Any) -> None:
        watch(*step)
        pace.step()
        show(*step)

    try:
        result = guider.sample(
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
    return {**latent, "samples": _hand_over(result, wanted=preview)}


def _sampler(model: Any, guider: Any, noise: _Noise) -> Any:
    """The host's Euler, as short as it can be for this run, which has the noise in place when it starts."""
    sampler = comfy.samplers.sampler_object("euler")
    if ready := ready_again(model, noise.tensor.shape, guider):
        stay(guider)
        sampler = shortened(sampler)
    sampler.sample = functools.partial(noise.arrive_for, sampler.sample, ready)  # on this object
    return sampler


def _hand_over(result: torch.Tensor, wanted: bool) -> torch.Tensor:
    """Latents where the host wants them; their picture is begun meanwhile, if that is likely to be wanted next."""
    device = comfy.model_management.intermediate_device()
    if not wanted:
        return deliver(result, device)
    begin = functools.partial(fast_vae.latents.begin, tuple(result.shape), result)
    return fast_vae.latents.made(deliver(result, device, wanted_there=True, meanwhile=begin))


class _Noise:
    """The host's noise.

    To draw it takes as long as all that the host does before the first step: another thread does that meanwhile, unless
    somebody else has a hand in it, or a wrapper there, which may look at it.

    Attributes:
        tensor: [B, C, H, W] on the device; its numbers are there when the sampler starts.
    """

    _coming: tuple[torch.Tensor, Coming] | None  # where it is drawn

    def __init__(self, model: Any, samples: torch.Tensor, seed: int, indices: Any):
        device = torch.device(model.load_device)
        options = model.model_options.get("transformer_options", {})
        wrappers = model.wrappers, options.get("wrappers", {})  # either way
        seen = any(found.get(kind, {}).keys() - {KEY} for found in wrappers for kind in SEEING_NOISE)  # fmt: skip
        # nobody has replaced it
        own = is_hosts(comfy.sample, "prepare_noise")
        usual = indices is None and samples.dtype is torch.float32 and own and not seen
        source = None
        if usual:
            # in order, as it is drawn, however the latents lie
            source = pinned(samples) if device.type == "cuda" else torch.empty(samples.shape)
        if source is None:
            self._coming = None
            self.tensor = upload(comfy.sample.prepare_noise(samples, seed, indices), device)
            return
        self._coming = source, _late.begin(functools.partial(_draw, source, seed))
        self.tensor = torch.empty_like(samples, device=device)

    def arrive_for(
        self, sample: Callable, replayed: bool, guider: Any, sigmas: torch.Tensor, extra_args: dict, callback: Any, noise: torch.Tensor, *others: Any, **named: Any,
    ) -> torch.Tensor:  # fmt: skip
        """Call the host's sampler, which gets the noise, or a copy of it.

        Only a run that replays recordings asks for little enough that the device's queue holds all of it: the drawing thread
        must never wait for one that waits for room there.
        """
        if self._coming is None:
            return sample(guider, sigmas, extra_args, callback, noise, *others, **named)
        source, drawing = self._coming
        if replayed:
            drawing.precede(noise.device)
        else:
            drawing.result()
        noise.copy_(source, non_blocking=True)
        result = sample(guider, sigmas, extra_args, callback, noise, *others, **named)
        drawing.result()  # raises what went wrong there
        return result


def _draw(there: torch.Tensor, seed: int) -> None:
    """The host's noise without the host: to set the seeds of all devices takes it a good part of the time."""
    generator = torch.Generator().manual_seed(seed)
    with torch.inference_mode():  # as it may have been made in
        torch.randn(there.shape, generator=generator, dtype=torch.float32, out=there)
    _late.begin(functools.partial(_seed, seed, generator))


def _seed(seed: int, generator: torch.Generator) -> None:
    """Leave torch's own generators as the host does."""
    torch.manual_seed(seed)
    torch.set_rng_state(generator.get_state())


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
