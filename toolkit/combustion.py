"""Which attention kernel: a registry in which each says what it can do here, or why it cannot."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from .errors import KernelUnavailable
from .hardware import Hardware

HALF = (torch.bfloat16, torch.float16)
ALL_FLOATS = (torch.float32, *HALF)


@dataclass(frozen=True)
class AttentionKernel:
    """One way to compute attention without a mask.

    Attributes:
        name: what the user calls it.
        dtypes: of q, k and v that it takes.
        attend: q, k, v, each [B, num_heads, seq_len, head_dim] (tensor_layout "HND"), to the same shape.
        unavailable: the reason why it cannot run on some hardware, or None.
        lossy: whether it quantises.
    """

    name: str
    dtypes: tuple[torch.dtype, ...]
    attend: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
    unavailable: Callable[[Hardware], str | None]
    lossy: bool = False


def _torch_kernel(
    backend: SDPBackend,
) -> Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]:
    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v)

    return attend


def _sage(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    from sageattention import sageattn

    return sageattn(q, k, v, tensor_layout="HND", is_causal=False)


def _needs_nvidia(minimum: tuple[int, int]) -> Callable[[Hardware], str | None]:
    def unavailable(hardware: Hardware) -> str | None:
        if hardware.compute_capability == (0, 0):
            return f"needs an NVIDIA GPU, this is {hardware.name}"
        if hardware.compute_capability < minimum:
            return f"needs compute capability {minimum[0]}.{minimum[1]}, {hardware.name} has {_dotted(hardware)}"
        return None

    return unavailable


def _sage_unavailable(hardware: Hardware) -> str | None:
    if reason := _needs_nvidia((8, 0))(hardware):
        return reason
    version = hardware.package_version("sageattention")
    if version is None:
        return "the package sageattention is not installed"
    if hardware.package_version("triton") is None:
        return "the package triton is not installed"
    if hardware.compute_capability == (8, 6) and version.startswith("1."):
        return f"SageAttention {version} gives NaN on compute capability 8.6"
    return None


def _dotted(hardware: Hardware) -> str:
    return ".".join(map(str, hardware.compute_capability))


KERNELS: dict[str, AttentionKernel] = {
    kernel.name: kernel
    for kernel in (
        AttentionKernel("sage", HALF, _sage, _sage_unavailable, lossy=True),
        AttentionKernel(
            "cudnn", HALF, _torch_kernel(SDPBackend.CUDNN_ATTENTION), _needs_nvidia((8, 0))
        ),
        AttentionKernel(
            "flash", HALF, _torch_kernel(SDPBackend.FLASH_ATTENTION), _needs_nvidia((8, 0))
        ),
        AttentionKernel(
            "efficient",
            ALL_FLOATS,
            _torch_kernel(SDPBackend.EFFICIENT_ATTENTION),
            _needs_nvidia((5, 0)),
        ),
        AttentionKernel("math", ALL_FLOATS, _torch_kernel(SDPBackend.MATH), lambda hardware: None),
    )
}


def _loss(name: str) -> str:
    return " It quantises, which is slightly lossy." if KERNELS[name].lossy else ""


def unavailable_kernels(hardware: Hardware) -> dict[str, str]:
    """Every kernel that cannot run on this hardware, with the reason."""
    return {name: why for name, kernel in KERNELS.items() if (why := kernel.unavailable(hardware))}


def select_attention_kernel(choice: str, hardware: Hardware) -> tuple[AttentionKernel | None, str]:
    """Decide on a kernel.

    Args:
        choice: "auto" or a kernel's name.
        hardware: the device the model runs on.

    Returns:
        The kernel, None for the host's own, and one sentence that says why.

    Raises:
        KernelUnavailable: a kernel was named that cannot run here.
    """
    reasons = unavailable_kernels(hardware)
    if choice != "auto":
        if choice not in KERNELS:
            raise KernelUnavailable(
                {choice: f"there is no kernel of this name, only {', '.join(KERNELS)}"}
            )
        if choice in reasons:
            raise KernelUnavailable({choice: reasons[choice]})
        return KERNELS[choice], f"{choice}: chosen by name, on {hardware.name}.{_loss(choice)}"
    # Hopper and later: cuDNN measured 1.8x FlashAttention 2 and SageAttention 1 (H200); before: SageAttention's INT8
    order = (
        ("cudnn", "sage", "flash")
        if hardware.compute_capability >= (9, 0)
        else ("sage", "flash", "efficient")
    )
    listed = "; ".join(f"{name}: {why}" for name, why in reasons.items())
    for name in order:
        if name not in reasons:
            return (
                KERNELS[name],
                f"{name}: first choice of {', '.join(order)} that runs on {hardware.name}.{_loss(name)}",
            )
    return (
        None,
        f"host: ComfyUI's own attention stays, as none of Ark's kernels gains here ({listed}).",
    )
