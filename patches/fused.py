"""The fused step in place of a ComfyUI model's own forward: on a clone, and only while that clone runs.

The host still makes the tokens and their coordinates; what it would do with them (`forward_orig`) is done by
`toolkit/step.py`, over the weights as they lie in the host's modules at that moment. Whatever is asked for that the step
does not know goes to the host's own forward, and the log says why, once.
"""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from ..toolkit import step
from ..toolkit.errors import InputError
from ..toolkit.fused.matrix import Plain
from ..toolkit.kernels.op import attend_flat
from ..toolkit.step import SingleBlock, Stream, Weights
from .guard import OVERRIDE

DIFFUSION_MODEL = "diffusion_model"  # the host's WrappersMP.DIFFUSION_MODEL
KEY = "ark_fused"
STORED = (
    torch.bfloat16,
    torch.float16,
    torch.float32,
)  # what weights lie in; cast where the host would
COMPUTED = (torch.bfloat16, torch.float32)
OLD_EPS = 1e-6  # of the norms of q and k where the host's module does not say
log = logging.getLogger("ark")


class Unknown(Exception):
    """Something that the step does not do; the text says what."""


def set_fused(model: Any) -> tuple[Any, str]:
    """Let a clone of a MODEL run the fused step.

    Args:
        model: the host's ModelPatcher of a FLUX.2 model; it is not changed.

    Returns:
        The clone, and a sentence that says what it does.

    Raises:
        InputError: it is no FLUX.2-Klein.
    """
    flux = model.model.diffusion_model
    if not getattr(getattr(flux, "params", None), "global_modulation", False):
        raise InputError(f"{type(flux).__name__} is not FLUX.2-Klein.", "Set engine to host.")
    clone = remove_fused(model.clone())
    said: set[str] = set()

    def fused(executor, *args, **kwargs):
        module = executor.class_obj
        own = type(module).forward_orig

        def forward(*inputs, **named):
            try:
                given = inspect.signature(own).bind(module, *inputs, **named).arguments
                return _denoise(module, **{k: v for k, v in given.items() if k != "self"})
            except Unknown as unknown:
                if str(unknown) not in said:
                    said.add(str(unknown))
                    log.warning("Ark fused: ComfyUI's own forward runs instead (%s).", unknown)
                return own(module, *inputs, **named)

        module.forward_orig = forward  # on the object, for this call
        try:
            return executor(*args, **kwargs)
        finally:
            del module.forward_orig

    clone.add_wrapper_with_key(DIFFUSION_MODEL, KEY, fused)
    return clone, "engine: fused."


def remove_fused(clone: Any) -> Any:
    """Undo `set_fused` on a clone."""
    clone.remove_wrappers_with_key(DIFFUSION_MODEL, KEY)
    return clone


def _denoise(
    flux: Any,
    img: torch.Tensor,
    img_ids: torch.Tensor,
    txt: torch.Tensor,
    txt_ids: torch.Tensor,
    timesteps: torch.Tensor,
    y: torch.Tensor | None = None,
    guidance: torch.Tensor | None = None,
    control: Any = None,
    timestep_zero_index: Any = None,
    transformer_options: dict | None = None,
    attn_mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """The host's `forward_orig` by the fused step; raises Unknown before anything is computed."""
    options = transformer_options or {}
    asked = {
        "ControlNet": control,
        "an attention mask": attn_mask,
        "references at timestep 0": timestep_zero_index,
        "guidance": guidance if flux.params.guidance_embed else None,
        "a pooled vector": flux.vector_in,
        "a norm of the text": getattr(flux, "txt_norm", None),
    }
    for what, value in asked.items():
        if value is not None:
            raise Unknown(what)
    for kind in ("patches", "patches_replace"):
        if found := [name for name, value in options.get(kind, {}).items() if value]:
            raise Unknown(f"patches of other nodes: {', '.join(found)}")
    weights = _weights(flux, img)
    ids = torch.cat((txt_ids[0], img_ids[0]))  # the same for each picture
    attend = _attend(options.get(OVERRIDE))
    return step.denoise(weights, img, txt, timesteps, step.rotary_table(ids), attend)


def _attend(override: Any) -> Callable:
    """The attention that was chosen for this model."""
    if override is None:
        return F.scaled_dot_product_attention
    name = getattr(override, "kernel", None)
    if name is None:
        raise Unknown("attention of another node")
    return functools.partial(_by_kernel, name)


def _by_kernel(name: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return attend_flat(name, q, k, v).unflatten(2, (q.shape[1], -1)).transpose(1, 2)


def _weights(flux: Any, like: torch.Tensor) -> Weights:
    """The record of a host's module, by reference; every weight must lie where the latents do."""
    if like.dtype not in COMPUTED:
        raise Unknown(f"latents in {like.dtype}")

    def tensor(layer: Any) -> torch.Tensor:
        weight = layer.scale if hasattr(layer, "scale") else layer.weight  # norms of older hosts
        if getattr(layer, "weight_function", None) or getattr(layer, "bias", None) is not None:
            raise Unknown("weights that are patched while they are used, or biases")
        if hasattr(weight, "__tensor_flatten__") or weight.dtype not in STORED:
            raise Unknown("quantised weights")
        if weight.device != like.device:
            raise Unknown(f"weights on {weight.device}, latents on {like.device}")
        return weight.to(like.dtype)

    def of(layer: Any) -> Plain:
        return Plain(tensor(layer))

    def stream(block: Any, name: str) -> Stream:
        attn, mlp = getattr(block, f"{name}_attn"), getattr(block, f"{name}_mlp")
        norms = attn.norm.query_norm, attn.norm.key_norm
        return Stream(*map(of, (attn.qkv, attn.proj, mlp[0], mlp[2])), *map(tensor, norms))

    def single(block: Any) -> SingleBlock:
        norms = block.norm.query_norm, block.norm.key_norm
        return SingleBlock(of(block.linear1), of(block.linear2), *map(tensor, norms))

    modulations = (
        flux.double_stream_modulation_txt,
        flux.double_stream_modulation_img,
        flux.single_stream_modulation,
    )
    eps = getattr(flux.single_blocks[0].norm.query_norm, "eps", OLD_EPS)
    return Weights(
        of(flux.img_in),
        of(flux.txt_in),
        (of(flux.time_in.in_layer), of(flux.time_in.out_layer)),
        *(of(modulation.lin) for modulation in modulations),
        [(stream(block, "txt"), stream(block, "img")) for block in flux.double_blocks],
        [single(block) for block in flux.single_blocks],
        of(flux.final_layer.adaLN_modulation[1]),
        of(flux.final_layer.linear),
        torch.finfo(torch.float32).eps if eps is None else eps,
    )
