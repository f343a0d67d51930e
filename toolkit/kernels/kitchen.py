"""comfy-kitchen's INT8 attention, which newer ComfyUIs install. Slightly lossy."""

from __future__ import annotations

import torch

from ..hardware import Hardware
from .kernel import HALF, AttentionKernel, needs

SINCE = (0, 2, 31)  # the first version that was seen to have it


def _attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    from comfy_kitchen.sage_attention import int8_attention

    return int8_attention(q, k, v)


def _version(hardware: Hardware) -> str | None:
    version = hardware.package_version("comfy_kitchen") or ""
    numbers = tuple(int(part) for part in version.split(".")[:3] if part.isdigit())
    return None if numbers >= SINCE else f"comfy-kitchen {version} has no INT8 attention"


KERNELS = (
    AttentionKernel(
        "kitchen_int8", HALF, _attend, needs((7, 5), None, "comfy_kitchen", version=_version), lossy=True,
        package="comfy_kitchen",
    ),
)  # fmt: skip
