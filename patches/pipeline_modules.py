"""The modules of diffusers' pipeline, built on meta; each takes a file's weights by reference when they have arrived."""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from ..toolkit.architecture import (
    HEAD_DIM,
    NEEDED_LAYERS,
    TextEncoderDims,
    TransformerDims,
    VaeDims,
)
from ..toolkit.dequantise import dequantise
from ..toolkit.diffusers_keys import transformer_to_diffusers, vae_to_diffusers
from ..toolkit.errors import ModelFileError
from ..toolkit.keys import is_diffusers_transformer, is_diffusers_vae
from ..toolkit.model_files import ModelFiles
from ..toolkit.paths import mmap_pin
from ..toolkit.shipment import Shipment


@dataclass(frozen=True)
class Part:
    """One part of a model on its way.

    Attributes:
        name: the file's, for errors.
        dims: read from it.
        tensors: as they lie in the file.
        shipment: that brings them.
        held: identities of its mapped files.
    """

    name: str
    dims: Any
    tensors: dict[str, torch.Tensor]
    shipment: Shipment
    held: list[tuple]


class _Unfilled(TorchFunctionMode):
    """Leaves new weights as they are, and counts on the CPU: on meta torch imports what it has for symbolic shapes for it."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == torch.nn.init.__name__:
            return kwargs.get("tensor", *args[:1])
        if func is torch.arange:
            kwargs = {"device": "cpu", **kwargs}
        return func(*args, **kwargs)


class Modules:
    """Builds the modules of a pipeline.

    Args:
        files: whose settings hold, where there are any.
        parts: by name, on their way.
        device: where they run.
        dtype: of their weights.
        watch: see `load_pipeline`.

    Attributes:
        nbytes: of all weights.
        waiting: s in which nothing was done but wait for them.
    """

    def __init__(
        self, files: ModelFiles, parts: dict[str, Part], device: torch.device, dtype: torch.dtype, watch: Callable
    ):  # fmt: skip
        self._files, self._parts, self._device, self._dtype = files, parts, device, dtype
        self._watch, self._before, self.waiting = watch, 0, 0.0
        self.nbytes = sum(part.shipment.nbytes for part in parts.values())

    def text_encoder(self) -> torch.nn.Module:
        """Transformers' Qwen3Model with 27 layers; its last output is read before any norm."""
        from transformers import Qwen3Config, Qwen3Model

        dims: TextEncoderDims = self._parts["text_encoder"].dims
        # `layer_types` names more layers than are kept
        settings = self._files.settings("text_encoder")
        settings = {k: v for k, v in settings.items() if k not in ("layer_types", "dtype", "torch_dtype")}  # fmt: skip
        if "rope_theta" in settings:  # as transformers before 5 wrote it
            theta = settings.pop("rope_theta")
            settings.setdefault("rope_parameters", {"rope_type": "default", "rope_theta": theta})
        settings = {
            "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0}, "rms_norm_eps": 1e-6, **settings,
            "vocab_size": dims.vocab_size, "hidden_size": dims.hidden_size, "intermediate_size": dims.intermediate_size,
            "num_attention_heads": dims.num_heads, "num_key_value_heads": dims.num_key_value_heads, "head_dim": HEAD_DIM,
            "num_hidden_layers": NEEDED_LAYERS, "use_cache": False,
        }  # fmt: skip
        config = Qwen3Config(**settings)
        with torch.device("meta"), _Unfilled():
            module: Any = Qwen3Model(config)
        module.norm = torch.nn.Identity()
        module.rotary_emb = type(module.rotary_emb)(config).to(
            self._device
        )  # no file has its table
        weights = self._arrived("text_encoder")
        return self._assign(module, "text_encoder", {k.removeprefix("model."): v for k, v in weights.items()})  # fmt: skip

    def transformer(self) -> torch.nn.Module:
        """Diffusers' Flux2Transformer2DModel."""
        from diffusers import Flux2Transformer2DModel

        part = self._parts["transformer"]
        dims: TransformerDims = part.dims
        settings = {
            **self._files.settings("transformer"),
            "num_layers": dims.double_blocks, "num_single_layers": dims.single_blocks, "attention_head_dim": HEAD_DIM,
            "num_attention_heads": dims.num_heads, "joint_attention_dim": dims.context_dim,
            "guidance_embeds": any("guidance_in." in k or "guidance_embedder." in k for k in part.tensors),
        }  # fmt: skip
        with torch.device("meta"), _Unfilled():
            module = Flux2Transformer2DModel.from_config(settings)
        weights = self._arrived("transformer")
        if not is_diffusers_transformer(weights):
            weights = transformer_to_diffusers(weights)
        return self._assign(module, "transformer", weights)

    def vae(self) -> torch.nn.Module:
        """Diffusers' AutoencoderKLFlux2."""
        from diffusers import AutoencoderKLFlux2

        dims: VaeDims = self._parts["vae"].dims
        levels = len(dims.multipliers)
        settings = {
            **self._files.settings("vae"),
            "down_block_types": ["DownEncoderBlock2D"] * levels, "up_block_types": ["UpDecoderBlock2D"] * levels,
            "block_out_channels": [dims.encoder_width * m for m in dims.multipliers],
            "layers_per_block": dims.res_blocks, "latent_channels": dims.latent_channels,
        }  # fmt: skip
        if dims.decoder_width != dims.encoder_width:
            settings["decoder_block_out_channels"] = [dims.decoder_width * m for m in dims.multipliers]  # fmt: skip
        with torch.device("meta"), _Unfilled():
            module: Any = AutoencoderKLFlux2.from_config(settings)
        weights = self._arrived("vae")
        if not is_diffusers_vae(weights):
            weights = vae_to_diffusers(weights)
        module = self._assign(module, "vae", weights)
        if self._device.type == "cuda":
            module.to(memory_format=torch.channels_last)  # cuDNN's own, no copies between layers
        return module

    def _arrived(self, name: str) -> dict[str, torch.Tensor]:
        """A part's weights on the device, in the dtype to compute in."""
        part, start = self._parts[name], time.perf_counter()
        weights = part.shipment.arrive(lambda moved: self._watch(self._before + moved, self.nbytes))
        self._before += part.shipment.nbytes
        self._watch(self._before, self.nbytes)
        part.tensors.clear()
        self.waiting += time.perf_counter() - start
        return dequantise(weights, self._dtype, part.name)

    def _assign(self, module: Any, name: str, weights: dict) -> Any:
        """Hand weights over to a module on meta, by reference."""
        part = self._parts[name]
        try:
            missing, _ = module.load_state_dict(weights, strict=False, assign=True)
        except (RuntimeError, ValueError) as error:
            raise ModelFileError(
                f"{part.name} does not fit Klein's architecture ({error}).", "Download it again."
            ) from error
        if lost := [key for key in missing if not key.endswith("num_batches_tracked")]:
            raise ModelFileError(f"{part.name} lacks {len(lost)} tensors, {lost[0]} among them.", "Download it again.")  # fmt: skip
        for owner in module.modules():  # counters that no inference reads, and no file has
            for key, buffer in owner._buffers.items():
                if buffer is not None and buffer.is_meta:
                    owner._buffers[key] = torch.zeros(buffer.shape, dtype=buffer.dtype, device=self._device)  # fmt: skip
        for identity in part.held:  # what a path pinned on the way is given back with the module
            mmap_pin.hold(identity)
            weakref.finalize(module, mmap_pin.forget, identity).atexit = False
        return module.requires_grad_(False).eval()
