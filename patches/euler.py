"""Euler steps of one conditioning of the whole picture: the host's numbers, bit for bit, without what it does for other kinds.

At each step the host makes masks of areas, asks the driver how much memory is free, and before the first it waits for the
device: over a millisecond in which that has nothing to do. Whatever else is wanted, by the user or another pack, goes the
host's own way.

Source: `sample_euler`, `KSAMPLER.sample` and `_calc_cond_batch` of comfyanonymous/ComfyUI.
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable
from typing import Any

import comfy.k_diffusion.sampling
import comfy.model_sampling
import comfy.patcher_extension
import comfy.samplers
import torch

from .first_step import OPTIONS
from .stay import KNOWN

BETWEEN = "predict_noise", "calc_cond_batch"  # of the host's WrappersMP: what is left out
CONTEXTS = torch.no_grad().__call__.__globals__["__name__"]  # where torch's decorators are
EACH_STEP = "on_prepare_state"  # of its CallbacksMP
# what is left out, too, unless another pack has put its own there
LEFT_OUT = {
    comfy.samplers: (
        "calc_cond_batch", "_calc_cond_batch_outer", "_calc_cond_batch", "sampling_function", "cfg_function", "get_area_and_mult", "KSAMPLER.sample", "CFGGuider.__call__",
        "CFGGuider.predict_noise", "KSamplerX0Inpaint.__call__",
    ),
    comfy.k_diffusion.sampling: ("sample_euler", "to_d"),
}  # fmt: skip
log = logging.getLogger("ark")


def run_steps(
    hosts: Callable[..., torch.Tensor],
    guider: Any,
    sigmas: torch.Tensor,
    extra_args: dict,
    callback: Callable[..., None],
    noise: torch.Tensor,
    latent_image: torch.Tensor,
    denoise_mask: torch.Tensor | None = None,
    disable_pbar: bool = False,
) -> torch.Tensor:
    """As the host's `KSAMPLER.sample` with `sample_euler`.

    Args:
        hosts: that method, for what is not known here.
        guider: the host's, while it samples.
        sigmas: [steps + 1] noise levels on the device.
        extra_args: has the model's options.
        callback: is given the number of a step, its denoised and noisy latents, and how many steps there are.
        noise: [B, C, H, W] on the device.
        latent_image: likewise.
        denoise_mask: of inpainting.
        disable_pbar: show nothing on the console.

    Returns:
        The samples, [B, C, H, W].
    """
    options = extra_args["model_options"]
    reason = "a mask" if denoise_mask is not None else _unusual(guider, options)
    if sigmas.dtype != noise.dtype:  # in which the host would go on
        reason = f"sigmas in {sigmas.dtype}"
    if reason is not None:
        log.debug("Ark sampler: ComfyUI's own steps run (%s).", reason)
        return hosts(guider, sigmas, extra_args, callback, noise, latent_image, denoise_mask, disable_pbar)  # fmt: skip
    base, (cond,), steps = guider.inner_model, guider.conds["positive"], len(sigmas) - 1
    x = base.model_sampling.noise_scaling(sigmas[0], noise, latent_image)
    given = {name: each.process_cond(batch_size=len(x), area=None) for name, each in cond["model_conds"].items()}  # fmt: skip
    given, each_picture = comfy.samplers.cond_cat([given]), x.new_ones([len(x)])
    console: Any = None
    for step in range(steps):
        level = sigmas[step] * each_picture
        denoised = base.apply_model(x, level, **given, transformer_options=_to_model(base, options, cond, level))  # fmt: skip
        if console is None:  # not before the first step has been asked for
            console = iter(comfy.k_diffusion.sampling.trange(steps, disable=disable_pbar))
            next(console)
        slope = (x - denoised) / sigmas[step]
        callback(step, denoised, x, steps)
        x = x + slope * (sigmas[step + 1] - sigmas[step])
        next(console, None)
    return base.model_sampling.inverse_noise_scaling(sigmas[-1], x)


def _to_model(base: Any, options: dict, cond: dict, level: torch.Tensor) -> dict:
    """What the host's model is told beside the conditioning."""
    found = base.current_patcher.apply_hooks(hooks=None)
    found = comfy.patcher_extension.merge_nested_dicts(found, options["transformer_options"], copy_dict1=False)  # fmt: skip
    return {**found, "cond_or_uncond": [0], "uuids": [cond["uuid"]], "sigmas": level}


def _unusual(guider: Any, options: dict) -> str | None:
    """Why the host might do something else, None if it would not."""
    positive, base = guider.conds["positive"], guider.inner_model
    wrappers = options.get("transformer_options", {}).get("wrappers", {})
    if type(guider) is not comfy.samplers.CFGGuider:
        return f"guider {type(guider).__name__}"
    if others := options.keys() - OPTIONS:
        return f"model options of other nodes: {', '.join(sorted(others))}"
    if len(positive) != 1:
        return f"{len(positive)} conditionings"
    if others := positive[0].keys() - KNOWN:
        return f"a conditioning with {', '.join(sorted(others))}"
    if guider.conds.get("negative") is not None and not math.isclose(guider.cfg, 1.0):
        return "cfg"
    if type(base.model_sampling).noise_scaling is not comfy.model_sampling.CONST.noise_scaling:
        return f"model sampling {type(base.model_sampling).__name__}"
    if found := [kind for kind in BETWEEN if wrappers.get(kind)]:
        return f"wrappers of other nodes: {', '.join(found)}"
    if base.current_patcher.get_all_callbacks(EACH_STEP):
        return "callbacks of other nodes"
    replaced = [name for module, names in LEFT_OUT.items() for name in names if not is_hosts(module, name)]  # fmt: skip
    return f"another pack's {', '.join(replaced)}" if replaced else None


def is_hosts(module: Any, name: str) -> bool:
    """Whether a function of a host's module is still its own: nobody has put another there, or around it."""
    found = functools.reduce(
        lambda owner, part: getattr(owner, part, None), name.split("."), module
    )
    if _home(found) == CONTEXTS:  # torch.no_grad, which the host has put around
        found = getattr(found, "__wrapped__", None)
    return _home(found) == module.__name__


def _home(function: Any) -> str | None:
    """The module that it was written in; `__module__` is what `functools.wraps` makes of it."""
    return getattr(function, "__globals__", {}).get("__name__")


def shortened(sampler: Any) -> Any:
    """The host's Euler sampler, which takes the short way where it can."""
    sampler.sample = functools.partial(run_steps, sampler.sample)  # on this object
    return sampler
