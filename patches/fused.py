"""The fused step in place of a ComfyUI model's own forward: on a clone, and only while that clone runs.

The host still makes the tokens and their coordinates; what it would do with them (`forward_orig`) is done by
`toolkit/step.py`, over the weights as they lie in the host's modules at that moment. Whatever is asked for that the step
does not know goes to the host's own forward, and the log says why, once.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import logging
import weakref
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from ..toolkit import step
from ..toolkit.errors import InputError
from ..toolkit.fused import reference
from ..toolkit.fused.graph import Graphs
from ..toolkit.fused.matrix import FP8, Fp8, Matrix, Plain
from ..toolkit.hardware import probe_hardware
from ..toolkit.kernels import KERNELS
from ..toolkit.kernels.op import attend_flat
from ..toolkit.step import SingleBlock, Stream, Weights
from .guard import OVERRIDE

DIFFUSION_MODEL = "diffusion_model"  # the host's WrappersMP.DIFFUSION_MODEL
ON_DETACH = "on_detach_after"  # the host's CallbacksMP.ON_DETACH
KEY = "ark_fused"
PRECISIONS = ("bf16", "fp8")
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


def set_fused(model: Any, precision: str = "bf16") -> tuple[Any, str]:
    """Let a clone of a MODEL run the fused step.

    Args:
        model: the host's ModelPatcher of a FLUX.2 model; it is not changed.
        precision: of the blocks' matrices, one of PRECISIONS; "bf16" takes them as they are.

    Returns:
        The clone, and a sentence that says what it does.

    Raises:
        InputError: it is no FLUX.2-Klein, or the card cannot do it.
    """
    flux = model.model.diffusion_model
    if not getattr(getattr(flux, "params", None), "global_modulation", False):
        raise InputError(f"{type(flux).__name__} is not FLUX.2-Klein.", "Set engine to host.")
    hardware = probe_hardware(model.load_device)
    if precision not in PRECISIONS:
        raise InputError(f"precision: {precision} is not one of {', '.join(PRECISIONS)}.", "Choose another.")  # fmt: skip
    if precision == "fp8" and (0, 0) < hardware.compute_capability < (8, 9):
        raise InputError(f"{hardware.name} has no fp8 arithmetic.", "Set precision to bf16.")
    clone = remove_fused(model.clone())
    operations, how = _operations(torch.device(model.load_device))
    engine = Engine(model.model, precision, operations)
    if torch.device(model.load_device).type == "cuda" and torch.cuda.get_allocator_backend() == "cudaMallocAsync":  # fmt: skip
        engine.graphs.why_not = "cudaMallocAsync does not allow it, --disable-cuda-malloc does"
        how += f" No CUDA graph: {engine.graphs.why_not}."

    def fused(executor, *args, **kwargs):
        module = executor.class_obj
        module.forward_orig = functools.partial(
            engine.forward, module
        )  # on the object, for this call
        try:
            return executor(*args, **kwargs)
        finally:
            del module.forward_orig

    fused.engine = engine  # for who reports

    def detached(patcher: Any, unpatch_all: bool) -> None:
        if unpatch_all:  # it leaves the device, and is not only followed by another clone
            engine.release()

    clone.add_wrapper_with_key(DIFFUSION_MODEL, KEY, fused)
    clone.add_callback_with_key(ON_DETACH, KEY, detached)
    return clone, f"engine: fused, {precision}, {how}"


def remove_fused(clone: Any) -> Any:
    """Undo `set_fused` on a clone."""
    clone.remove_wrappers_with_key(DIFFUSION_MODEL, KEY)
    clone.remove_callbacks_with_key(ON_DETACH, KEY)
    return clone


def _operations(device: torch.device) -> tuple[Any, str]:
    """What is between the matrices: Triton's kernels where they run."""
    if device.type != "cuda":
        return reference, f"operations in plain torch on {device.type}."
    try:
        return importlib.import_module("..toolkit.fused.fast", __package__), "operations in Triton."
    except ImportError as error:
        return reference, f"operations in plain torch, which is slower: {error}."


