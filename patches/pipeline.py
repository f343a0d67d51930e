"""diffusers' Flux2KleinPipeline around a model's files: built on meta, the weights assigned where they arrive."""

from __future__ import annotations

import contextlib
import logging
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..toolkit.architecture import (
    TextEncoderDims,
    TransformerDims,
    VaeDims,
    check_match,
    needed_tensors,
)
from ..toolkit.dequantise import stored_dtype
from ..toolkit.errors import InputError
from ..toolkit.gpu_thread import submit
from ..toolkit.igniter import open_model, strip_prefix
from ..toolkit.imports import building
from ..toolkit.keys import (
    is_diffusers_transformer,
    is_diffusers_vae,
    transformer_from_diffusers,
    vae_from_diffusers,
)
from ..toolkit.model_files import ModelFiles, find_model
from ..toolkit.rehearsal import Rehearsal
from ..toolkit.shipment import Shipment
from ..toolkit.storage import available_memory
from ..toolkit.transfer import TransferReport
from ..toolkit.wake import wake
from .pipeline_modules import Modules, Part
from .tokenizer import load_tokenizer

ROOM = 1.15  # times the weights must be free: a picture needs some memory, too
_sender = ThreadPoolExecutor(1, "ark-send")
log = logging.getLogger("ark")


@dataclass(frozen=True)
class LoadReport:
    """What loading a pipeline took.

    Attributes:
        files: what was loaded.
        nbytes: of the weights, as they lie in the files.
        seconds: from the first header to the pipeline, diffusers' own import included.
        importing: s of it that importing diffusers and transformers took, while the weights travelled.
        waiting: s of it that nothing was done but wait for the weights.
        transfers: to the device, one a file; none for a CPU.
    """

    files: ModelFiles
    nbytes: int
    seconds: float
    importing: float
    waiting: float
    transfers: list[TransferReport] = field(default_factory=list)


def load_pipeline(
    model: ModelFiles | str | Path | Sequence[str | Path] = (),
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    watch: Callable[[int, int], None] = lambda moved, total: None,
    rehearsal: Rehearsal | None = None,
) -> tuple[Any, LoadReport]:
    """Build diffusers' pipeline from a Klein's files.

    Args:
        model: what `find_model` takes, or has found; nothing for the embedded model.
        device: where it runs; an NVIDIA GPU if there is one, else the CPU.
        dtype: of all weights. If none is given: on a GPU the transformer's own (bf16 for an fp8 file); on a CPU fp32, as
            ComfyUI computes there, unless memory is too short for it.
        watch: called several times a second with the bytes that have left, and all that will; what it raises ends the
            loading.
        rehearsal: of what is going to run on a GPU: its kernels are loaded meanwhile, if the libraries are still to be
            imported, which takes longer.

    Returns:
        The `Flux2KleinPipeline`, and what was done. Its text encoder has the 27 layers that Klein reads.

    Raises:
        ModelFileError: a file is missing, damaged or of another kind.
        InputError: there is no tokenizer, no such device, or too little memory.
    """
    start = time.perf_counter()
    device = _device(device)
    if not isinstance(model, ModelFiles):
        model = find_model([model] if isinstance(model, (str, Path)) else model)
    opened = {
        "text_encoder": _open(model.text_encoder, _text_encoder),
        "transformer": _open(model.transformer, _transformer),
        "vae": _open(model.vae, _vae),
    }
    (encoder, encoder_dims), (main, main_dims), (_, vae_dims) = (
        found[1:] for found in opened.values()
    )
    check_match(main_dims, encoder_dims, model.text_encoder.name)
    dtype = dtype or _choose_dtype(device, stored_dtype(main, model.transformer.name), opened)
    # in another thread, as what a process first asks of a GPU takes a while, and importing need not wait for it
    sending = _sender.submit(_send, model, opened, device, dtype)
    del opened, encoder, main
    time_enough = "diffusers" not in sys.modules  # importing it takes longer than the weights
    if time_enough and wake(device, dtype) and rehearsal:
        dims = main_dims, encoder_dims, vae_dims
        submit(lambda: rehearsal.run(*dims, device, dtype))
    with contextlib.ExitStack() as ended, torch.inference_mode(False), torch.no_grad(), building:
        ended.callback(_cancel, sending)  # what is still in the queue when this fails
        imported = time.perf_counter()
        from diffusers import FlowMatchEulerDiscreteScheduler, Flux2KleinPipeline  # noqa: F401 (as long as the weights take)

        importing = time.perf_counter() - imported
        parts = sending.result()
        modules = Modules(model, parts, device, dtype, watch)
        built = [modules.text_encoder(), modules.transformer(), modules.vae()]
        # last, as it holds the interpreter for a third of a second, and the threads that bring the weights need it
        tokenizer = load_tokenizer(model.tokenizer)
    pipeline = _assemble(model, tokenizer, *built)
    if not time_enough:
        wake(device, dtype)
    transfers = [report for part in parts.values() for report in part.shipment.reports]
    seconds = time.perf_counter() - start
    return pipeline, LoadReport(
        model, modules.nbytes, seconds, importing, modules.waiting, transfers
    )


