"""Attention of a ComfyUI model: an override in the options of a clone, nothing else."""

from __future__ import annotations

import logging
from typing import Any

import torch

from ..toolkit.architecture import HEAD_DIM
from ..toolkit.combustion import AttentionKernel, select_attention_kernel
from ..toolkit.hardware import probe_hardware

OVERRIDE = "optimized_attention_override"
log = logging.getLogger("ark")


def set_attention(model: Any, choice: str) -> tuple[Any, str]:
    """Give a clone of a MODEL its attention kernel.

    Args:
        model: the host's ModelPatcher; it is not changed.
        choice: "auto", a kernel's name, or "none" for the host's own attention, cancelling an override set before.

    Returns:
        The clone, and one sentence that says which kernel it has and why.

    Raises:
        KernelUnavailable: a kernel was named that cannot run here.
    """
    clone = model.clone()
    options = dict(clone.model_options.get("transformer_options", {}))
    options.pop(OVERRIDE, None)
    if choice == "none":
        kernel, report = None, "host: ComfyUI's own attention, as asked."
    else:
        kernel, report = select_attention_kernel(choice, probe_hardware(model.load_device))
    if kernel is not None:
        options[OVERRIDE] = attention_override(kernel)
    clone.model_options["transformer_options"] = options
    log.info("Ark attention %s", report)
    return clone, report


def attention_override(kernel: AttentionKernel):
    """Make the host's override function for a kernel.

    What the kernel was never built for (a mask, another layout, another head_dim or dtype) goes to the host's function.
    """

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
            and q.shape[-1] == HEAD_DIM
            and q.shape[1] == k.shape[1] == heads
            and q.dtype in kernel.dtypes
        )
        if not fits:
            return func(q, k, v, heads, mask, *args, **kwargs)
        out = kernel.attend(q, k, v)
        if kwargs.get("skip_output_reshape", False):
            return out
        return out.transpose(1, 2).reshape(
            out.shape[0], out.shape[2], -1
        )  # [B, seq_len, heads * head_dim]

    return override
