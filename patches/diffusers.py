"""What diffusers' transformer and pipeline run on instead of their own code: on the objects, removable, the library untouched."""

from __future__ import annotations

import functools
import logging
import types
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from ..toolkit.architecture import HEAD_DIM, USUAL_HEADS, USUAL_TOKENS
from ..toolkit.combustion import select_attention_kernel
from ..toolkit.compile import MODES, Compiler, any_length, compiler, describe
from ..toolkit.errors import InputError
from ..toolkit.fused.runner import PRECISIONS, Runner
from ..toolkit.hardware import probe_hardware
from ..toolkit.kernels import KERNELS
from ..toolkit.kernels.op import attend_flat
from ..toolkit.matrices import choose_algorithms, usual_shapes
from .fused_diffusers import attach_fused
from .set_up import attach_set_up
from .text_diffusers import attach_text_encoder
from .vae_diffusers import attach_vae

DISPATCH = "dispatch_attention_fn"  # what diffusers' processors call, by this name
Result = TypeVar("Result")
log = logging.getLogger("ark")


class Combustion:
    """What was set on a transformer; `remove` takes it off again. Also a context manager.

    Attributes:
        report: which kernel, why, and how the blocks are compiled.
        compiler: counts what is compiled; None if nothing is.
        runner: runs the fused engine; None if the library's forward runs.
        engines: of the text encoder and the VAE, by name; their `reasons` say why the library ran them instead.
    """

    def __init__(self, transformer: torch.nn.Module):
        self.report = ""
        self.compiler: Compiler | None = None
        self.runner: Runner | None = None
        self.engines: dict[str, Any] = {}
        self._detach: list[Callable[[], None]] = []
        self._transformer = transformer
        self._processors: dict[str, Any] = {}

    def run(self, call: Callable[[], Result]) -> Result:
        """Call what uses the transformer, as a pipeline.

        If the transformer gives numbers that are not finite on code of Ark's, all is called once more on diffusers' own,
        which stays from then on. One look at the end, so no step waits.
        """
        looks: list[torch.Tensor] = []  # each 0-dim, on the device

        def look(module: torch.nn.Module, args: Any, output: Any) -> None:
            looks.append(torch.isfinite(output[0]).all())

        handle = self._transformer.register_forward_hook(look)
        try:
            result = call()
        finally:
            handle.remove()
        ours = self._processors or self._detach
        if not ours or not looks or bool(torch.stack(looks).all()):
            return result
        self._restore_attention()
        log.warning(
            "Ark: numbers that are not finite. The run was repeated on diffusers' own code, which is used from now on. "
            "Choose another kernel, engine or precision."
        )
        return call()

    def _restore_attention(self) -> None:
        for name, processor in self._processors.items():
            self._transformer.get_submodule(name).processor = processor
        self._processors.clear()
        while self._detach:
            self._detach.pop()()

    def remove(self) -> None:
        """Restore the library's attention, forward and uncompiled blocks; harmless when done twice."""
        self._restore_attention()
        if self.compiler:
            self.compiler.keep()
            for block in _repeated(self._transformer):
                block._compiled_call_impl = None
            self.compiler = None

    def __enter__(self) -> Combustion:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()


def ignite(
    transformer: torch.nn.Module,
    attention: str = "auto",
    compile: str = "off",
    engine: str = "diffusers",
    precision: str = "bf16",
) -> Combustion:
    """Give a diffusers transformer an attention kernel, and let its blocks run compiled.

    Args:
        transformer: a FLUX.2 transformer of diffusers, on the device that it will run on, or a pipeline that has one.
            If the step is fused or compiled, a pipeline's text encoder and VAE run in Ark's engines, where those fit.
        attention: "auto", a kernel's name, or "none" for diffusers' own.
        compile: "off", or one of torch.compile's modes, see `toolkit.compile.MODES`.
        engine: "diffusers" for the library's own forward, "fused" for Ark's step.
        precision: of the fused engine, see `toolkit.fused.runner.PRECISIONS`.

    Returns:
        What was set; keep it to remove it.

    Raises:
        KernelUnavailable: a kernel was named that cannot run here.
        InputError: the mode is none, or the transformer has no repeated blocks.
    """
    if compile not in ("off", *MODES):
        raise InputError(f"compile: {compile} is not one of off, {', '.join(MODES)}.", "Choose another.")  # fmt: skip
    if engine not in ("diffusers", "fused"):
        raise InputError(f"engine: {engine} is not one of diffusers, fused.", "Choose another.")
    if engine == "fused" and compile != "off":
        raise InputError("The fused engine has nothing to compile.", "Set compile to off.")
    if engine == "diffusers" and precision != "bf16":
        raise InputError(f"{precision} is a precision of the fused engine.", "Set engine to fused.")
    pipeline = None if isinstance(transformer, torch.nn.Module) else transformer
    transformer = pipeline.transformer if pipeline else transformer
    set_on = Combustion(transformer)
    weight = next(transformer.parameters())
    hardware, kernel = probe_hardware(weight.device), None
    heads = getattr(transformer.config, "num_attention_heads", USUAL_HEADS)
    if attention != "none":
        shape = (1, heads, USUAL_TOKENS, HEAD_DIM)
        kernel, set_on.report = select_attention_kernel(attention, hardware, weight.device, shape, weight.dtype)  # fmt: skip
    if engine == "fused":
        if precision in PRECISIONS and weight.dtype is torch.bfloat16:
            choose_algorithms(weight.device, usual_shapes(heads * HEAD_DIM, (0,)), precision)
        set_on.runner, detach = attach_fused(transformer, precision, kernel.name if kernel else None)  # fmt: skip
        set_on._detach.append(detach)
        set_on.report += f"\nengine: fused, {precision}, {set_on.runner.how}."
    elif kernel:
        for name, module in transformer.named_modules():
            processor = getattr(module, "processor", None)
            if processor is not None and DISPATCH in type(processor).__call__.__code__.co_names:
                set_on._processors[name] = processor
                module.processor = _with_kernel(processor, kernel.name)
    if compile != "off":
        if not _repeated(transformer):
            raise InputError(f"{type(transformer).__name__} names no repeated blocks.", "Set compile to off.")  # fmt: skip
        set_on.compiler = compiler(compile, hardware, describe(transformer), kernel.name if kernel else "diffusers")  # fmt: skip
        compile_blocks: Any = transformer.compile_repeated_blocks
        compile_blocks(backend=set_on.compiler.backend)
        for block in _repeated(transformer):
            block._compiled_call_impl = _for_any_length(block._compiled_call_impl)
        set_on.report += f"\ncompile: {compile}, block by block."
    if pipeline and (engine == "fused" or compile != "off"):
        _attach_engines(pipeline, set_on)
    log.info("Ark attention %s", set_on.report)
    return set_on


