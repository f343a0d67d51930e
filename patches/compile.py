"""torch.compile for the blocks of a ComfyUI model: only while this model's clone runs, and the module tree stays the host's.

One function for the double blocks and one for the single ones serve all of them, so that a Klein has two graphs to compile.
What a block needs not know (its index, the step's sigmas) is kept from it, so that nothing of that compiles it anew.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch

from ..toolkit.compile import MODES, Compiler, any_length, compiler, describe, unsuited
from ..toolkit.errors import InputError
from ..toolkit.hardware import Hardware, probe_hardware
from .guard import OVERRIDE, PLAIN

APPLY_MODEL = "apply_model"  # the host's WrappersMP.APPLY_MODEL
KEY = "ark_compile"
CHOICES = ("off", *MODES)
EAGER_PATCHES = ("attn1_patch", "attn1_output_patch")  # of other nodes, called inside a block
log = logging.getLogger("ark")


def set_compile(model: Any, mode: str) -> tuple[Any, str, Compiler | None]:
    """Let a clone of a MODEL run its blocks compiled.

    Args:
        model: the host's ModelPatcher of a FLUX.2 model; it is not changed.
        mode: "off" (cancels what was set before), or one of torch.compile's modes, see `toolkit.compile.MODES`.

    Returns:
        The clone, a sentence that says what it does, and the compiler, which counts.

    Raises:
        InputError: the mode cannot work on this model or machine; says why, and what can.
    """
    dynamic = mode != "off" and getattr(model, "is_dynamic", lambda: False)()
    # what the host would load piece by piece while it runs (dynamic VRAM) must be loaded whole
    clone = model.clone(disable_dynamic=True) if dynamic else model.clone()
    clone.remove_wrappers_with_key(APPLY_MODEL, KEY)
    if mode == "off":
        return clone, "compile: off.", None
    if mode not in CHOICES:
        raise InputError(f"compile: {mode} is not one of {', '.join(CHOICES)}.", "Choose another.")
    flux = clone.model.diffusion_model
    if not (hasattr(flux, "double_blocks") and hasattr(flux, "single_blocks")):
        raise InputError(f"{type(flux).__name__} has no blocks that Ark compiles.", "Set compile to off.")  # fmt: skip
    hardware = probe_hardware(clone.load_device)
    override = clone.model_options.get("transformer_options", {}).get(OVERRIDE)
    kernel = getattr(override, "kernel", "host")
    if problem := refusal(mode, hardware, flux, kernel):
        raise InputError(*problem)
    chosen = compiler(mode, hardware, describe(flux), kernel)

    swapped: dict[torch.nn.ModuleList, torch.nn.ModuleList] = {}  # made once, not at each step
    said = False

    def compiled(executor, *args, **kwargs):
        nonlocal said
        module = executor.class_obj.diffusion_model
        if getattr(executor.class_obj, "model_lowvram", False):
            if not said:
                log.warning("Ark compile: this model is partly off the card, so it runs uncompiled. Free some VRAM.")  # fmt: skip
            said = True
            return executor(*args, **kwargs)
        if any(isinstance(given, dict) and given.get(PLAIN) for given in (*args, *kwargs.values())):
            return executor(*args, **kwargs)
        real = {name: module._modules[name] for name in ("double_blocks", "single_blocks")}
        for blocks in real.values():
            if blocks not in swapped:
                swapped[blocks] = torch.nn.ModuleList(CompiledBlock(b, chosen) for b in blocks)
        try:
            module._modules.update({name: swapped[blocks] for name, blocks in real.items()})
            return executor(*args, **kwargs)
        finally:
            module._modules.update(real)
            chosen.keep()

    wrapper: Any = compiled
    wrapper.compiler = chosen  # for who reports
    clone.add_wrapper_with_key(APPLY_MODEL, KEY, wrapper)
    report = f"compile: {mode}, block by block, kept in {chosen.cache}."
    if dynamic:
        report += " Without dynamic VRAM: the model is loaded whole."
    return clone, report, chosen


def refusal(
    mode: str, hardware: Hardware, flux: torch.nn.Module, kernel: str
) -> tuple[str, str] | None:
    """Why a mode cannot work with a model and an attention kernel, and what can; None if it can."""
    fp8 = any(_is_quantised(weight) or weight.dtype.itemsize == 1 for weight in flux.parameters())
    if problem := unsuited(mode, hardware, kernel, fp8):
        return problem
    fixed = [m for m in flux.modules() if any(map(_is_quantised, m.parameters(recurse=False)))]
    if any(type(module)._apply is torch.nn.Module._apply for module in fixed):
        return (
            "This ComfyUI cannot move quantised weights that were compiled.",
            "Update ComfyUI, use the bf16 file, or set compile to off.",
        )
    return None


class CompiledBlock(torch.nn.Module):
    """A block of the host that runs compiled where it can.

    Args:
        block: the host's.
        compiler: compiles, and counts.
    """

    def __init__(self, block: torch.nn.Module, compiler: Compiler):
        super().__init__()
        self.block = block
        self.recorded = compiler.mode == "reduce-overhead"
        double = hasattr(block, "img_attn")
        self.run = compiler(_double if double else _single, _mark_lengths)
        self.run_rotating = compiler(_double_rotating if double else _single_rotating, _mark_lengths)  # fmt: skip

    def forward(self, *args: Any, transformer_options: dict | None = None, **kwargs: Any) -> Any:
        """As the host's block."""
        options = transformer_options or {}
        if any(name in options.get("patches", {}) for name in EAGER_PATCHES):
            return self.block(*args, transformer_options=options, **kwargs)
        lean = {OVERRIDE: options[OVERRIDE]} if OVERRIDE in options else {}
        run = self.run_rotating if hasattr(options.get(OVERRIDE), "kernel") else self.run
        result = run(self.block, *args, transformer_options=lean, **kwargs)
        if self.recorded:  # the next block's recording may write where this result lies
            return (
                result.clone()
                if isinstance(result, torch.Tensor)
                else tuple(x.clone() for x in result)
            )
        return result


