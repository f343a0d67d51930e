"""What an attention kernel says of itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from ..fused.matrix import Scaled
from ..hardware import Hardware

HALF = (torch.bfloat16, torch.float16)
ALL_FLOATS = (torch.float32, *HALF)
Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
AttendFp8 = Callable[[Scaled, Scaled, Scaled], Scaled]


@dataclass(frozen=True)
class AttentionKernel:
    """One way to compute attention without a mask.

    Attributes:
        name: what the user calls it.
        dtypes: of q, k and v that it takes.
        attend: q, k, v, each [B, num_heads, seq_len, head_dim] (tensor_layout "HND"), to the same shape.
        unavailable: the reason why it cannot run on some hardware, or None.
        lossy: whether it quantises.
        head_dims: that it takes.
        package: that it comes from; None for torch.
        attend_fp8: as `attend`, of q, k and v that are in fp8, the result, too; None if it has no such way.
        any_length: whether it is known to take a q of fewer tokens than k and v.
        slow_start: whether each process waits seconds for it: then it is taken by name only.
    """

    name: str
    dtypes: tuple[torch.dtype, ...]
    attend: Attend
    unavailable: Callable[[Hardware], str | None]
    lossy: bool = False
    head_dims: tuple[int, ...] = (64, 128)
    package: str | None = None
    attend_fp8: AttendFp8 | None = None
    any_length: bool = False
    slow_start: bool = False


def needs(
    minimum: tuple[int, int],
    below: tuple[int, int] | None = None,
    *packages: str,
    version: Callable[[Hardware], str | None] = lambda hardware: None,
) -> Callable[[Hardware], str | None]:
    """Make a kernel's `unavailable`.

    Args:
        minimum: compute capability.
        below: compute capability that is too new; None for none.
        packages: that must be installed.
        version: a further condition on them: the reason why it does not hold, or None.
    """

    def unavailable(hardware: Hardware) -> str | None:
        found = hardware.compute_capability
        if found == (0, 0):
            return f"needs an NVIDIA GPU, this is {hardware.name}"
        if found < minimum or (below and found >= below):
            span = f"{_dotted(minimum)} or higher" if below is None else f"{_dotted(minimum)} up to below {_dotted(below)}"  # fmt: skip
            return f"needs compute capability {span}, {hardware.name} has {_dotted(found)}"
        for package in packages:
            if hardware.package_version(package) is None:
                return f"the package {package} is not installed"
        return version(hardware)

    return unavailable


def _dotted(capability: tuple[int, int]) -> str:
    return ".".join(map(str, capability))
