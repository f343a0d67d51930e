"""The fused step in place of a ComfyUI model's own forward: on a clone, and only while that clone runs.

The host still makes the tokens and their coordinates; what it would do with them (`forward_orig`) is done by
`toolkit/step.py`, over the weights as they lie in the host's modules at that moment. Whatever is asked for that the step
does not know goes to the host's own forward, and the log says why, once.
"""

from __future__ import annotations

import functools
import inspect
import logging
import math
from typing import Any

import comfy.model_management
import torch

from ..toolkit.errors import InputError
from ..toolkit.fused.matrix import Matrix, Plain
from ..toolkit.fused.runner import COMPUTED, PRECISIONS, Runner, Unknown, choose_engine
from ..toolkit.rehearsal import rehearse_step
from ..toolkit.step_weights import SingleBlock, Stream, Weights
from .first_step import FirstStep
from .guard import OVERRIDE, PLAIN, add_guard, is_finite
from .warmup import warm_up

__all__ = ["PRECISIONS", "engine_of", "remove_fused", "set_fused"]
DIFFUSION_MODEL = "diffusion_model"  # the host's WrappersMP.DIFFUSION_MODEL
FORWARD = "forward_orig"  # the host's method that takes tokens
ON_DETACH = "on_detach_after"  # the host's CallbacksMP.ON_DETACH
KEY = "ark_fused"
OLD_EPS = 1e-6  # of the norms of q and k where the host's module does not say
log = logging.getLogger("ark")


