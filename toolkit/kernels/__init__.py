"""Attention kernels: each says what it takes and where it runs, or why it does not."""

from __future__ import annotations

from . import cudnn_fp8, flash, kitchen, sage, sdpa
from .kernel import AttentionKernel

__all__ = ["KERNELS", "AttentionKernel"]

KERNELS: dict[str, AttentionKernel] = {
    kernel.name: kernel
    for kernel in (
        *sage.KERNELS,
        *kitchen.KERNELS,
        *flash.KERNELS,
        *cudnn_fp8.KERNELS,
        *sdpa.KERNELS,
    )
}