def _mark_lengths(block: torch.nn.Module, *args: Any, **kwargs: Any) -> None:
    # x, img, txt: [B, seq_len, hidden_size]; pe: [1, 1, seq_len, head_dim / 2, 2, 2]
    for tensor in (*args, kwargs.get("img"), kwargs.get("txt")):
        if isinstance(tensor, torch.Tensor) and tensor.ndim == 3:
            any_length(tensor, 1)
    any_length(kwargs["pe"], 2)


def _double(block, img, txt, *args, **kwargs):
    # the host adds to its inputs in place: to copies, which the compiler then leaves out
    return block(img.clone(), txt.clone(), *args, **kwargs)


def _single(block, x, *args, **kwargs):
    return block(x.clone(), *args, **kwargs)


def _double_rotating(block, img, txt, *args, pe, transformer_options, **kwargs):
    options = _rotating(transformer_options[OVERRIDE], pe)
    return _double(block, img, txt, *args, pe=None, transformer_options=options, **kwargs)


def _single_rotating(block, x, *args, pe, transformer_options, **kwargs):
    options = _rotating(transformer_options[OVERRIDE], pe)
    return _single(block, x, *args, pe=None, transformer_options=options, **kwargs)


def _rotating(override: Callable, pe: torch.Tensor) -> dict[str, Callable]:
    """Options in which one of Ark's kernels turns q and k itself, as ComfyUI's own kernel for that keeps norms apart."""

    def rotating(func, q, k, v, *args, **kwargs):
        return override(func, _rotate(q, pe), _rotate(k, pe), v, *args, **kwargs)

    return {OVERRIDE: rotating}


def _rotate(x: torch.Tensor, pe: torch.Tensor) -> torch.Tensor:
    """Turn pairs of numbers: x [B, num_heads, seq_len, head_dim], pe [1, 1, seq_len, head_dim / 2, 2, 2] of rotations."""
    pairs = x.unflatten(-1, (-1, 2)).to(pe.dtype)
    own, other = (matrix.diagonal(dim1=-2, dim2=-1) for matrix in (pe, pe.flip(-1)))
    return (pairs * own + pairs.flip(-1) * other).flatten(-2).to(x.dtype)


def _is_quantised(weight: torch.Tensor) -> bool:
    return hasattr(weight, "__tensor_flatten__")
