"""From the parameter names of files published for ComfyUI to diffusers': what `keys.py` does, the other way round."""

from __future__ import annotations

import re

import torch

from .keys import _DOUBLE, _QKV, _SINGLE, _TRANSFORMER, _replace_prefix

_BACK = {new: old for old, new in _TRANSFORMER.items()}
_DOUBLE_BACK = {new: old for old, new in _DOUBLE.items()}
_SINGLE_BACK = {new: old for old, new in _SINGLE.items()}
_SWAPPED = "final_layer.adaLN_modulation.1.weight"
_ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}


def transformer_to_diffusers(state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Rename a Klein's weights for `Flux2Transformer2DModel`; only the last modulation is copied, q, k and v are views."""
    renamed: dict[str, torch.Tensor] = {}
    for key, tensor in state_dict.items():
        match = re.match(r"(double|single)_blocks\.(\d+)\.(.*)", key)
        if key == _SWAPPED:  # here: shift, scale; diffusers: scale, shift
            tensor = torch.cat(tensor.chunk(2)[::-1])
        if not match:
            renamed[_replace_prefix(key, _BACK)] = tensor
            continue
        kind, index, rest = match.groups()
        if kind == "single":
            block, table = f"single_transformer_blocks.{index}.", _SINGLE_BACK
        else:
            block, table = f"transformer_blocks.{index}.", _DOUBLE_BACK
        stream = rest.partition(".")[0]
        if kind == "double" and rest == f"{stream}.qkv.weight":  # [3H, H]
            for name, part in zip(_QKV[stream], tensor.chunk(3), strict=True):
                renamed[f"{block}attn.{name}.weight"] = part
        else:
            renamed[block + _replace_prefix(rest, table)] = tensor
    return renamed


def vae_to_diffusers(state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Rename a FLUX.2 autoencoder's weights for `AutoencoderKLFlux2`; all of them stay views."""
    levels = 1 + max(
        (int(m[1]) for key in state_dict if (m := re.match(r"decoder\.up\.(\d+)\.", key))),
        default=0,
    )
    renamed = {}
    for key, tensor in state_dict.items():
        key = re.sub(r"^(encoder|decoder)\.((?:post_)?quant_conv)\.", r"\2.", key)
        key = re.sub(r"\.down\.(\d+)\.downsample\.", r".down_blocks.\1.downsamplers.0.", key)
        key = re.sub(r"\.down\.(\d+)\.block\.", r".down_blocks.\1.resnets.", key)
        key = re.sub(r"\.up\.(\d+)\.", lambda m: f".up_blocks.{levels - 1 - int(m[1])}.", key)
        key = re.sub(r"(up_blocks\.\d+)\.upsample\.", r"\1.upsamplers.0.", key)
        key = re.sub(r"(up_blocks\.\d+)\.block\.", r"\1.resnets.", key)
        key = re.sub(r"\.mid\.block_(\d)\.", lambda m: f".mid_block.resnets.{int(m[1]) - 1}.", key)
        key = re.sub(r"^(encoder|decoder)\.norm_out\.", r"\1.conv_norm_out.", key)
        key = key.replace(".nin_shortcut.", ".conv_shortcut.")
        if match := re.match(r"(.*)\.mid\.attn_1\.(\w+)\.(.*)", key):
            side, part, leaf = match.groups()
            key = f"{side}.mid_block.attentions.0.{_ATTENTION[part]}.{leaf}"
            if tensor.ndim == 4:  # a 1x1 convolution; diffusers has a linear layer
                tensor = tensor[:, :, 0, 0]
        renamed[key] = tensor
    return renamed