def _attach_engines(pipeline: Any, set_on: Combustion) -> None:
    """Let a pipeline's text encoder and VAE run in Ark's engines, or say why not."""
    set_on._detach.append(attach_set_up(pipeline))
    found: dict[str, tuple[Any, Any]] = {
        "text encoder": attach_text_encoder(pipeline),
        "VAE": attach_vae(pipeline.vae),
    }
    for name, (engine, detach) in found.items():
        set_on.engines[name] = engine
        set_on._detach.append(detach)
        why_not = f"the library's own ({'; '.join(sorted(engine.reasons))})"
        set_on.report += f"\n{name}: {why_not if engine.reasons else 'Ark'}."


def _repeated(transformer: torch.nn.Module) -> list[Any]:
    """The blocks that diffusers itself compiles one by one."""
    names = getattr(transformer, "_repeated_blocks", None) or ()
    return [module for module in transformer.modules() if type(module).__name__ in names]


def _for_any_length(call: Callable) -> Callable:
    """A compiled block that serves every length of text and image."""

    def block(*args: Any, **kwargs: Any) -> Any:
        # hidden_states, encoder_hidden_states: [B, seq_len, inner_dim]; image_rotary_emb: two of [seq_len, head_dim]
        for name in ("hidden_states", "encoder_hidden_states"):
            if kwargs.get(name) is not None:
                any_length(kwargs[name], 1)
        for table in kwargs.get("image_rotary_emb") or ():
            any_length(table, 0)
        return call(*args, **kwargs)

    return block


def _with_kernel(processor: Any, kernel: str) -> Any:
    """A copy of a processor that runs the same code, with attention by a kernel."""
    own: Any = type(processor)
    kind: Any = _processor_class(own, kernel)
    made = kind.__new__(kind)
    made.__dict__.update(processor.__dict__)
    return made


@functools.lru_cache
def _processor_class(kind: Any, kernel: str) -> type:
    """A processor's class whose own code finds another function under the dispatcher's name."""
    own = kind.__call__
    names = {**own.__globals__, DISPATCH: _dispatcher(own.__globals__[DISPATCH], kernel)}
    del names["__name__"]  # torch.compile would look the names up in the library's module
    call = types.FunctionType(own.__code__, names, own.__name__, own.__defaults__, own.__closure__)
    call.__kwdefaults__ = own.__kwdefaults__
    return type(f"Ark{kind.__name__}", (kind,), {"__call__": call})


def _dispatcher(own: Callable, name: str) -> Callable:
    """Diffusers' dispatcher for what the kernel was built for; all else goes to diffusers' own."""
    kernel = KERNELS[name]

    def dispatch(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        **options: Any,
    ) -> torch.Tensor:
        # query, key, value: [B, seq_len, heads, head_dim]
        fits = (
            attn_mask is None
            and options.get("parallel_config") is None
            and query.shape[2] == key.shape[2]
            and query.dtype in kernel.dtypes
            and any(query.shape[3] == size for size in kernel.head_dims)
        )
        if not fits:
            return own(query, key, value, attn_mask=attn_mask, **options)
        out = attend_flat(name, *(x.transpose(1, 2) for x in (query, key, value)))
        return out.unflatten(2, (query.shape[2], query.shape[3]))

    return dispatch