def _assemble(model: ModelFiles, tokenizer: Any, text_encoder: Any, transformer: Any, vae: Any) -> Any:  # fmt: skip
    """Diffusers' pipeline of these parts, with the settings of its folder, if there is one."""
    from diffusers import FlowMatchEulerDiscreteScheduler, Flux2KleinPipeline

    settings = {"use_dynamic_shifting": True, **model.settings("scheduler", "scheduler_config.json")}  # fmt: skip
    return Flux2KleinPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler.from_config(settings), text_encoder=text_encoder,
        tokenizer=tokenizer, transformer=transformer, vae=vae,
        is_distilled=bool(model.settings("", "model_index.json").get("is_distilled", True)),
    )  # fmt: skip


def _device(device: str | torch.device | None) -> torch.device:
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise InputError("There is no NVIDIA GPU that torch can use.", "Use the CPU: --device cpu.")  # fmt: skip
        return torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)  # fmt: skip
    return device


def _send(model: ModelFiles, opened: dict, device: torch.device, dtype: torch.dtype) -> dict[str, Part]:  # fmt: skip
    """Let the weights of all parts leave, if there is room for them."""
    _check_room(device, opened, dtype)
    parts = {}
    for name, (source, tensors, dims) in opened.items():
        held = [file.identity for file, _ in source.parts if file.identity in source.mapped]
        shipment = Shipment(source, tensors, device)
        parts[name] = Part(getattr(model, name).name, dims, tensors, shipment, held)
    return parts


def _cancel(sending: Future[dict[str, Part]]) -> None:
    if sending.exception() is None:
        for part in sending.result().values():
            part.shipment.cancel()


def _open(path: Path, read: Callable) -> tuple[Any, dict[str, torch.Tensor], Any]:
    """A file's model, the tensors of one part that are needed, and their dimensions."""
    opened = open_model(path)
    return opened, *read(opened.tensors, path.name)


def _text_encoder(state_dict: dict, name: str) -> tuple[dict[str, torch.Tensor], Any]:
    prefix = r"text_encoders\.[^.]+\.transformer\."
    state_dict = strip_prefix(state_dict, prefix, "model.embed_tokens.weight")
    dims = TextEncoderDims.of(state_dict, name)
    return needed_tensors(state_dict), dims


def _transformer(state_dict: dict, name: str) -> tuple[dict[str, torch.Tensor], Any]:
    sign = "double_stream_modulation_img.lin.weight"
    state_dict = strip_prefix(state_dict, r"model\.diffusion_model\.", sign)
    shapes = state_dict
    if is_diffusers_transformer(
        state_dict
    ):  # what renaming would copy says nothing of the dimensions
        few = {k: v[:0] if "norm_out" in k else v for k, v in state_dict.items() if ".to_q." not in k}  # fmt: skip
        shapes = transformer_from_diffusers(few)
    return state_dict, TransformerDims.of(shapes, name)


def _vae(state_dict: dict, name: str) -> tuple[dict[str, torch.Tensor], Any]:
    state_dict = strip_prefix(state_dict, r"(vae|first_stage_model)\.", "decoder.conv_in.weight")
    shapes = vae_from_diffusers(state_dict) if is_diffusers_vae(state_dict) else state_dict
    moved = {"decoder.post_quant_conv.": "post_quant_conv.", "encoder.quant_conv.": "quant_conv."}
    for old, new in moved.items():
        shapes = {k.replace(old, new): v for k, v in shapes.items()}
    return state_dict, VaeDims.of(shapes, name)


def _numbers(opened: dict) -> int:
    return sum(t.numel() for _, tensors, _ in opened.values() for t in tensors.values())


def _choose_dtype(device: torch.device, stored: torch.dtype, opened: dict) -> torch.dtype:
    """The dtype if nobody has chosen one."""
    if device.type != "cpu" or stored is torch.float32:
        return stored
    needed, free = 4 * _numbers(opened), available_memory()
    if free is None or needed * ROOM < free:
        return torch.float32
    log.warning("Ark: the model runs in %s; fp32 needs %.1f GB of memory, %.1f are free.", stored, needed / 1e9, free / 1e9)  # fmt: skip
    return stored


def _check_room(device: torch.device, opened: dict, dtype: torch.dtype) -> None:
    """Refuse what would fail after some seconds of loading; parts that are cast lie there twice, one at a time."""
    if device.type != "cuda":
        return
    stored = [[t.nbytes for t in ts.values() if t.dtype != dtype] for _, ts, _ in opened.values()]
    needed = _numbers(opened) * dtype.itemsize + max(map(sum, stored))
    free = torch.cuda.mem_get_info(device)[0]
    if free < needed * ROOM:
        raise InputError(
            f"The model needs {needed * ROOM / 1e9:.1f} GB on the GPU, {free / 1e9:.1f} GB are free.",
            "Close what uses the GPU; ComfyUI with Ark's nodes runs on smaller cards, too.",
        )
