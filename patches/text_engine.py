"""The text encoder's layers as one function, recorded as a CUDA graph, in place of the host's, which runs in fp32.

The host runs them itself wherever that function does not fit: on a CPU, from weights in anything but bf16, with
weights that are patched while they are used or are not all on the device, under other people's hooks, and if it was
started with `--fp32-text-enc`.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import comfy.model_management
import torch
from comfy.cli_args import args

from ..toolkit.fused.graph import Graphs
from ..toolkit.fused.runner import Unknown, operations_for
from ..toolkit.hardware import probe_hardware
from ..toolkit.qwen3 import EPS, Layer, hidden_states, join

DEVICES = ("cuda",)
DTYPES = (torch.bfloat16,)  # in fp16 what is between the matrices may overflow
BF16 = (8, 0)  # the first compute capability that calculates in it
LINEARS = "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"
log = logging.getLogger("ark")


class TextEngine:
    """Runs the layers of one text encoder where they lie.

    Args:
        masters: of the encoder's patcher, which say when a weight has moved or changed; None if none ever will.

    Attributes:
        graphs: recordings, one for each padded length.
        reasons: why the host ran the layers instead.
    """

    def __init__(self, masters: Any = None):
        self.graphs = Graphs()
        self.reasons: set[str] = set()
        self._layers: list[Layer] | None = None
        if masters is not None:
            masters.watchers.add(self)

    def weights_changed(self) -> None:
        """Give up what was made of the weights."""
        self.graphs.clear()
        self._layers = None

    def layers(self, model: Any) -> list[Layer] | None:
        """The weights of the host's module, by reference; None if the host has to run it, the log says why, once."""
        try:
            if any(map(_hooked, (model, *model.layers))):
                raise Unknown("another node has hooks on the text encoder")
            if self._layers is None:
                self._layers = _layers(model)
            return self._layers
        except Unknown as unknown:
            if str(unknown) not in self.reasons:
                self.reasons.add(str(unknown))
                log.info("Ark text encoder: ComfyUI's own forward runs (%s).", unknown)
            return None

    def run(
        self, layers: list[Layer], embeds: torch.Tensor, present: torch.Tensor, taps: Sequence[int]
    ) -> torch.Tensor:
        """See `hidden_states`."""
        operations, _ = operations_for(embeds.device)

        def work(embeds: torch.Tensor, present: torch.Tensor) -> torch.Tensor:
            return hidden_states(layers, embeds, present, taps, operations)

        key = tuple(layer.down.data_ptr() for layer in layers)
        try:
            return self.graphs.run(key, work, embeds, present.bool())
        except torch.cuda.OutOfMemoryError as error:  # the host hears of it if it comes again
            log.warning("Ark text encoder: out of memory (%s). It runs again without its recordings.", str(error).splitlines()[0])  # fmt: skip
        self.graphs.clear()
        comfy.model_management.soft_empty_cache()
        return work(embeds, present.bool())


def _hooked(module: torch.nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module))


def _layers(model: Any) -> list[Layer]:
    """The record; raises Unknown if something is not as the engine needs it."""
    if args.fp32_text_enc:
        raise Unknown("--fp32-text-enc")
    if any(map(_hooked, model.layers.modules())):
        raise Unknown("another node has hooks on the text encoder")
    found = [_layer(layer) for layer in model.layers]
    devices = {weight.device for layer in found for weight in (layer.q, layer.mlp_norm, layer.down)}
    if len(devices) > 1:
        raise Unknown("its weights are on several devices")
    if (0, 0) < probe_hardware(devices.pop()).compute_capability < BF16:
        raise Unknown("this GPU does not calculate in bf16")
    return found


def _layer(layer: Any) -> Layer:
    attn, mlp = layer.self_attn, layer.mlp
    linears = (getattr(attn if hasattr(attn, name) else mlp, name) for name in LINEARS)
    q, k, v, o, gate, up, down = map(_matrix, linears)
    norms = layer.input_layernorm, attn.q_norm, attn.k_norm, layer.post_attention_layernorm
    before, q_norm, k_norm, between = map(_norm, norms)
    return Layer(before, q, k, v, o, q_norm, k_norm, between, join(gate, up), down)


def _matrix(linear: Any) -> torch.Tensor:
    weight = _weight(linear)
    if hasattr(weight, "__tensor_flatten__") or weight.dtype not in DTYPES:
        kind = "quantised" if hasattr(weight, "__tensor_flatten__") else str(weight.dtype)
        raise Unknown(f"its weights are {kind.removeprefix('torch.')}")
    if getattr(linear, "bias", None) is not None:
        raise Unknown("it has biases")
    return weight.detach()


def _norm(norm: Any) -> torch.Tensor:
    if getattr(norm, "add", False) or norm.eps != EPS:
        raise Unknown("its norms are of another kind")
    return _weight(norm).detach().float()


def _weight(module: Any) -> torch.Tensor:
    if module.weight.device.type not in DEVICES:
        raise Unknown(f"its weights are on {module.weight.device}")
    if getattr(module, "weight_function", None):
        raise Unknown("its weights are patched while they are used")
    return module.weight