class Engine:
    """What one clone's fused step keeps between calls.

    Args:
        base: the host's BaseModel.

    Attributes:
        precision: of the blocks' matrices.
        operations: see `toolkit/fused/reference.py`.
        graphs: recordings of the step.
        reasons: why the host's own forward ran instead.
    """

    def __init__(self, base: Any, precision: str, operations: Any):
        self.base, self.precision, self.operations = base, precision, operations
        self._patches: Any = None  # the host's name for the set of patches that the weights have
        self.graphs, self.reasons = Graphs(), set()
        self._fp8: dict[int, tuple[weakref.ref, Fp8]] = {}  # by the weight's id

    def __str__(self) -> str:
        graphs = f"no CUDA graph ({self.graphs.why_not})" if self.graphs.why_not else f"{self.graphs.recorded} CUDA graphs"  # fmt: skip
        instead = f"; ComfyUI's own forward ran instead ({'; '.join(sorted(self.reasons))})" if self.reasons else ""  # fmt: skip
        return f"fused, {self.precision}, {graphs}{instead}"

    def forward(self, flux: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        """As the host's `forward_orig`."""
        own = type(flux).forward_orig
        try:
            given = inspect.signature(own).bind(flux, *args, **kwargs).arguments
            return self._denoise(flux, **{k: v for k, v in given.items() if k != "self"})
        except Unknown as unknown:
            if str(unknown) not in self.reasons:
                self.reasons.add(str(unknown))
                log.warning("Ark fused: ComfyUI's own forward runs instead (%s).", unknown)
            return own(flux, *args, **kwargs)

    def _denoise(
        self,
        flux: Any,
        img: torch.Tensor,
        img_ids: torch.Tensor,
        txt: torch.Tensor,
        txt_ids: torch.Tensor,
        timesteps: torch.Tensor,
        transformer_options: dict | None = None,
        guidance: torch.Tensor | None = None,
        y: Any = None,  # of models that have a pooled vector
        **others: Any,
    ) -> torch.Tensor:
        """The step; raises Unknown before anything is computed."""
        options = transformer_options or {}
        others |= {"guidance": guidance if flux.params.guidance_embed else None}
        others |= {name: getattr(flux, name, None) for name in ("vector_in", "txt_norm")}
        if found := [name for name, value in others.items() if value is not None]:
            raise Unknown(f"it does not know {', '.join(found)}")
        for kind in ("patches", "patches_replace"):
            if found := [name for name, value in options.get(kind, {}).items() if value]:
                raise Unknown(f"patches of other nodes: {', '.join(found)}")
        attend = _attend(options.get(OVERRIDE), img.dtype)
        if (patches := self.base.current_weight_patches_uuid) != self._patches:
            self.release()  # they may have been written in place
            self._patches = patches
        weights = self._weights(flux, img)
        ids = torch.cat((txt_ids[0], img_ids[0]))  # the same for each picture

        def run(img: torch.Tensor, txt: torch.Tensor, ids: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:  # fmt: skip
            table = step.rotary_table(ids)
            return step.denoise(weights, img, txt, timesteps, table, attend, self.operations)

        key = (weights.addresses(), getattr(options.get(OVERRIDE), "kernel", None))
        return self.graphs.run(key, run, img, txt, ids, timesteps)

    def _weights(self, flux: Any, like: torch.Tensor) -> Weights:
        """The record of a host's module, by reference; every weight must lie where the latents do."""
        if like.dtype not in COMPUTED:
            raise Unknown(f"it does not compute in {like.dtype}")

        def tensor(layer: Any) -> torch.Tensor:
            weight = (
                layer.scale if hasattr(layer, "scale") else layer.weight
            )  # norms of older hosts
            if getattr(layer, "weight_function", None):
                raise Unknown("weights are patched while they are used")
            if getattr(layer, "bias", None) is not None:
                raise Unknown("it does not know biases")
            if weight.device != like.device:
                raise Unknown(f"weights are on {weight.device}")
            return weight

        def plain(layer: Any) -> torch.Tensor:
            weight = tensor(layer)
            if hasattr(weight, "__tensor_flatten__") or weight.dtype not in STORED:
                raise Unknown(f"it does not know weights of {weight.dtype}")
            return weight.to(like.dtype)

        def of(layer: Any) -> Plain:
            return Plain(plain(layer))

        def matrix(layer: Any) -> Matrix:
            weight = tensor(layer)
            if hasattr(weight, "_qdata"):
                return _fp8_of_the_file(weight, like.dtype)
            return self._quantised(weight, like.dtype) if self.precision == "fp8" else of(layer)

        def stream(block: Any, name: str) -> Stream:
            attn, mlp = getattr(block, f"{name}_attn"), getattr(block, f"{name}_mlp")
            norms = attn.norm.query_norm, attn.norm.key_norm
            return Stream(*map(matrix, (attn.qkv, attn.proj, mlp[0], mlp[2])), *map(plain, norms))

        def single(block: Any) -> SingleBlock:
            norms = block.norm.query_norm, block.norm.key_norm
            return SingleBlock(matrix(block.linear1), matrix(block.linear2), *map(plain, norms))

        modulations = flux.double_stream_modulation_txt, flux.double_stream_modulation_img, flux.single_stream_modulation  # fmt: skip
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

    def _quantised(self, weight: torch.Tensor, dtype: torch.dtype) -> Fp8:
        """A weight in fp8, made once for each set of patches."""
        known = self._fp8.get(id(weight))
        if known is None or known[0]() is not weight:
            known = weakref.ref(weight), Fp8.of(weight.to(dtype), self.operations.quantise)
            self._fp8[id(weight)] = known
        return known[1]

    def release(self) -> None:
        """Give up everything that lies on the device."""
        self._fp8.clear()
        self.graphs.clear()


def _fp8_of_the_file(weight: Any, dtype: torch.dtype) -> Fp8:
    """A weight that the host keeps in fp8, with one scale for all of it, by reference."""
    params = getattr(weight, "_params", None)
    scale = getattr(params, "scale", None) if params is not None else weight._layout_params["scale"]
    if weight._qdata.dtype != FP8 or not isinstance(scale, torch.Tensor) or scale.numel() != 1:
        raise Unknown(f"it does not know weights quantised as {weight._qdata.dtype}")
    outputs = weight._qdata.shape[0]
    return Fp8(weight._qdata, scale.float().reshape(1, 1).expand(1, outputs).contiguous(), dtype)


def _attend(override: Any, dtype: torch.dtype) -> Callable:
    """The attention that was chosen for this model."""
    if override is None:
        return F.scaled_dot_product_attention
    name = getattr(override, "kernel", None)
    if name is None:
        raise Unknown("attention of another node")
    if dtype not in KERNELS[name].dtypes:
        raise Unknown(f"{name} does not take {dtype}")
    return functools.partial(_by_kernel, name)


def _by_kernel(name: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return attend_flat(name, q, k, v).unflatten(2, (q.shape[1], -1)).transpose(1, 2)
