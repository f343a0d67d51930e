"""From diffusers' parameter names to those of the files published for ComfyUI.

Both name the same numbers; three things differ: diffusers splits the double blocks' qkv, swaps the halves of the last
modulation, and counts the decoder's levels from the other end.
"""

from __future__ import annotations

import re

import torch

_TRANSFORMER = {
    "x_embedder.": "img_in.",
    "context_embedder.": "txt_in.",
    "time_guidance_embed.timestep_embedder.linear_1.": "time_in.in_layer.",
    "time_guidance_embed.timestep_embedder.linear_2.": "time_in.out_layer.",
    "time_guidance_embed.guidance_embedder.linear_1.": "guidance_in.in_layer.",
    "time_guidance_embed.guidance_embedder.linear_2.": "guidance_in.out_layer.",
    "double_stream_modulation_img.linear.": "double_stream_modulation_img.lin.",
    "double_stream_modulation_txt.linear.": "double_stream_modulation_txt.lin.",
    "single_stream_modulation.linear.": "single_stream_modulation.lin.",
    "proj_out.": "final_layer.linear.",
    "norm_out.linear.": "final_layer.adaLN_modulation.1.",
}
_DOUBLE = {
    "attn.to_out.0.": "img_attn.proj.",
    "attn.to_add_out.": "txt_attn.proj.",
    "attn.norm_q.weight": "img_attn.norm.query_norm.scale",
    "attn.norm_k.weight": "img_attn.norm.key_norm.scale",
    "attn.norm_added_q.weight": "txt_attn.norm.query_norm.scale",
    "attn.norm_added_k.weight": "txt_attn.norm.key_norm.scale",
    "ff.linear_in.": "img_mlp.0.",
    "ff.linear_out.": "img_mlp.2.",
    "ff_context.linear_in.": "txt_mlp.0.",
    "ff_context.linear_out.": "txt_mlp.2.",
}
_SINGLE = {
    "attn.to_qkv_mlp_proj.": "linear1.",
    "attn.to_out.": "linear2.",
    "attn.norm_q.weight": "norm.query_norm.scale",
    "attn.norm_k.weight": "norm.key_norm.scale",
}
_QKV = {
    "img_attn": ("to_q", "to_k", "to_v"),
    "txt_attn": ("add_q_proj", "add_k_proj", "add_v_proj"),
}


def transformer_from_diffusers(state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Rename a diffusers `Flux2Transformer2DModel`'s weights; only qkv and the last modulation are copied."""
    renamed: dict[str, torch.Tensor] = {}
    for key, tensor in state_dict.items():
        if match := re.match(r"(single_)?transformer_blocks\.(\d+)\.(.*)", key):
            single, index, rest = match.groups()
            if rest.startswith("attn.") and rest.split(".")[1] in (
                *_QKV["img_attn"],
                *_QKV["txt_attn"],
            ):
                continue  # joined below
            block = f"single_blocks.{index}." if single else f"double_blocks.{index}."
            renamed[block + _replace_prefix(rest, _SINGLE if single else _DOUBLE)] = tensor
        else:
            renamed[_replace_prefix(key, _TRANSFORMER)] = tensor
    index = 0
    while f"transformer_blocks.{index}.attn.to_q.weight" in state_dict:
        for stream, parts in _QKV.items():
            joined = torch.cat(
                [state_dict[f"transformer_blocks.{index}.attn.{part}.weight"] for part in parts]
            )
            renamed[f"double_blocks.{index}.{stream}.qkv.weight"] = joined  # [3H, H]
        index += 1
    last = "final_layer.adaLN_modulation.1.weight"
    renamed[last] = torch.cat(
        renamed[last].chunk(2)[::-1]
    )  # diffusers: scale, shift; here: shift, scale
    return renamed


def vae_from_diffusers(state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Rename a diffusers `AutoencoderKLFlux2`'s weights; attention's linear layers become 1x1 convolutions (views)."""
    levels = 1 + max(
        int(m[1]) for key in state_dict if (m := re.match(r"decoder\.up_blocks\.(\d+)\.", key))
    )
    renamed = {}
    for key, tensor in state_dict.items():
        key = re.sub(r"down_blocks\.(\d+)\.resnets\.", r"down.\1.block.", key)
        key = re.sub(r"down_blocks\.(\d+)\.downsamplers\.0\.", r"down.\1.downsample.", key)
        key = re.sub(r"up_blocks\.(\d+)\.", lambda m: f"up.{levels - 1 - int(m[1])}.", key)
        key = key.replace(".resnets.", ".block.").replace(".upsamplers.0.", ".upsample.")
        key = re.sub(r"mid_block\.block\.(\d)\.", lambda m: f"mid.block_{int(m[1]) + 1}.", key)
        key = key.replace("mid_block.attentions.0.", "mid.attn_1.").replace(
            "conv_shortcut", "nin_shortcut"
        )
        key = key.replace("conv_norm_out", "norm_out")
        if "mid.attn_1." in key:
            for old, new in {
                "group_norm": "norm",
                "to_q": "q",
                "to_k": "k",
                "to_v": "v",
                "to_out.0": "proj_out",
            }.items():
                key = key.replace(f"attn_1.{old}.", f"attn_1.{new}.")
            if tensor.ndim == 2:
                tensor = tensor[:, :, None, None]
        renamed[key] = tensor
    return renamed


def is_diffusers_transformer(state_dict: dict[str, torch.Tensor]) -> bool:
    """Whether the names are those of diffusers' Flux2Transformer2DModel."""
    return "single_transformer_blocks.0.attn.to_qkv_mlp_proj.weight" in state_dict


def is_diffusers_vae(state_dict: dict[str, torch.Tensor]) -> bool:
    """Whether the names are those of diffusers' AutoencoderKLFlux2."""
    return (
        "decoder.up_blocks.0.resnets.0.norm1.weight" in state_dict
        and "bn.running_mean" in state_dict
    )


def _replace_prefix(key: str, table: dict[str, str]) -> str:
    return next((new + key[len(old) :] for old, new in table.items() if key.startswith(old)), key)
