"""Klein's three parts as the host's own objects, built around mapped weights.

The host's classes are instantiated on the meta device with the dimensions of the file and the file's tensors are
assigned to them, so no weight is copied or cast on the way. ComfyUI 0.3.75 has every class that Klein needs but cannot
find its dimensions; here they come from the weights on both hosts.
"""

from __future__ import annotations

import contextlib
import logging
from pathlib import Path
from typing import Any

import comfy.model_detection
import comfy.model_management
import comfy.model_patcher
import comfy.sd
import comfy.text_encoders.flux
import comfy.text_encoders.llama
import comfy.text_encoders.z_image
import comfy.utils
import folder_paths
import torch
from comfy import sd1_clip

from ..toolkit.architecture import (
    LATENT_CHANNELS,
    SPATIAL_FACTOR,
    TEXT_TAPS,
    TextEncoderDims,
    TransformerDims,
    VaeDims,
)
from ..toolkit.errors import ModelFileError
from ..toolkit.igniter import load_state_dict
from ..toolkit.keys import (
    is_diffusers_transformer,
    is_diffusers_vae,
    transformer_from_diffusers,
    vae_from_diffusers,
)

PAD_TOKEN = 151643
PLAIN_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
ENCODER = "qwen3_4b"  # the host's name for this encoder, whatever its width


def load_transformer(path: str | Path) -> tuple[Any, TransformerDims]:
    """Build a MODEL from a Klein transformer file.

    Args:
        path: safetensors, in ComfyUI's or diffusers' names.

    Returns:
        The host's ModelPatcher and the dimensions read from the file.

    Raises:
        ModelFileError: the file is damaged, of another kind, or quantised.
    """
    name = Path(path).name
    state_dict, _ = load_state_dict(path)
    if is_diffusers_transformer(state_dict):
        state_dict = transformer_from_diffusers(state_dict)
    prefix = "model.diffusion_model."
    if prefix + "double_stream_modulation_img.lin.weight" in state_dict:
        state_dict = {k[len(prefix) :]: v for k, v in state_dict.items() if k.startswith(prefix)}
    dims = TransformerDims.of(state_dict, name)
    dtype = _plain_dtype(state_dict, name)

    config = comfy.model_detection.detect_unet_config(state_dict, "")
    config["num_heads"] = dims.num_heads  # 0.3.75 assumes FLUX.2-dev's 48
    model_config = comfy.model_detection.model_config_from_unet_config(config, state_dict)
    load_device = comfy.model_management.get_torch_device()
    cast = comfy.model_management.unet_manual_cast(
        dtype, load_device, model_config.supported_inference_dtypes
    )
    model_config.set_inference_dtype(dtype, cast)
    model = model_config.get_model(state_dict, "", device=torch.device("meta"))
    model.device = None  # not meta: the host would keep activations there
    _assign(model.diffusion_model, model_config.process_unet_state_dict(state_dict), name)
    patcher = comfy.model_patcher.ModelPatcher(
        model, load_device=load_device, offload_device=comfy.model_management.unet_offload_device()
    )
    return patcher, dims


def load_text_encoder(path: str | Path) -> tuple[Any, TextEncoderDims]:
    """Build a CLIP from a Qwen3 file: Klein's tokenizer, template and taps on the host's own Qwen3.

    Returns:
        The host's CLIP and the dimensions read from the file.

    Raises:
        ModelFileError: the file is damaged, of another kind, or quantised.
    """
    name = Path(path).name
    state_dict, _ = load_state_dict(path)
    dims = TextEncoderDims.of(state_dict, name)
    dtype = _plain_dtype(state_dict, name)

    class Target:
        params = {}  # noqa: RUF012 (the host's shape)
        clip = staticmethod(_text_encoder_class())
        tokenizer = staticmethod(_tokenizer_class())

    options = {
        "initial_device": torch.device("meta"),
        "dtype": dtype,
        f"{ENCODER}_model_config": {
            "vocab_size": dims.vocab_size,
            "hidden_size": dims.hidden_size,
            "intermediate_size": dims.intermediate_size,
            "num_hidden_layers": dims.num_layers,
            "num_attention_heads": dims.num_heads,
            "num_key_value_heads": dims.num_key_value_heads,
        },
    }
    tokenizer_data = {f"{ENCODER}_min_length": 512}
    clip = comfy.sd.CLIP(
        Target,
        embedding_directory=folder_paths.get_folder_paths("embeddings"),
        tokenizer_data=tokenizer_data,
        model_options=options,
    )
    _assign(getattr(clip.cond_stage_model, ENCODER).transformer, state_dict, name)
    return clip, dims


