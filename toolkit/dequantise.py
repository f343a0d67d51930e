"""Weights in a dtype that any layer computes with: plain ones are cast, fp8 ones multiplied with their scales."""

from __future__ import annotations

from collections import Counter

import torch

from .errors import ModelFileError

PLAIN = (torch.bfloat16, torch.float16, torch.float32)
FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
_SCALES = (".weight_scale", ".scale_weight")
_IGNORED = (*_SCALES, ".input_scale", ".scale_input", ".comfy_quant", "scaled_fp8")


def stored_dtype(state_dict: dict[str, torch.Tensor], name: str) -> torch.dtype:
    """The dtype of most of a model's numbers; bf16 for an fp8 file, as that is what it was made from.

    Args:
        state_dict: of one part.
        name: the file's, for the error.

    Raises:
        ModelFileError: it is quantised in a way that is not read here.
    """
    sizes: dict[torch.dtype, int] = {}
    for key, tensor in state_dict.items():
        if not key.endswith(_IGNORED):
            sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.numel()
    dtype = max(sizes, key=lambda key: sizes[key])
    if dtype not in (*PLAIN, *FP8):
        raise ModelFileError(
            f"{name} is quantised to {str(dtype).removeprefix('torch.')}, which is not read here.",
            "Use the bf16 or the fp8 file.",
        )
    return torch.bfloat16 if dtype in FP8 else dtype


def dequantise(
    state_dict: dict[str, torch.Tensor], dtype: torch.dtype, name: str
) -> dict[str, torch.Tensor]:
    """Bring all weights to one dtype, where they lie.

    Args:
        state_dict: of one part, scales among it.
        dtype: wanted; a weight that has it already is not copied, unless it lies among some that are.
        name: the file's, for the error.

    Returns:
        The weights without their scales; none is a view of a buffer that is mostly of no use any more.

    Raises:
        ModelFileError: a scale fits no weight, or a weight is of a dtype that is not read here.
    """
    made = {}
    for key, tensor in state_dict.items():
        if key.endswith(_IGNORED):
            continue
        layer = key.removesuffix(".weight")
        scale = next((state_dict[layer + s] for s in _SCALES if layer + s in state_dict), None)
        if tensor.dtype in FP8 and scale is not None:
            if scale.numel() not in (1, len(tensor)):
                raise ModelFileError(
                    f"{name} has a scale of shape {tuple(scale.shape)} for {key}, which is not read here.",
                    "Use the bf16 file.",
                )
            rows = scale.float().reshape(-1, *[1] * (tensor.ndim - 1))  # one, or one a row
            tensor = (tensor.to(dtype) * rows.to(tensor.device)).to(dtype)
        elif tensor.is_floating_point():
            tensor = tensor.to(dtype)
        elif key.endswith(".weight"):
            raise ModelFileError(
                f"{name}: {key} is of {str(tensor.dtype).removeprefix('torch.')}, which is not read here.",
                "Use the bf16 or the fp8 file.",
            )
        made[key] = tensor
    return _without_remnants(made, state_dict)


def _without_remnants(made: dict[str, torch.Tensor], before: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:  # fmt: skip
    """Copy the few that were kept of a buffer of which most was cast: as views they would keep all of it."""
    replaced: Counter[int] = Counter()  # bytes less those kept, by buffer
    for key, tensor in before.items():
        kept = made.get(key) is tensor
        replaced[_buffer(tensor)] += -tensor.nbytes if kept else tensor.nbytes
    return {
        key: tensor.clone() if tensor is before[key] and replaced[_buffer(tensor)] > 0 else tensor
        for key, tensor in made.items()
    }


def _buffer(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