def set_fused(model: Any, precision: str = "bf16") -> tuple[Any, str]:
    """Let a clone of a MODEL run the fused step.

    Args:
        model: the host's ModelPatcher of a FLUX.2 model; it is not changed.
        precision: see `Runner`.

    Returns:
        The clone, and a sentence that says what it does.

    Raises:
        InputError: it is no FLUX.2-Klein, or the card cannot do it.
    """
    flux = model.model.diffusion_model
    if not getattr(getattr(flux, "params", None), "global_modulation", False):
        raise InputError(f"{type(flux).__name__} is not FLUX.2-Klein.", "Set engine to host.")
    engine = Engine(model.model, Runner(torch.device(model.load_device), precision))
    clone = remove_fused(model.clone())

    def fused(executor, *args, **kwargs):
        module, x = executor.class_obj, args[0] if args else kwargs["x"]
        picture = math.prod(-(-side // module.patch_size) for side in x.shape[2:])
        before = vars(module).pop(FORWARD, None)
        # for this call
        setattr(module, FORWARD, functools.partial(engine.forward, module, picture))
        try:
            return executor(*args, **kwargs)
        finally:
            delattr(module, FORWARD)
            engine.guard_host_forward(module, before)

    def detached(patcher: Any, unpatch_all: bool) -> None:
        if unpatch_all:  # it leaves the device, and is not only followed by another clone
            engine.weights_changed()

    wrapper: Any = fused
    wrapper.engine = engine  # for who reports
    clone.add_wrapper_with_key(DIFFUSION_MODEL, KEY, wrapper)
    clone.add_callback_with_key(ON_DETACH, KEY, detached)
    override = clone.model_options.get("transformer_options", {}).get(OVERRIDE)
    kernel = getattr(override, "kernel", None)
    add_guard(clone, f"{kernel} in the fused engine" if kernel else "the fused engine")
    engine.warm_up(kernel)
    why_not = engine.runner.graphs.why_not
    graphs = f", no CUDA graph ({why_not})" if why_not else ""
    return clone, f"engine: fused, {precision}, {engine.runner.how}{graphs}."


def engine_of(model: Any, compiled: bool, precision: str) -> tuple[str, str]:
    """The engine that a MODEL gets if nobody says, "fused" or "host", and why.

    Args:
        model: the host's ModelPatcher of a FLUX.2 model.
        compiled: whether its blocks are.
        precision: that was asked for, see `Runner`.
    """
    base, flux = model.model, model.model.diffusion_model
    if compiled:
        return "host", "its blocks are compiled"
    if precision != "bf16":
        return "fused", f"{precision} is its"
    if not getattr(getattr(flux, "params", None), "global_modulation", False):
        return "host", f"{type(flux).__name__} is not FLUX.2-Klein"
    if (dtype := base.manual_cast_dtype or base.get_dtype()) not in COMPUTED:
        return "host", f"the fused engine does not compute in {dtype}"
    return choose_engine(torch.device(model.load_device))


def engine_on(model: Any) -> Engine | None:
    """The engine that a MODEL has, None if it has none."""
    wrappers = model.get_wrappers(DIFFUSION_MODEL, KEY)
    return wrappers[0].engine if wrappers else None


def remove_fused(clone: Any) -> Any:
    """Undo `set_fused` on a clone."""
    clone.remove_wrappers_with_key(DIFFUSION_MODEL, KEY)
    clone.remove_callbacks_with_key(ON_DETACH, KEY)
    return clone


class Engine:
    """The step of one clone.

    Args:
        base: the host's BaseModel.
        runner: runs it.

    Attributes:
        form: what its last run was given, see `stay.py`.
        first: begins the first step of its runs.
    """

    def __init__(self, base: Any, runner: Runner):
        self.base, self.runner = base, runner
        self.masters = getattr(base, "ark_masters", None)  # of models that Ark loaded
        if self.masters:
            self.masters.watchers.add(self)
        self.form: Any = None
        self.first = FirstStep(self)
        self._patches: Any = None  # the host's name for the set of patches that the weights have
        self._made: Weights | None = None  # the record, of masters that say when it no longer holds

    def weights_changed(self) -> None:
        """Give up what was made of the weights: they lie elsewhere now, or are others."""
        self.runner.release()
        self.first.forget()
        self._made = None

    def forward(self, flux: Any, picture: int, *args: Any, **kwargs: Any) -> torch.Tensor:
        """As the host's `forward_orig`, whose caller reads the first tokens only: as many as the picture has."""
        own = type(flux).forward_orig
        given = dict(_signature(own).bind(flux, *args, **kwargs).arguments)
        given.pop("self")
        try:
            try:
                return self._denoise(flux, picture, **given)
            except torch.cuda.OutOfMemoryError as error:  # the host hears of it if it comes again
                log.warning("Ark fused: out of memory (%s). The step is run again without its recordings.", str(error).splitlines()[0])  # fmt: skip
            self.runner.graphs.clear()
            comfy.model_management.soft_empty_cache()
            return self._denoise(flux, picture, **given)
        except Unknown as unknown:
            if str(unknown) not in self.runner.reasons:
                self.runner.reasons.add(str(unknown))
                log.warning("Ark fused: ComfyUI's own forward runs instead (%s).", unknown)
            self.bring_back()
            return own(flux, *args, **kwargs)

    def bring_back(self) -> None:
        """Let the model's own weights lie on the device again, if they left it."""
        if self.masters and self.masters.released:
            self.weights_changed()  # there may not be room for both
            self.masters.bring_back(self.base, self.runner.device)

    def guard_host_forward(self, flux: Any, before: Any) -> None:
        """While the model's own weights are away, its own forward has them brought back first.

        Args:
            flux: the host's module.
            before: what another engine has set there.
        """
        if not (self.masters and self.masters.released):
            return
        masters, base, device = self.masters, self.base, self.runner.device

        @torch.compiler.disable
        def forward(*args: Any, **kwargs: Any) -> torch.Tensor:
            masters.changed()
            masters.bring_back(base, device)  # stays until that has worked
            delattr(flux, FORWARD)
            return getattr(flux, FORWARD)(*args, **kwargs)

        setattr(flux, FORWARD, before or forward)

    def _denoise(
        self,
        flux: Any,
        picture: int,
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
        if options.get(PLAIN):
            raise Unknown("a result was not finite")
        others |= {"guidance": guidance if flux.params.guidance_embed else None}
        others |= {name: getattr(flux, name, None) for name in ("vector_in", "txt_norm")}
        if found := [name for name, value in others.items() if value is not None]:
            raise Unknown(f"it does not know {', '.join(found)}")
        for kind in ("patches", "patches_replace"):
            if found := [name for name, value in options.get(kind, {}).items() if value]:
                raise Unknown(f"patches of other nodes: {', '.join(found)}")
        override = options.get(OVERRIDE)
        kernel = getattr(override, "kernel", None)
        if override is not None and kernel is None:
            raise Unknown("attention of another node")
        if (patches := self.base.current_weight_patches_uuid) != self._patches:
            self.weights_changed()  # they may have been written in place
            self._patches = patches
        ids = torch.cat((txt_ids[0], img_ids[0]))  # the same for each picture
        call = self.record(flux, img), img, txt, ids, timesteps, kernel, picture
        return self.runner.run(*call, begun=self.first.asked(*call))

    def unchanged(self, weights: Weights | None) -> bool:
        """Whether a run would be given this record again, for all that is known without it."""
        return (
            self._made is weights is not None
            and self.base.current_weight_patches_uuid == self._patches
        )

    def record(self, flux: Any, like: torch.Tensor) -> Weights:
        """The weights; of a model that Ark loaded, until they move or change; what fp8 copies were made of leaves the device then.

        Args:
            flux: the host's module.
            like: has the dtype to compute in, and the device.

        Raises:
            Unknown: something of them is not what the step knows.
        """
        if self._made is not None and self._made.img_in.weight.dtype == like.dtype:
            return self._made
        self.bring_back()
        copies: dict[torch.nn.Module, Matrix] = {}
        weights = self.weights(flux, like, copies=copies)
        if not self.masters or self.base.model_lowvram:
            return weights
        if self.runner.precision == "fp8":
            names = [n for n, m in flux.named_modules() if m in copies and not hasattr(m.weight, "_qdata")]  # fmt: skip
            self.masters.release(self.base, [f"{DIFFUSION_MODEL}.{name}.weight" for name in names])
            weights = self.weights(flux, like, copies=copies)  # the rest has moved
        self._made = weights
        return weights

    def warm_up(self, kernel: str | None) -> None:
        """Let one block of each kind run in the background, and what looks at the latents before and after the steps."""
        flux, device = self.base.diffusion_model, self.runner.device
        dtype = self.base.manual_cast_dtype or self.base.get_dtype()
        if dtype not in COMPUTED:
            return
        fp8_file = hasattr(flux.single_blocks[0].linear1.weight, "_qdata")
        precision = "fp8" if fp8_file else self.runner.precision
        widths = flux.hidden_size, flux.params.context_in_dim

        def run() -> None:
            found = rehearse_step(*widths, device, dtype, precision, kernel)
            is_finite(found.float())
            bool(torch.count_nonzero(found.float()) > 0)  # the host: whether there is a picture

        warm_up("fused engine", (widths, dtype, precision, kernel), device, run)

    def weights(
        self,
        flux: Any,
        like: torch.Tensor,
        copies: dict[torch.nn.Module, Matrix] | None = None,
    ) -> Weights:
        """The record of a host's module, by reference; every weight must lie where the latents do.

        Args:
            flux: the module.
            like: has the dtype to compute in, and the device.
            copies: the blocks' matrices by their layers; those that it has are taken, the others added.
        """
        copies = {} if copies is None else copies

        def tensor(layer: Any) -> torch.Tensor:
            if getattr(layer, "weight_function", None):
                raise Unknown("weights are patched while they are used")
            if getattr(layer, "bias", None) is not None:
                raise Unknown("it does not know biases")
            # norms of older hosts have a scale
            return layer.scale if "scale" in layer._parameters else layer.weight

        def plain(layer: Any) -> torch.Tensor:
            return self.runner.plain(tensor(layer), like)

        def of(layer: Any) -> Plain:
            return Plain(plain(layer))

        def matrix(layer: Any) -> Matrix:
            if layer not in copies:
                weight = tensor(layer)
                of_file = hasattr(weight, "_qdata")
                copies[layer] = self.runner.matrix_of_file(like, *_quantised(weight)) if of_file else self.runner.matrix(like, weight)  # fmt: skip
            return copies[layer]

        def stream(block: Any, name: str) -> Stream:
            attn, mlp = getattr(block, f"{name}_attn"), getattr(block, f"{name}_mlp")
            norms = attn.norm.query_norm, attn.norm.key_norm
            qkv, proj, mlp_in, mlp_out = map(matrix, (attn.qkv, attn.proj, mlp[0], mlp[2]))
            return Stream(qkv, proj, mlp_in, mlp_out, *map(plain, norms))

        def single(block: Any) -> SingleBlock:
            norms = block.norm.query_norm, block.norm.key_norm
            return SingleBlock(matrix(block.linear1), matrix(block.linear2), *map(plain, norms))

        eps = getattr(flux.single_blocks[0].norm.query_norm, "eps", OLD_EPS)
        return Weights(
            of(flux.img_in),
            of(flux.txt_in),
            (of(flux.time_in.in_layer), of(flux.time_in.out_layer)),
            of(flux.double_stream_modulation_txt.lin),
            of(flux.double_stream_modulation_img.lin),
            of(flux.single_stream_modulation.lin),
            [(stream(block, "txt"), stream(block, "img")) for block in flux.double_blocks],
            [single(block) for block in flux.single_blocks],
            of(flux.final_layer.adaLN_modulation[1]),
            of(flux.final_layer.linear),
            torch.finfo(torch.float32).eps if eps is None else eps,
        )


@functools.lru_cache
def _signature(forward: Any) -> inspect.Signature:
    return inspect.signature(forward)


def _quantised(weight: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Data and scale of a weight that the host keeps in fp8."""
    params = getattr(weight, "_params", None)
    scale = getattr(params, "scale", None) if params is not None else weight._layout_params["scale"]
    if not isinstance(scale, torch.Tensor):
        raise Unknown(f"it does not know weights quantised as {weight._qdata.dtype}")
    return weight._qdata, scale
