"""Layers of any host's autoencoder as records of `pixels.py`: by reference, but for what a GPU reads in another order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from .fused.reference_pixels import EPS, GROUPS
from .fused.runner import Unknown, operations_for
from .hardware import probe_hardware
from .pixel_layers import Conv, Matrix, Norm, fold

BF16 = (8, 0)  # the first compute capability that calculates in it


def conv(layer: Any, double: bool = False) -> Conv:
    """A convolution of 3x3, its weight copied into the order that a GPU reads; `double` if the picture is doubled before.

    Raises:
        Unknown: it is of another kind; so of all functions here.
    """
    weight = _weight(layer)
    if weight.shape[2:] != (3, 3):
        raise Unknown("its convolutions are of another kind")
    folded = _ordered(fold(weight)) if double else None
    return Conv(_ordered(weight), layer.bias.detach().float(), folded)


def matrix(*layers: Any) -> Matrix:
    """Convolutions of single pixels, or linear layers, of the same input, as one."""
    weights = [_weight(layer).flatten(1) for layer in layers]
    biases = [layer.bias.detach().float() for layer in layers]
    return Matrix(*(one[0] if len(one) == 1 else torch.cat(one) for one in (weights, biases)))


def norm(layer: Any) -> Norm:
    """A group norm."""
    if layer.num_groups != GROUPS or layer.eps != EPS:
        raise Unknown("its norms are of another kind")
    return Norm(_weight(layer).float(), layer.bias.detach().float())


def check_weights(
    weights: Sequence[torch.Tensor], devices: Sequence[str], dtypes: Sequence[torch.dtype]
) -> None:
    """Raise Unknown for weights that are not all on one of these devices, in one of these dtypes, where that is fast."""
    found = {weight.device for weight in weights}
    if len(found) > 1:
        raise Unknown("its weights are on several devices")
    if (device := found.pop()).type not in devices:
        raise Unknown(f"its weights are on {device}")
    kinds = {weight.dtype for weight in weights}
    if other := sorted(str(dtype).removeprefix("torch.") for dtype in kinds.difference(dtypes)):
        raise Unknown(f"its weights are {', '.join(other)}")
    if device.type == "cuda" and probe_hardware(device).compute_capability < BF16:
        raise Unknown("it wants an NVIDIA GPU that calculates in bf16")
    if device.type == "cuda" and (why := operations_for(device)[1]) != "operations in Triton":
        raise Unknown(why)


def _weight(layer: Any) -> torch.Tensor:
    if getattr(layer, "weight_function", None) or getattr(layer, "bias_function", None):
        raise Unknown("its weights are patched while they are used")
    return layer.weight.detach()


def _ordered(weight: torch.Tensor) -> torch.Tensor:
    return weight.contiguous(memory_format=torch.channels_last)
