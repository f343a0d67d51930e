"""What a FLUX.2-Klein file looks like: every dimension is read from the weights, none is assumed.

Source of the architecture: black-forest-labs/flux2 `model.py`; of the key names: the files published for ComfyUI.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from .errors import ModelFileError

HEAD_DIM = 128  # fixed by the four RoPE axes of 32 dimensions each
TEXT_TAPS = (9, 18, 27)  # hidden states of Qwen3 that Klein reads, concatenated
NEEDED_LAYERS = max(TEXT_TAPS)
LATENT_CHANNELS = 128  # 32 channels of the VAE, packed 2x2
SPATIAL_FACTOR = 16  # px of the picture a latent position
TXT_LEN = 512  # tokens of a prompt
USUAL_TOKENS = 4096 + TXT_LEN  # of a picture of 1024x1024 and of its prompt
MLP = 3  # width of a transformer's MLP in hidden sizes
USUAL_HEADS = 24  # of Klein 4B


@dataclass(frozen=True)
class TransformerDims:
    """Dimensions of the diffusion transformer."""

    hidden_size: int
    num_heads: int
    double_blocks: int
    single_blocks: int
    context_dim: int  # width of the conditioning it reads

    @classmethod
    def of(cls, state_dict: Mapping[str, torch.Tensor], name: str) -> TransformerDims:
        """Read the dimensions from ComfyUI-named weights; `name` is the file's, for the error."""
        if (
            "double_stream_modulation_img.lin.weight" not in state_dict
            or "txt_in.weight" not in state_dict
        ):
            raise _wrong_slot(name, state_dict, "diffusion model", "a FLUX.2-Klein transformer")
        hidden_size, context_dim = state_dict["txt_in.weight"].shape
        channels = state_dict["img_in.weight"].shape[1]
        if hidden_size % HEAD_DIM or channels != LATENT_CHANNELS:
            raise ModelFileError(
                f"{name} has hidden size {hidden_size} and {channels} latent channels, which is not FLUX.2.",
                "Choose a FLUX.2-Klein transformer.",
            )
        double, single = (
            count_blocks(state_dict, "double_blocks"),
            count_blocks(state_dict, "single_blocks"),
        )
        if not double or not single:
            raise ModelFileError(f"{name} lacks transformer blocks.", "Download it again.")
        return cls(hidden_size, hidden_size // HEAD_DIM, double, single, context_dim)


@dataclass(frozen=True)
class TextEncoderDims:
    """Dimensions of the Qwen3 text encoder."""

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_key_value_heads: int
    vocab_size: int

    @property
    def context_dim(self) -> int:
        """Width of the conditioning it makes."""
        return self.hidden_size * len(TEXT_TAPS)

    @classmethod
    def of(cls, state_dict: Mapping[str, torch.Tensor], name: str) -> TextEncoderDims:
        """Read the dimensions from Hugging Face's names; `name` is the file's, for the error."""
        first = "model.layers.0."
        if (
            "model.embed_tokens.weight" not in state_dict
            or first + "self_attn.q_norm.weight" not in state_dict
        ):
            raise _wrong_slot(name, state_dict, "text encoder", "a Qwen3 text encoder")
        vocab_size, hidden_size = state_dict["model.embed_tokens.weight"].shape
        layers = count_blocks(state_dict, "model.layers")
        if layers < max(TEXT_TAPS):
            raise ModelFileError(
                f"{name} has {layers} layers; Klein reads the output of layer {max(TEXT_TAPS)}.",
                "Choose the Qwen3 text encoder that belongs to the diffusion model.",
            )
        return cls(
            hidden_size,
            state_dict[first + "mlp.gate_proj.weight"].shape[0],
            layers,
            state_dict[first + "self_attn.q_proj.weight"].shape[0] // HEAD_DIM,
            state_dict[first + "self_attn.k_proj.weight"].shape[0] // HEAD_DIM,
            vocab_size,
        )


@dataclass(frozen=True)
class VaeDims:
    """Dimensions of the autoencoder."""

    encoder_width: int
    decoder_width: int
    multipliers: tuple[int, ...]
    res_blocks: int
    latent_channels: int  # before packing
    embed_dim: int

    @classmethod
    def of(cls, state_dict: Mapping[str, torch.Tensor], name: str) -> VaeDims:
        """Read the dimensions from ComfyUI-named weights; `name` is the file's, for the error."""
        needed = (
            "encoder.conv_in.weight",
            "decoder.conv_in.weight",
            "bn.running_mean",
            "post_quant_conv.weight",
        )
        if any(key not in state_dict for key in needed):
            raise _wrong_slot(name, state_dict, "VAE", "the FLUX.2 autoencoder")
        levels = count_blocks(state_dict, "encoder.down")
        width = state_dict["encoder.conv_in.weight"].shape[0]
        ends = [
            state_dict[f"encoder.down.{i}.block.0.conv2.weight"].shape[0] for i in range(levels)
        ]
        embed_dim, latent_channels = state_dict["post_quant_conv.weight"].shape[1::-1]
        multipliers = tuple(end // width for end in ends)
        if state_dict["bn.running_mean"].numel() != LATENT_CHANNELS:
            raise _wrong_slot(name, state_dict, "VAE", "the FLUX.2 autoencoder")
        return cls(
            width,
            state_dict["decoder.conv_in.weight"].shape[0] // multipliers[-1],
            multipliers,
            count_blocks(state_dict, "encoder.down.0.block"),
            latent_channels,
            embed_dim,
        )


def count_blocks(state_dict: Mapping[str, torch.Tensor], prefix: str) -> int:
    """How many numbered children `prefix.0.`, `prefix.1.`, ... there are."""
    pattern = re.compile(re.escape(prefix) + r"\.(\d+)\.")
    return len({match[1] for key in state_dict if (match := pattern.match(key))})


def needed_tensors(
    state_dict: Mapping[str, torch.Tensor], layers: int = NEEDED_LAYERS
) -> dict[str, torch.Tensor]:
    """The embedding and the first layers, as many as Klein reads, of the names of Hugging Face's Qwen3."""
    layer = re.compile(r"model\.layers\.(\d+)\.")
    return {
        key: tensor
        for key, tensor in state_dict.items()
        if key.startswith("model.embed_tokens.")
        or ((match := layer.match(key)) and int(match[1]) < layers)
    }


def check_match(transformer: TransformerDims, text_encoder: TextEncoderDims, name: str) -> None:
    """Refuse a text encoder whose conditioning the transformer cannot read; `name` is the encoder's file."""
    if transformer.context_dim != text_encoder.context_dim:
        raise ModelFileError(
            f"{name} makes conditioning of width {text_encoder.context_dim} (3 x {text_encoder.hidden_size}), "
            f"the diffusion model reads {transformer.context_dim}.",
            f"Choose the Qwen3 text encoder of hidden size {transformer.context_dim / len(TEXT_TAPS):g}.",
        )


def describe(state_dict: Mapping[str, torch.Tensor]) -> str:
    """Name the kind of model that some keys belong to, for error messages."""
    signs = {
        "a FLUX.2 transformer": "double_stream_modulation_img.lin.weight",
        "a FLUX.1 transformer": "double_blocks.0.img_mod.lin.weight",
        "an SDXL or SD checkpoint": "model.diffusion_model.input_blocks.0.0.weight",
        "an SDXL or SD U-Net": "input_blocks.0.0.weight",
        "a Qwen3 text encoder": "model.layers.0.self_attn.q_norm.weight",
        "a Llama-like text encoder": "model.layers.0.self_attn.q_proj.weight",
        "a CLIP text encoder": "text_model.embeddings.token_embedding.weight",
        "a T5 text encoder": "shared.weight",
        "the FLUX.2 autoencoder": "bn.running_mean",
        "an autoencoder of another model": "decoder.conv_in.weight",
    }
    return next(
        (kind for kind, key in signs.items() if key in state_dict), "a model Ark does not know"
    )


def _wrong_slot(
    name: str, state_dict: Mapping[str, torch.Tensor], slot: str, wanted: str
) -> ModelFileError:
    return ModelFileError(
        f"{name} in the {slot} slot is {describe(state_dict)}.", f"Choose {wanted} there."
    )
