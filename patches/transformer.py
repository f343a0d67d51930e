"""Klein's transformer as the host's own MODEL, built around a file's weights.

The host's class is instantiated on the meta device with the dimensions of the file and the file's tensors are assigned to
it, so no weight is copied or cast on the way. ComfyUI 0.3.75 has the class but cannot find its dimensions; here they come
from the weights on both hosts.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import comfy.model_detection
import comfy.model_management
import comfy.model_patcher
import torch

from ..toolkit.architecture import LATENT_CHANNELS, TransformerDims
from ..toolkit.igniter import open_model, strip_prefix
from ..toolkit.keys import is_diffusers_transformer, transformer_from_diffusers
from .residency import ResidentPatcher
from .warmup import unset, warm_up
from .weights import assign, read_quantisation, remember_origin, weight_dtype

CHECKPOINT_PREFIX = r"model\.diffusion_model\."


def load_transformer(path: str | Path, ahead: bool = True) -> tuple[Any, TransformerDims]:
    """Build a MODEL from a Klein transformer.

    Args:
        path: safetensors, in ComfyUI's or diffusers' names, alone, in shards or in a checkpoint; bf16, fp16, fp32 or fp8.
        ahead: let the weights leave for the device at once.

    Returns:
        The host's ModelPatcher and the dimensions read from the file.

    Raises:
        ModelFileError: the file is damaged, of another kind, or quantised in a way that is not supported.
    """
    name = Path(path).name
    opened = open_model(path)
    state_dict = opened.tensors
    if is_diffusers_transformer(state_dict):
        state_dict = transformer_from_diffusers(state_dict)
    state_dict = strip_prefix(
        state_dict, CHECKPOINT_PREFIX, "double_stream_modulation_img.lin.weight"
    )
    dims = TransformerDims.of(state_dict, name)
    state_dict, quantisation = read_quantisation(state_dict, opened.metadata, name)
    load_device = comfy.model_management.get_torch_device()
    if ahead:
        ResidentPatcher.send_ahead(opened, state_dict, load_device)

    config = comfy.model_detection.detect_unet_config(state_dict, "")
    config["num_heads"] = dims.num_heads  # 0.3.75 assumes FLUX.2-dev's 48
    model_config = comfy.model_detection.model_config_from_unet_config(config, state_dict)
    _set_dtype(model_config, state_dict, quantisation, load_device, name)
    weights = model_config.process_unet_state_dict(state_dict)
    if quantisation is None:
        shallow = comfy.model_detection.model_config_from_unet_config(
            {**config, "depth": 1, "depth_single_blocks": 1}, state_dict
        )
        _set_dtype(shallow, state_dict, None, load_device, name)
        shape = (dims.hidden_size, dims.context_dim, shallow.unet_config["dtype"])
        warm_up(
            "transformer",
            shape,
            load_device,
            lambda: _denoise(shallow, weights, dims, load_device),
        )
    model = model_config.get_model(state_dict, "", device=torch.device("meta"))
    model.device = None  # not meta: the host would keep activations there
    assign(model.diffusion_model, weights, name)
    patcher = comfy.model_patcher.ModelPatcher(
        model, load_device=load_device, offload_device=comfy.model_management.unet_offload_device()
    )
    patcher = ResidentPatcher.of(patcher, opened)
    remember_origin(patcher, lambda file: load_transformer(file)[0], path)
    return patcher, dims


def _denoise(model_config: Any, weights: dict, dims: TransformerDims, device: torch.device) -> None:
    """A model of two blocks at 1024x1024, with weights that nobody has set."""
    model = model_config.get_model(weights, "", device=torch.device("meta"))
    later = re.compile(r"(double|single)_blocks\.[1-9]")
    first = {key: tensor for key, tensor in weights.items() if not later.match(key)}
    assign(model.diffusion_model, unset(first, device), "the transformer")
    latents = torch.zeros(1, LATENT_CHANNELS, 64, 64, device=device)
    prompt_embeds = torch.zeros(1, 512, dims.context_dim, device=device)
    model.to(device).apply_model(latents, torch.ones(1, device=device), c_crossattn=prompt_embeds)


def _set_dtype(
    model_config: Any,
    state_dict: dict[str, torch.Tensor],
    quantisation: Any,
    device: torch.device,
    name: str,
) -> None:
    """Tell the host's configuration in which dtype the weights lie and in which one to compute."""
    management, supported = comfy.model_management, model_config.supported_inference_dtypes
    if quantisation is None:
        dtype = weight_dtype(state_dict, name)
        model_config.set_inference_dtype(
            dtype, management.unet_manual_cast(dtype, device, supported)
        )
        return
    count = sum(tensor.numel() for tensor in state_dict.values())
    dtype = management.unet_dtype(model_params=count, supported_dtypes=list(supported))
    stored: torch.dtype | None = None
    if isinstance(quantisation, torch.dtype):  # 0.3.75 and a file of the form "scaled_fp8"
        model_config.scaled_fp8, stored = quantisation, dtype
    elif "mixed_ops" in quantisation:
        model_config.quant_config = quantisation
    else:
        model_config.layer_quant_config = quantisation
    model_config.set_inference_dtype(dtype, management.unet_manual_cast(stored, device, supported))
