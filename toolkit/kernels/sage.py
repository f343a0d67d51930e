"""SageAttention: INT8 (1 and 2) and FP4 (3) attention. All of it is slightly lossy.

Source: thu-ml/SageAttention, whose functions are called; 1.0.6 is what the Python registry has, 2 and 3 are built by the
user. Only 1.0.6 could be run by us.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..hardware import Hardware
from .kernel import HALF, Attend, AttentionKernel, needs


def _attend(function: str, **options: Any) -> Attend:
    """Call a function of the package by its name."""

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        import sageattention

        return getattr(sageattention, function)(q, k, v, tensor_layout="HND", is_causal=False, **options)  # fmt: skip

    return attend


def _attend_fp4(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    from sageattn3 import sageattn3_blackwell

    return sageattn3_blackwell(q, k, v, is_causal=False)


def _version(hardware: Hardware) -> str:
    return hardware.package_version("sageattention") or ""


def _dispatch(hardware: Hardware) -> str | None:
    """The first version's only kernel is the Triton one, which gives NaN on these cards."""
    if hardware.compute_capability == (8, 6) and _version(hardware).startswith("1."):
        return f"SageAttention {_version(hardware)} gives NaN on compute capability 8.6"
    return None


def _triton(hardware: Hardware) -> str | None:
    return _dispatch(hardware) or (
        f"SageAttention's Triton kernel gives NaN on {hardware.name}"
        if hardware.compute_capability == (8, 6)
        else _second(hardware)
    )


def _second(hardware: Hardware) -> str | None:
    if not _version(hardware).startswith("2."):
        return f"needs SageAttention 2, {_version(hardware)} is installed"
    return None


def _sage(name: str, function: str, minimum: tuple[int, int], below: tuple[int, int] | None = None,
          version: Callable[[Hardware], str | None] = _second, **options: Any) -> AttentionKernel:  # fmt: skip
    unavailable = needs(minimum, below, "sageattention", "triton", version=version)
    return AttentionKernel(name, HALF, _attend(function, **options), unavailable, lossy=True, package="sageattention")  # fmt: skip


KERNELS = (
    _sage("sage", "sageattn", (8, 0), version=_dispatch),  # the package's own choice for the card
    _sage("sage_triton", "sageattn_qk_int8_pv_fp16_triton", (8, 0), version=_triton),
    _sage("sage_fp16", "sageattn_qk_int8_pv_fp16_cuda", (8, 0), pv_accum_dtype="fp32"),
    _sage("sage_fp8", "sageattn_qk_int8_pv_fp8_cuda", (8, 9), pv_accum_dtype="fp32+fp32"),
    _sage("sage_fp8_hopper", "sageattn_qk_int8_pv_fp8_cuda_sm90", (9, 0), (10, 0), pv_accum_dtype="fp32+fp32"),
    AttentionKernel(
        "sage_fp4", HALF, _attend_fp4, needs((10, 0), None, "sageattn3"), lossy=True, package="sageattn3"
    ),
)  # fmt: skip
