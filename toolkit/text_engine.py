"""A text encoder's layers as one function, recorded as a CUDA graph, over the modules of any host that names them alike.

ComfyUI's Qwen3 and transformers' do. The host runs them itself wherever that function does not fit: on a CPU, from weights
in anything but bf16, with weights that are patched while they are used or are not all on the device, and under other
people's hooks.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from typing import Any

import torch

from .fused.graph import Graphs
from .fused.runner import Unknown, operations_for
from .hardware import probe_hardware
from .qwen3 import EPS, Layer, hidden_states, join

DEVICES = ("cuda",)
DTYPES = (torch.bfloat16,)  # in fp16 what is between the matrices may overflow
BF16 = (8, 0)  # the first compute capability that calculates in it
HOOKS = "somebody has hooks on the text encoder"
LINEARS = "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"
log = logging.getLogger("ark")


class TextEngine:
    """Runs the layers of one text encoder where they lie.

    Args:
        owner: whose forward runs instead, for the log.

    Attributes:
        lock: held while it runs, and while what it was made of changes: another thread may use it, see `layers_now`.
        graphs: recordings, one for each padded length.
        reasons: why the host ran the layers instead.
    """

    observers: str | None = None  # the host's own module whose hooks change nothing

    def __init__(self, owner: str):
        self.owner, self.graphs, self.lock = owner, Graphs(), threading.RLock()
        self.reasons: set[str] = set()
        self._layers: list[Layer] | None = None

    def weights_changed(self) -> None:
        """Give up what was made of the weights."""
        with self.lock:
            self.graphs.clear()
            self._layers = None

    def layers(self, model: Any) -> list[Layer] | None:
        """The weights of the host's module, by reference; None if the host has to run it, the log says why, once."""
        try:
            self.check(model)
            if self._layers is None:
                if any(map(self.hooked, model.layers.modules())):
                    raise Unknown(HOOKS)
                self._layers = _layers(model)
            return self._layers
        except Unknown as unknown:
            self.refuse(str(unknown))
            return None

    def layers_now(self, model: Any) -> list[Layer] | None:
        """The weights as the last run had them, for who holds the lock; None if they have changed, or never lay there."""
        try:
            self.check(model)
        except Unknown:
            return None
        return self._layers

    def refuse(self, reason: str) -> None:
        """The host has to run them; the log says why, once."""
        if reason not in self.reasons:
            self.reasons.add(reason)
            log.info("Ark text encoder: %s own forward runs (%s).", self.owner, reason)

    def check(self, model: Any) -> None:
        """Raise Unknown for what may change between two calls."""
        if any(map(self.hooked, (model, *model.layers))):
            raise Unknown(HOOKS)

    def hooked(self, module: torch.nn.Module) -> bool:
        """Whether somebody changed how a module runs."""
        return hooked(module, self.observers)

    def free_memory(self) -> None:
        """Give what nobody uses back to the device."""
        torch.cuda.empty_cache()

    def run(self, layers: list[Layer], embeds: torch.Tensor, present: torch.Tensor, taps: Sequence[int]) -> torch.Tensor:  # fmt: skip
        """See `hidden_states`."""
        operations, _ = operations_for(embeds.device)

        def work(embeds: torch.Tensor, present: torch.Tensor) -> torch.Tensor:
            return hidden_states(layers, embeds, present, taps, operations)

        with self.lock:
            try:
                return self.graphs.run(_key(layers, taps), work, embeds, present.bool())
            except torch.cuda.OutOfMemoryError as error:  # the host hears of it if it comes again
                log.warning("Ark text encoder: out of memory (%s). It runs again without its recordings.", str(error).splitlines()[0])  # fmt: skip
            self.graphs.clear()
            self.free_memory()
            return work(embeds, present.bool())

    def settled(self, layers: list[Layer], embeds: torch.Tensor, present: torch.Tensor, taps: Sequence[int]) -> bool:  # fmt: skip
        """Whether `run` would record nothing, now or later."""
        return self.graphs.settled(_key(layers, taps), embeds, present.bool())


def _key(layers: list[Layer], taps: Sequence[int]) -> tuple[int, ...]:
    return (*taps, *(layer.down.data_ptr() for layer in layers))


def hooked(module: torch.nn.Module, observers: str | None = None) -> bool:
    """Whether somebody changed how a module runs, by hooks of another Python module than `observers`."""
    hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    changed = any(getattr(hook, "__module__", None) != observers or not observers for hook in hooks)
    return changed or "forward" in vars(module)


def _layers(model: Any) -> list[Layer]:
    """The record; raises Unknown if something is not as the engine needs it."""
    found = [_layer(layer) for layer in model.layers]
    devices = {weight.device for layer in found for weight in (layer.k, layer.mlp_norm, layer.down)}
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
    return Layer(before, join(q, v), k, o, q_norm, k_norm, between, join(gate, up), down)


def _matrix(linear: Any) -> torch.Tensor:
    if hasattr(linear, "base_layer"):
        raise Unknown("it has adapters that are not fused into its weights")
    weight = _weight(linear)
    if hasattr(weight, "__tensor_flatten__") or weight.dtype not in DTYPES:
        kind = "quantised" if hasattr(weight, "__tensor_flatten__") else str(weight.dtype)
        raise Unknown(f"its weights are {kind.removeprefix('torch.')}")
    if getattr(linear, "bias", None) is not None:
        raise Unknown("it has biases")
    return weight.detach()


def _norm(norm: Any) -> torch.Tensor:
    eps = norm.eps if hasattr(norm, "eps") else norm.variance_epsilon
    if getattr(norm, "add", False) or eps != EPS:
        raise Unknown("its norms are of another kind")
    return _weight(norm).detach().float()


def _weight(module: Any) -> torch.Tensor:
    if module.weight.device.type not in DEVICES:
        raise Unknown(f"its weights are on {module.weight.device}")
    if getattr(module, "weight_function", None):
        raise Unknown("its weights are patched while they are used")
    return module.weight
