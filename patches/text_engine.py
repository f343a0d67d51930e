"""The text encoder's layers as one function, recorded as a CUDA graph, in place of the host's: its own run in fp32."""

from __future__ import annotations

from typing import Any

import torch

from ..toolkit.architecture import TEXT_TAPS
from ..toolkit.fused.graph import Graphs
from ..toolkit.qwen3 import Layer, hidden_states

DEVICES = ("cuda",)
HALF = (torch.bfloat16, torch.float16)


class TextEngine:
    """Runs the layers of one text encoder where they lie.

    Args:
        masters: of the encoder's patcher, which say when a weight has moved or changed.
    """

    def __init__(self, masters: Any):
        self.graphs = Graphs()
        self._layers: list[Layer] | None = None
        masters.watchers.add(self)

    def weights_changed(self) -> None:
        """Give up what was made of the weights."""
        self.graphs.clear()
        self._layers = None

    def layers(self, model: Any) -> list[Layer] | None:
        """The weights of the host's module, by reference; None if the host has to run it.

        That is so for weights in fp32, quantised ones, those that are patched while they are used, and where some are
        off the device.
        """
        if self._layers is None:
            found = [_layer(layer) for layer in model.layers]
            self._layers = None if None in found else found
        return self._layers

    def run(self, layers: list[Layer], embeds: torch.Tensor, present: torch.Tensor) -> torch.Tensor:
        """[B, seq_len, C] and [B, seq_len] to [B, taps, seq_len, C] fp32."""
        key = tuple(layer.down.data_ptr() for layer in layers)
        return self.graphs.run(
            key, lambda x, mask: hidden_states(layers, x, mask, TEXT_TAPS), embeds, present.bool()
        )


def _layer(layer: Any) -> Layer | None:
    attn, mlp = layer.self_attn, layer.mlp
    linears = attn.q_proj, attn.k_proj, attn.v_proj, attn.o_proj, mlp.gate_proj, mlp.up_proj, mlp.down_proj  # fmt: skip
    for linear in linears:
        weight = linear.weight
        if (
            weight.device.type not in DEVICES
            or weight.dtype not in HALF
            or hasattr(weight, "__tensor_flatten__")
            or getattr(linear, "weight_function", None)
            or getattr(linear, "bias", None) is not None
        ):
            return None
    q, k, v, o, gate, up, down = (linear.weight for linear in linears)
    norms = layer.input_layernorm, attn.q_norm, attn.k_norm, layer.post_attention_layernorm
    before, q_norm, k_norm, between = (norm.weight.float() for norm in norms)
    return Layer(before, q, k, v, o, q_norm, k_norm, between, gate, up, down)
