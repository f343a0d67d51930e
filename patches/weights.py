"""What the three loaders share: handing a file's tensors to a module of the host, and quantised files."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import comfy.utils
import torch

from ..toolkit.dequantise import FP8 as FP8_DTYPES
from ..toolkit.dequantise import PLAIN as PLAIN_DTYPES
from ..toolkit.errors import ModelFileError

FP8_FORMATS = ("float8_e4m3fn", "float8_e5m2")


def assign(module: torch.nn.Module, state_dict: dict[str, torch.Tensor], name: str) -> None:
    """Hand tensors over to a module on meta, by reference.

    Args:
        module: the host's, built on the meta device.
        state_dict: by the module's names; what the module lacks is ignored.
        name: the file's, for the error.

    Raises:
        ModelFileError: a tensor has the wrong shape or is missing.
    """
    part: Any
    for part in module.modules():  # quantised layers remember the device that they were built on
        if hasattr(part, "factory_kwargs"):
            part.factory_kwargs["device"] = torch.device("cpu")
    try:
        missing, _ = module.load_state_dict(state_dict, strict=False, assign=True)
    except (RuntimeError, ValueError) as error:
        raise ModelFileError(
            f"{name} does not fit Klein's architecture ({error}).", "Download it again."
        ) from error
    left = [
        key
        for key, tensor in (*module.named_parameters(), *module.named_buffers())
        if tensor.is_meta
    ]
    if lost := [key for key in missing if key in left]:
        raise ModelFileError(
            f"{name} lacks {len(lost)} tensors, {lost[0]} among them.", "Download it again."
        )
    for key in left:  # only counters that no inference reads
        owner, _, leaf = key.rpartition(".")
        getattr(module.get_submodule(owner), leaf).data = torch.zeros(())
    module.requires_grad_(False)


def weight_dtype(state_dict: dict[str, torch.Tensor], name: str) -> torch.dtype:
    """The dtype of most bytes.

    Raises:
        ModelFileError: it is none that Klein runs from.
    """
    sizes: dict[torch.dtype, int] = {}
    for tensor in state_dict.values():
        sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.numel()
    dtype = max(sizes, key=lambda key: sizes[key])
    if dtype not in (*PLAIN_DTYPES, *FP8_DTYPES):
        raise _unsupported(name, str(dtype).removeprefix("torch."))
    return dtype


def read_quantisation(
    state_dict: dict[str, torch.Tensor], metadata: dict[str, str], name: str
) -> tuple[dict[str, torch.Tensor], Any]:
    """Find out whether and how a file is quantised, in the host's own terms.

    Args:
        state_dict: the file's tensors, the part's own names.
        metadata: the file's.
        name: the file's, for the error.

    Returns:
        The tensors as the host's quantised layers read them, and what the host calls their configuration: None for a
        plain file, a dtype for 0.3.75's "scaled_fp8", else a table.

    Raises:
        ModelFileError: the format is none that was tested here.
    """
    try:
        return _read_quantisation(dict(state_dict), dict(metadata), name)
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise ModelFileError(
            f"{name} describes its quantisation in a way that cannot be read ({error}).",
            "Download it again, or use the bf16 file.",
        ) from error


def _read_quantisation(
    state_dict: dict[str, torch.Tensor], metadata: dict[str, str], name: str
) -> tuple[dict[str, torch.Tensor], Any]:
    formats = _layer_formats(state_dict)
    if "_quantization_metadata" in metadata:
        layers = json.loads(metadata["_quantization_metadata"])["layers"]
        formats |= {layer.get("format") for layer in layers.values()}
    else:
        layers = {}
    # scales that nothing describes: a file without the table, or a checkpoint, whose table has the checkpoint's names
    for key in [key for key in state_dict if key.endswith(".weight_scale")]:
        layer = key.removesuffix(".weight_scale")
        if layer not in layers and f"{layer}.comfy_quant" not in state_dict:
            layers[layer] = {"format": str(state_dict[f"{layer}.weight"].dtype)[len("torch.") :]}
            formats.add(layers[layer]["format"])
    if layers:
        metadata["_quantization_metadata"] = json.dumps({"layers": layers})
    if other := sorted(map(str, formats.difference(FP8_FORMATS))):
        raise _unsupported(name, ", ".join(other))
    if hasattr(comfy.utils, "convert_old_quants"):
        state_dict, _ = comfy.utils.convert_old_quants(state_dict, "", metadata=metadata)
        return state_dict, comfy.utils.detect_layer_quantization(state_dict, "")
    if _layer_formats(state_dict):
        raise ModelFileError(
            f"{name} is quantised layer by layer in a form newer than this ComfyUI.",
            "Update ComfyUI, or use the bf16 file.",
        )
    if (marker := state_dict.pop("scaled_fp8", None)) is not None:
        return state_dict, FP8_DTYPES[0] if marker.dtype == torch.float32 else marker.dtype
    return state_dict, layers or None


def _layer_formats(state_dict: dict[str, torch.Tensor]) -> set[str | None]:
    """The formats named beside quantised layers."""
    return {
        json.loads(tensor.numpy().tobytes()).get("format")
        for key, tensor in state_dict.items()
        if key.endswith(".comfy_quant")
    }


def _unsupported(name: str, what: str) -> ModelFileError:
    return ModelFileError(
        f"{name} is quantised to {what}, which ArkFastLoader does not load.",
        "Use the bf16 or the fp8 file, or ComfyUI's own loader for this one.",
    )


def remember_origin(patcher: Any, build: Callable[[Any], Any], path: Any) -> None:
    """Tell the host how to build a patcher anew from its file, for what must not share the weights.

    Args:
        patcher: the host's; its `cached_patcher_init` is set.
        build: from the path to a new patcher.
        path: of the file.
    """
    patcher.cached_patcher_init = (lambda file, **_: build(file), (path,))
