"""Klein's autoencoder as the host's own VAE."""

from __future__ import annotations

import contextlib
import logging
from pathlib import Path
from typing import Any

import comfy.ldm.models.autoencoder
import comfy.sd
import comfy.utils
import torch

from ..toolkit.architecture import LATENT_CHANNELS, SPATIAL_FACTOR, VaeDims
from ..toolkit.errors import ModelFileError
from ..toolkit.igniter import open_model, strip_prefix
from ..toolkit.keys import is_diffusers_vae, vae_from_diffusers
from .fast_vae import FastVAE
from .residency import ResidentPatcher
from .vae_engine import VaeEngine
from .warmup import unset, warm_up
from .weights import FP8_DTYPES, assign, remember_origin, weight_dtype

CHECKPOINT_PREFIX = r"(vae|first_stage_model)\."


def load_vae(path: str | Path, ahead: bool = True) -> tuple[Any, VaeDims]:
    """Build a VAE from a FLUX.2 autoencoder file.

    The one part whose weights may be cast, when they have arrived: the host runs a VAE in a dtype of its own choice, and
    the published file is fp32.

    Args:
        path: safetensors, alone or in a checkpoint; fp32, fp16 or bf16.
        ahead: let the weights leave for the device at once.

    Returns:
        The host's VAE, which runs in Ark's engine where that fits, and the dimensions read from the file.

    Raises:
        ModelFileError: the file is damaged, of another kind, or quantised.
    """
    name = Path(path).name
    opened = open_model(path)
    state_dict = opened.tensors
    state_dict = strip_prefix(state_dict, CHECKPOINT_PREFIX, "decoder.conv_in.weight")
    if is_diffusers_vae(state_dict):
        state_dict = vae_from_diffusers(state_dict)
    moved = {"decoder.post_quant_conv.": "post_quant_conv.", "encoder.quant_conv.": "quant_conv."}
    state_dict = comfy.utils.state_dict_prefix_replace(dict(state_dict), moved)
    dims = VaeDims.of(state_dict, name)
    stored = weight_dtype(state_dict, name)
    if stored in FP8_DTYPES:
        raise ModelFileError(f"{name} is an fp8 VAE.", "Use the published flux2-vae.safetensors.")
    encoder = {
        "double_z": True,
        "z_channels": dims.latent_channels,
        "resolution": 256,
        "in_channels": 3,
        "out_ch": 3,
        "ch": dims.encoder_width,
        "ch_mult": list(dims.multipliers),
        "num_res_blocks": dims.res_blocks,
        "attn_resolutions": [],
        "dropout": 0.0,
        "batch_norm_latent": True,
    }
    params: dict[str, Any] = {"ddconfig": encoder, "embed_dim": dims.embed_dim}
    if dims.decoder_width != dims.encoder_width:
        params["decoder_ddconfig"] = {**encoder, "ch": dims.decoder_width}
    with torch.device("meta"), _without_log("Missing VAE keys"):
        vae = comfy.sd.VAE(sd={}, config={"params": params}, metadata=opened.metadata)
    device, dtype = vae.patcher.load_device, vae.vae_dtype
    warm_up("VAE", (dims, dtype), device, lambda: _decode(params, state_dict, dtype, device))
    vae.latent_channels = LATENT_CHANNELS
    vae.downscale_ratio = vae.upscale_ratio = SPATIAL_FACTOR
    per_unpacked = vae.memory_used_decode
    vae.memory_used_decode = lambda shape, dtype: (
        per_unpacked(shape, dtype) * 4.0
    )  # a packed position is 2x2
    if ahead:
        ResidentPatcher.send_ahead(opened, state_dict, device)
    assign(vae.first_stage_model, state_dict, name)
    vae.patcher = ResidentPatcher.of(vae.patcher, opened, None if stored == dtype else dtype)
    remember_origin(vae.patcher, lambda file: load_vae(file)[0].patcher, path)
    return FastVAE.of(vae, VaeEngine(vae.first_stage_model, vae.patcher.masters)), dims


def _decode(
    params: dict[str, Any], weights: dict, dtype: torch.dtype, device: torch.device
) -> None:
    """A picture of 512x512 from weights that nobody has set."""
    with torch.device("meta"):
        vae = comfy.ldm.models.autoencoder.AutoencoderKL(**params).to(dtype).eval()
    assign(vae, {k: v.to(dtype) for k, v in unset(weights, device).items()}, "the VAE")
    latents = torch.zeros(1, LATENT_CHANNELS, 32, 32, dtype=dtype, device=device)
    engine = VaeEngine(vae)
    record = engine.record("decode") if engine.hopeful("decode", device, dtype) else None
    engine.decode(record, latents, lasting=False) if record else vae.decode(latents)


@contextlib.contextmanager
def _without_log(start: str):
    """Keep one misleading line of the host out of the log."""

    def keep(record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith(start)

    root = logging.getLogger()
    root.addFilter(keep)
    try:
        yield
    finally:
        root.removeFilter(keep)