def load_vae(path: str | Path) -> tuple[Any, VaeDims]:
    """Build a VAE from a FLUX.2 autoencoder file.

    The one part whose weights may be cast: the host runs a VAE in a dtype of its own choice, and the published file is
    fp32.

    Returns:
        The host's VAE and the dimensions read from the file.

    Raises:
        ModelFileError: the file is damaged, of another kind, or quantised.
    """
    name = Path(path).name
    state_dict, metadata = load_state_dict(path)
    if is_diffusers_vae(state_dict):
        state_dict = vae_from_diffusers(state_dict)
    moved = {"decoder.post_quant_conv.": "post_quant_conv.", "encoder.quant_conv.": "quant_conv."}
    state_dict = comfy.utils.state_dict_prefix_replace(dict(state_dict), moved)
    dims = VaeDims.of(state_dict, name)
    _plain_dtype(state_dict, name)
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
        vae = comfy.sd.VAE(sd={}, config={"params": params}, metadata=metadata)
    vae.latent_channels = LATENT_CHANNELS
    vae.downscale_ratio = vae.upscale_ratio = SPATIAL_FACTOR
    per_unpacked = vae.memory_used_decode
    vae.memory_used_decode = lambda shape, dtype: (
        per_unpacked(shape, dtype) * 4.0
    )  # a packed position is 2x2
    _assign(vae.first_stage_model, {k: v.to(vae.vae_dtype) for k, v in state_dict.items()}, name)
    return vae, dims


def _assign(module: torch.nn.Module, state_dict: dict[str, torch.Tensor], name: str) -> None:
    """Hand tensors over to a module on meta, by reference."""
    try:
        missing, _ = module.load_state_dict(state_dict, strict=False, assign=True)
    except RuntimeError as error:
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


def _plain_dtype(state_dict: dict[str, torch.Tensor], name: str) -> torch.dtype:
    """The dtype of most bytes; quantised files are refused aloud."""
    sizes: dict[torch.dtype, int] = {}
    for tensor in state_dict.values():
        sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.numel()
    dtype = max(sizes, key=lambda key: sizes[key])
    if dtype not in PLAIN_DTYPES:
        raise ModelFileError(
            f"{name} is quantised ({str(dtype).removeprefix('torch.')}), which ArkFastLoader does not load yet.",
            "Use the bf16 file, or ComfyUI's own loader for this one.",
        )
    return dtype


def _tokenizer_class() -> type:
    """Klein's tokenizer: the host's own where it has one."""
    flux = comfy.text_encoders.flux
    if hasattr(flux, "KleinTokenizer"):
        return flux.KleinTokenizer

    class KleinTokenizer(sd1_clip.SD1Tokenizer):
        # this host's vocabulary names the ids of <think> and </think> <|meta|> and <|endofmeta|>
        template = (
            "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n<|meta|>\n\n<|endofmeta|>\n\n"
        )

        def __init__(self, embedding_directory=None, tokenizer_data=None):
            super().__init__(
                embedding_directory=embedding_directory,
                tokenizer_data=tokenizer_data or {},
                name=ENCODER,
                tokenizer=comfy.text_encoders.z_image.Qwen3Tokenizer,
            )

        def tokenize_with_weights(self, text, return_word_ids=False, llama_template=None, **kwargs):
            framed = (llama_template or self.template).format(text)
            return super().tokenize_with_weights(
                framed, return_word_ids=return_word_ids, disable_weights=True, **kwargs
            )

    return KleinTokenizer


def _text_encoder_class() -> type:
    """Qwen3 with Klein's three taps, the same on both hosts."""

    class KleinQwen3(sd1_clip.SDClipModel):
        def __init__(self, device="cpu", dtype=None, model_options=None, **_):
            super().__init__(
                device=device,
                layer=list(TEXT_TAPS),
                layer_idx=None,
                textmodel_json_config={},
                dtype=dtype,
                special_tokens={"pad": PAD_TOKEN},
                layer_norm_hidden_state=False,
                model_class=comfy.text_encoders.llama.Qwen3_4B,
                enable_attention_masks=True,
                return_attention_masks=True,
                model_options=model_options or {},
            )

    class KleinTextEncoder(comfy.text_encoders.flux.Flux2TEModel):
        def __init__(self, device="cpu", dtype=None, model_options=None):
            super().__init__(
                device=device,
                dtype=dtype,
                model_options=model_options or {},
                name=ENCODER,
                clip_model=KleinQwen3,
            )

    return KleinTextEncoder


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
