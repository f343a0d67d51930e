"""The fused step in place of a diffusers transformer's forward: on the object, removable, the library untouched."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable
from typing import Any

import torch

from ..toolkit.errors import InputError
from ..toolkit.fused.matrix import Joined, Matrix, Plain
from ..toolkit.fused.runner import Runner, Unknown
from ..toolkit.sources import Sources
from ..toolkit.step_weights import SingleBlock, Stream, Weights

log = logging.getLogger("ark")


def attach_fused(transformer: Any, precision: str, kernel: str | None) -> tuple[Runner, Callable[[], None]]:  # fmt: skip
    """Let a transformer run the fused step.

    Weights are read where they lie; what is made of them (in fp8, or for latents of another dtype) is made anew when they
    have changed.

    Args:
        transformer: diffusers' `Flux2Transformer2DModel` of a Klein, on the device that it will run on.
        precision: see `Runner`.
        kernel: the attention kernel's name, None for torch's choice.

    Returns:
        What runs it, and a function that undoes it.

    Raises:
        InputError: it is no Klein, or its forward was replaced already.
    """
    config = transformer.config
    if not hasattr(transformer, "single_stream_modulation") or config.guidance_embeds:
        raise InputError(f"{type(transformer).__name__} is not FLUX.2-Klein.", "Choose another engine.")  # fmt: skip
    if "forward" in vars(transformer):
        raise InputError("This transformer's forward was replaced already.", "Remove hooks and offloading first.")  # fmt: skip
    runner = Runner(next(transformer.parameters()).device, precision)
    weights = _Record(transformer, runner)
    own = type(transformer).forward
    names = inspect.signature(own)

    def forward(*args: Any, **kwargs: Any) -> Any:
        try:
            given = dict(names.bind(transformer, *args, **kwargs).arguments)
            given.pop("self")
            in_a_class = given.pop("return_dict", True)
            sample = _denoise(weights, runner, kernel, **given)
        except Unknown as unknown:
            if str(unknown) not in runner.reasons:
                runner.reasons.add(str(unknown))
                log.warning("Ark fused: diffusers' own forward runs instead (%s).", unknown)
            return own(transformer, *args, **kwargs)
        return _output(own)(sample=sample) if in_a_class else (sample,)

    def remove() -> None:
        if vars(transformer).get("forward") is forward:
            del transformer.forward
        weights.forget()
        runner.release()

    transformer.forward = forward
    return runner, remove


def _output(own: Callable) -> type:
    """The class in which the library's forward returns its result."""
    return own.__globals__["Flux2Transformer2DModelOutput"]


class _Record:
    """A transformer's weights for the step, made again when something of the transformer, or the dtype, has changed."""

    def __init__(self, transformer: torch.nn.Module, runner: Runner):
        self._transformer, self._runner = transformer, runner
        self._sources: Sources | None = None
        self._like: tuple[torch.dtype, torch.device] | None = None
        self._made: Any = None

    def forget(self) -> None:
        self._sources, self._like, self._made = None, None, None

    def get(self, like: torch.Tensor) -> Weights:
        kind = like.dtype, like.device
        if self._sources is not None and not self._sources.same():
            self.forget()
            self._runner.release()  # copies may have been made of what is no more
        if self._sources is None or self._like != kind:
            self._made = _weights(self._transformer, self._runner, like)
            self._like, self._sources = kind, Sources([self._transformer])
        return self._made


def _denoise(
    weights: _Record,
    runner: Runner,
    kernel: str | None,
    hidden_states: torch.Tensor,
    encoder_hidden_states: torch.Tensor,
    timestep: torch.Tensor,
    img_ids: torch.Tensor,
    txt_ids: torch.Tensor,
    guidance: torch.Tensor | None = None,  # a Klein has no use for it
    **others: Any,
) -> torch.Tensor:
    """The step; raises Unknown before anything is computed."""
    if found := [name for name, value in others.items() if value]:
        raise Unknown(f"it does not know {', '.join(found)}")
    if torch.is_grad_enabled() and hidden_states.requires_grad:
        raise Unknown("it has no gradients")
    ids = torch.cat([ids[0] if ids.ndim == 3 else ids for ids in (txt_ids, img_ids)])
    timestep = timestep.to(hidden_states.dtype).expand(len(hidden_states))
    return runner.run(
        weights.get(hidden_states), hidden_states, encoder_hidden_states, ids, timestep, kernel
    )


def _weights(transformer: Any, runner: Runner, like: torch.Tensor) -> Weights:
    """The record of a transformer, by reference; its q, k and v stay apart."""

    def tensor(layer: Any) -> torch.Tensor:
        if isinstance(layer, torch.nn.Linear) and type(layer) is not torch.nn.Linear:
            raise Unknown(f"layers of {type(layer).__name__}")
        if not hasattr(layer, "weight") or hasattr(layer, "base_layer"):
            raise Unknown("LoRA adapters that are not fused into the weights")
        if getattr(layer, "bias", None) is not None:
            raise Unknown("it does not know biases")
        return layer.weight

    def plain(layer: torch.nn.Module) -> torch.Tensor:
        return runner.plain(tensor(layer), like)

    def of(layer: torch.nn.Module) -> Plain:
        return Plain(plain(layer))

    def matrix(*layers: torch.nn.Module) -> Matrix:
        return runner.matrix(like, *map(tensor, layers))

    def double(block: Any) -> tuple[Stream, Stream]:
        attn, txt, img = block.attn, block.ff_context, block.ff
        return (
            Stream(
                matrix(attn.add_q_proj, attn.add_k_proj, attn.add_v_proj),
                matrix(attn.to_add_out),
                matrix(txt.linear_in),
                matrix(txt.linear_out),
                plain(attn.norm_added_q),
                plain(attn.norm_added_k),
            ),
            Stream(
                matrix(attn.to_q, attn.to_k, attn.to_v),
                matrix(attn.to_out[0]),
                matrix(img.linear_in),
                matrix(img.linear_out),
                plain(attn.norm_q),
                plain(attn.norm_k),
            ),
        )

    def single(block: Any) -> SingleBlock:
        attn = block.attn
        matrices = matrix(attn.to_qkv_mlp_proj), matrix(attn.to_out)
        return SingleBlock(*matrices, plain(attn.norm_q), plain(attn.norm_k))

    embedder = transformer.time_guidance_embed.timestep_embedder
    scale, shift = plain(transformer.norm_out.linear).chunk(2)  # in this order here
    return Weights(
        of(transformer.x_embedder),
        of(transformer.context_embedder),
        (of(embedder.linear_1), of(embedder.linear_2)),
        of(transformer.double_stream_modulation_txt.linear),
        of(transformer.double_stream_modulation_img.linear),
        of(transformer.single_stream_modulation.linear),
        [double(block) for block in transformer.transformer_blocks],
        [single(block) for block in transformer.single_transformer_blocks],
        Joined((shift, scale)),
        of(transformer.proj_out),
        transformer.single_transformer_blocks[0].attn.norm_q.eps,
    )
