"""diffusers' Flux2KleinPipeline around a model's files: built on meta, the weights assigned where they arrive."""

from __future__ import annotations

import logging
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..toolkit.architecture import (
    HEAD_DIM,
    TEXT_TAPS,
    TextEncoderDims,
    TransformerDims,
    VaeDims,
    check_match,
)
from ..toolkit.dequantise import dequantise, stored_dtype
from ..toolkit.diffusers_keys import transformer_to_diffusers, vae_to_diffusers
from ..toolkit.errors import InputError, ModelFileError
from ..toolkit.igniter import open_model, strip_prefix
from ..toolkit.keys import (
    is_diffusers_transformer,
    is_diffusers_vae,
    transformer_from_diffusers,
    vae_from_diffusers,
)
from ..toolkit.model_files import ModelFiles, find_model
from ..toolkit.paths import mmap_pin
from ..toolkit.shipment import Shipment
from ..toolkit.storage import available_memory
from ..toolkit.transfer import TransferReport
from .tokenizer import load_tokenizer

ROOM = 1.15  # times the weights must be free: a picture needs some memory, too
NEEDED_LAYERS = max(TEXT_TAPS)
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


@dataclass(frozen=True)
class _Part:
    """One part on its way."""

    name: str  # the file's, for errors
    dims: Any
    tensors: dict[str, torch.Tensor]  # as they lie in the file
    shipment: Shipment
    held: list[tuple]  # identities of its files


def load_pipeline(
    model: ModelFiles | str | Path | Sequence[str | Path] = (),
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    watch: Callable[[int, int], None] = lambda moved, total: None,
) -> tuple[Any, LoadReport]:
    """Build diffusers' pipeline from a Klein's files.

    Args:
        model: what `find_model` takes, or has found; nothing for the embedded model.
        device: where it runs; an NVIDIA GPU if there is one, else the CPU.
        dtype: of all weights. If none is given: on a GPU the transformer's own (bf16 for an fp8 file); on a CPU fp32, as
            ComfyUI computes there, unless memory is too short for it.
        watch: called several times a second with the bytes that have left, and all that will; what it raises ends the
            loading.

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
    (encoder, encoder_dims), (main, main_dims), (_, _) = (found[1:] for found in opened.values())
    check_match(main_dims, encoder_dims, model.text_encoder.name)
    dtype = dtype or _choose_dtype(device, stored_dtype(main, model.transformer.name), opened)
    _check_room(device, opened)
    parts = {}
    for part, (source, tensors, dims) in opened.items():
        held = [file.identity for file, _ in source.parts if file.identity in source.mapped]
        shipment = Shipment(source, tensors, device)
        parts[part] = _Part(getattr(model, part).name, dims, tensors, shipment, held)
    del opened, source, tensors, encoder, main
    imported = time.perf_counter()
    from diffusers import (  # as long as the weights take
        FlowMatchEulerDiscreteScheduler,
        Flux2KleinPipeline,
    )

    importing = time.perf_counter() - imported
    with torch.inference_mode(False), torch.no_grad():
        tokenizer = load_tokenizer(model)
        modules = _Modules(model, parts, device, dtype, watch)
        built = [modules.text_encoder(), modules.transformer(), modules.vae()]
    settings = model.settings("scheduler", "scheduler_config.json")
    scheduler = FlowMatchEulerDiscreteScheduler.from_config({"use_dynamic_shifting": True, **settings})  # fmt: skip
    pipeline = Flux2KleinPipeline(
        scheduler=scheduler, text_encoder=built[0], tokenizer=tokenizer, transformer=built[1], vae=built[2],
        is_distilled=bool(model.settings("", "model_index.json").get("is_distilled", True)),
    )  # fmt: skip
    transfers = [report for part in parts.values() for report in part.shipment.reports]
    seconds = time.perf_counter() - start
    return pipeline, LoadReport(
        model, modules.nbytes, seconds, importing, modules.waiting, transfers
    )


def _device(device: str | torch.device | None) -> torch.device:
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise InputError("There is no NVIDIA GPU that torch can use.", "Use the CPU: --device cpu.")  # fmt: skip
        return torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)  # fmt: skip
    return device


def _open(path: Path, read: Callable) -> tuple[Any, dict[str, torch.Tensor], Any]:
    """A file's model, the tensors of one part that are needed, and their dimensions."""
    opened = open_model(path)
    return opened, *read(opened.tensors, path.name)


def _text_encoder(state_dict: dict, name: str) -> tuple[dict[str, torch.Tensor], Any]:
    prefix = r"text_encoders\.[^.]+\.transformer\."
    state_dict = strip_prefix(state_dict, prefix, "model.embed_tokens.weight")
    dims = TextEncoderDims.of(state_dict, name)
    needed = tuple(f"model.layers.{layer}." for layer in range(NEEDED_LAYERS))
    needed += ("model.embed_tokens.",)
    return {k: v for k, v in state_dict.items() if k.startswith(needed)}, dims


def _transformer(state_dict: dict, name: str) -> tuple[dict[str, torch.Tensor], Any]:
    sign = "double_stream_modulation_img.lin.weight"
    state_dict = strip_prefix(state_dict, r"model\.diffusion_model\.", sign)
    shapes = _on_meta(state_dict)
    if is_diffusers_transformer(state_dict):
        shapes = transformer_from_diffusers(shapes)
    return state_dict, TransformerDims.of(shapes, name)


def _vae(state_dict: dict, name: str) -> tuple[dict[str, torch.Tensor], Any]:
    state_dict = strip_prefix(state_dict, r"(vae|first_stage_model)\.", "decoder.conv_in.weight")
    shapes = _on_meta(state_dict)
    if is_diffusers_vae(state_dict):
        shapes = vae_from_diffusers(shapes)
    moved = {"decoder.post_quant_conv.": "post_quant_conv.", "encoder.quant_conv.": "quant_conv."}
    for old, new in moved.items():
        shapes = {k.replace(old, new): v for k, v in shapes.items()}
    return state_dict, VaeDims.of(shapes, name)


def _on_meta(state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Shapes and dtypes alone, to be renamed at no cost."""
    return {key: tensor.to("meta") for key, tensor in state_dict.items()}


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


def _check_room(device: torch.device, opened: dict) -> None:
    """Refuse what would fail after some seconds of loading."""
    if device.type != "cuda":
        return
    needed = sum(t.nbytes for _, tensors, _ in opened.values() for t in tensors.values())
    free = torch.cuda.mem_get_info(device)[0]
    if free < needed * ROOM:
        raise InputError(
            f"The model needs {needed * ROOM / 1e9:.1f} GB on the GPU, {free / 1e9:.1f} GB are free.",
            "Close what uses the GPU, or choose fp8 files; ComfyUI with Ark's nodes runs on smaller cards.",
        )


class _Modules:
    """Builds the modules of a pipeline; each takes its weights when they have arrived."""

    def __init__(
        self, files: ModelFiles, parts: dict[str, _Part], device: torch.device, dtype: torch.dtype, watch: Callable
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
        with torch.device("meta"):
            module = Qwen3Model(config)
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
        with torch.device("meta"):
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
        with torch.device("meta"):
            module = AutoencoderKLFlux2.from_config(settings)
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

    def _assign(self, module: torch.nn.Module, name: str, weights: dict) -> torch.nn.Module:
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
