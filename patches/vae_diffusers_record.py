"""The modules of diffusers' `AutoencoderKLFlux2` as the records of `toolkit/autoencoder.py`."""

from __future__ import annotations

from typing import Any

import torch

from ..toolkit.autoencoder import Decoder, Encoder
from ..toolkit.fused.runner import Unknown
from ..toolkit.pixel_layers import Attention, Block, Conv, Middle
from ..toolkit.pixel_records import conv, matrix, norm


def read_decoder(vae: Any) -> Decoder:
    """The record; raises Unknown if something is not as the engine needs it, as all functions here."""
    part = _checked(vae.decoder, vae.post_quant_conv)
    levels = [(_blocks(level.resnets), _resize(level.upsamplers, True)) for level in part.up_blocks]
    return Decoder(
        *_latents(vae),
        matrix(vae.post_quant_conv),
        conv(part.conv_in),
        _middle(part.mid_block),
        levels,
        norm(part.conv_norm_out),
        conv(part.conv_out),
    )


def read_encoder(vae: Any) -> Encoder:
    """The record, with mean and variance."""
    part = _checked(vae.encoder, vae.quant_conv)
    levels = [
        (_blocks(level.resnets), _resize(level.downsamplers, False)) for level in part.down_blocks
    ]
    return Encoder(
        conv(part.conv_in),
        levels,
        _middle(part.mid_block),
        norm(part.conv_norm_out),
        conv(part.conv_out),
        matrix(vae.quant_conv),
        *_latents(vae),
    )


def _checked(part: Any, single: Any) -> Any:
    """The encoder or decoder, if it is of the kind that the engine knows."""
    kinds = (torch.nn.Conv2d, torch.nn.Linear, torch.nn.GroupNorm)
    subclassed = any(isinstance(m, kinds) and type(m) not in kinds for m in part.modules())
    levels = {"UpDecoderBlock2D", "DownEncoderBlock2D"}
    blocks = getattr(part, "up_blocks", None) or part.down_blocks
    known = single is not None and {type(block).__name__ for block in blocks} <= levels
    if subclassed or not known or not isinstance(part.conv_act, torch.nn.SiLU):
        raise Unknown("it is not FLUX.2's")
    return part


def _latents(vae: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation of the latents."""
    mean, variance = vae.bn.running_mean.float(), vae.bn.running_var.float()
    return mean, (variance + vae.config.batch_norm_eps).sqrt()


def _middle(part: Any) -> Middle:
    if len(part.resnets) != 2 or len(part.attentions) != 1 or part.attentions[0] is None:
        raise Unknown("its middle is of another kind")
    attn = part.attentions[0]
    usual = attn.heads == 1 and attn.residual_connection and attn.rescale_output_factor == 1
    if not usual or type(attn.processor).__name__ not in ("AttnProcessor", "AttnProcessor2_0"):
        raise Unknown("its attention is of another kind")
    attention = Attention(norm(attn.group_norm), matrix(attn.to_q, attn.to_k, attn.to_v), matrix(attn.to_out[0]))  # fmt: skip
    first, last = _blocks(part.resnets)
    return first, attention, last


def _blocks(found: Any) -> list[Block]:
    return [_block(block) for block in found]


def _block(block: Any) -> Block:
    usual = (
        type(block).__name__ == "ResnetBlock2D"
        and isinstance(block.nonlinearity, torch.nn.SiLU)
        and block.time_emb_proj is block.upsample is block.downsample is None
        and block.output_scale_factor == 1
    )
    if not usual:
        raise Unknown("its blocks are of another kind")
    shortcut = None if block.conv_shortcut is None else matrix(block.conv_shortcut)
    return Block(norm(block.norm1), conv(block.conv1), norm(block.norm2), conv(block.conv2), shortcut)  # fmt: skip


def _resize(layers: Any, double: bool) -> Conv | None:
    """What doubles the size after a level, or halves it."""
    if not layers:
        return None
    (layer,) = layers
    plain = layer.use_conv and layer.norm is None
    plain &= (layer.interpolate and not layer.use_conv_transpose) if double else layer.padding == 0
    if not plain:
        raise Unknown("it changes sizes in another way")
    return conv(layer.conv, double)
