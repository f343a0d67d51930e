"""Attention of a ComfyUI model: an override in the options of a clone, nothing else."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

import torch

from ..toolkit.architecture import HEAD_DIM, USUAL_HEADS, USUAL_TOKENS
from ..toolkit.combustion import select_attention_kernel
from ..toolkit.hardware import probe_hardware
from ..toolkit.kernels import KERNELS
from ..toolkit.kernels.op import attend_flat
from .guard import OVERRIDE, add_guard, remove_guard

log = logging.getLogger("ark")


def set_attention(model: Any, choice: str) -> tuple[Any, str]:
    """Give a clone of a MODEL its attention kernel, guarded against results that are not finite.

    Args:
        model: the host's ModelPatcher; it is not changed.
        choice: "auto", a kernel's name, or "none" for the host's own attention, cancelling an override set before.

    Returns:
        The clone, and a sentence that says which kernel it has and why; of "auto" with the table.

    Raises:
        KernelUnavailable: a kernel was named that cannot run here.
    """
    clone = model.clone()
    options = dict(clone.model_options.get("transformer_options", {}))
    options.pop(OVERRIDE, None)
    remove_guard(clone)
    if choice == "none":
        kernel, report = None, "host: ComfyUI's own attention, as asked."
    else:
        hardware = probe_hardware(model.load_device)
        kernel, report = select_attention_kernel(
            choice, hardware, model.load_device, *usual_attention(model.model)
        )
    if kernel is not None:
        options[OVERRIDE] = attention_override(kernel.name)
        add_guard(clone, kernel.name)
    clone.model_options["transformer_options"] = options
    log.info("Ark attention %s", report)
    return clone, report


def usual_attention(model: Any) -> tuple[tuple[int, int, int, int], torch.dtype]:
    """Shape and dtype of q, k and v at 1024x1024 with a full prompt, of the host's BaseModel."""
    heads = getattr(model.diffusion_model, "num_heads", USUAL_HEADS)
    dtype = model.manual_cast_dtype or model.get_dtype()
    return (1, heads, USUAL_TOKENS, HEAD_DIM), dtype


@functools.lru_cache
def attention_override(name: str) -> Callable:
    """Make the host's override function for a kernel: the same one each time, as compiled code holds on to it.

    What the kernel was never built for (a mask, another layout, another head_dim or dtype) goes to the host's function.
    """
    kernel = KERNELS[name]

    def override(
        func,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        heads: int,
        mask=None,
        *args,
        **kwargs,
    ):
        # q, k, v: [B, heads, seq_len, head_dim] when skip_reshape, as in every block of Klein
        fits = (
            mask is None
            and kwargs.get("skip_reshape", False)
            and any(q.shape[-1] == size for size in kernel.head_dims)  # `in` fails when compiled
            and q.shape[1] == k.shape[1] == heads
            and q.dtype in kernel.dtypes
        )
        if not fits:
            return func(q, k, v, heads, mask, *args, **kwargs)
        out = attend_flat(name, q, k, v)  # [B, seq_len, heads * head_dim]
        if kwargs.get("skip_output_reshape", False):
            return out.unflatten(2, (heads, -1)).transpose(1, 2)
        return out

    named: Any = override
    named.kernel = name
    return named
