"""Runs the fused step for a model: precision, operations, attention and recordings, and what of it lies on the device."""

from __future__ import annotations

import functools
import importlib
import weakref
from collections.abc import Callable, Hashable
from typing import Any

import torch

from .. import step
from ..errors import InputError
from ..hardware import probe_hardware
from ..kernels import KERNELS
from ..kernels.op import attend_flat
from ..matrices import known_algorithms
from ..step_weights import Weights
from . import reference
from .graph import Begun, Function, Graphs
from .matrix import FP8, Fp8, Joined, Known, Matrix, Plain

PRECISIONS = ("bf16", "fp8")
STORED = (
    torch.bfloat16,
    torch.float16,
    torch.float32,
)  # what weights lie in; cast where a host would
COMPUTED = (torch.bfloat16, torch.float32)
FIRST_PICTURE = 4  # steps, before one is recorded


class Unknown(Exception):
    """Something that the step does not do; the text says what."""


class Runner:
    """What one model's fused step keeps between calls.

    Args:
        device: that the model runs on.
        precision: of the blocks' matrices, one of PRECISIONS; "bf16" takes them as they are.

    Attributes:
        device: as given.
        precision: as given.
        operations: see `reference.py`; in Triton where that runs.
        how: a sentence about them.
        graphs: recordings of the step.
        reasons: why the model's own forward ran instead.

    Raises:
        InputError: there is no such precision, or the card does not have it.
    """

    def __init__(self, device: torch.device, precision: str):
        if precision not in PRECISIONS:
            raise InputError(f"precision: {precision} is not one of {', '.join(PRECISIONS)}.", "Choose another.")  # fmt: skip
        hardware = probe_hardware(device)
        if precision == "fp8" and (0, 0) < hardware.compute_capability < (8, 9):
            raise InputError(f"{hardware.name} has no fp8 arithmetic.", "Set precision to bf16.")
        self.device, self.precision = device, precision
        self.reasons: set[str] = set()
        self.operations, self.how = operations_for(device)
        self.graphs = Graphs(after=FIRST_PICTURE)
        self._algorithms = known_algorithms(device, precision)
        if chosen := sum(
            any(algorithm for _, algorithm in known) for known in self._algorithms.values()
        ):
            self.how += f", {chosen} shapes of matrices known to be faster by another algorithm of cuBLASLt than torch's"  # fmt: skip
        self._made: dict[int, tuple[tuple[weakref.ref, ...], Any]] = {}  # by the first tensor's id

    def __str__(self) -> str:
        graphs = f"no CUDA graph ({self.graphs.why_not})" if self.graphs.why_not else f"{self.graphs.recorded} CUDA graphs"  # fmt: skip
        instead = f"; the model's own forward ran instead ({'; '.join(sorted(self.reasons))})" if self.reasons else ""  # fmt: skip
        return f"fused, {self.precision}, {graphs}{instead}"

    def run(
        self,
        weights: Weights,
        latents: torch.Tensor,
        prompt_embeds: torch.Tensor,
        ids: torch.Tensor,
        timestep: torch.Tensor,
        kernel: str | None,
        wanted_len: int | None = None,
        begun: Begun | None = None,
    ) -> torch.Tensor:
        """One step, see `step.denoise`.

        Args:
            weights: by reference.
            latents: [B, img_len, 128].
            prompt_embeds: [B, txt_len, context_dim].
            ids: [txt_len + img_len, 4] coordinates, text first.
            timestep: [B], 0 to 1.
            kernel: the attention kernel's name, None for torch's choice.
            wanted_len: see `step.denoise`.
            begun: what may be the result, from `begin`.

        Raises:
            Unknown: before anything is computed.
        """
        how = self._how(weights, kernel, wanted_len, latents.dtype)
        return self.graphs.run(*how, latents, prompt_embeds, ids, timestep, begun=begun)

    def begin(self, weights: Weights, latents: torch.Tensor, prompt_embeds: torch.Tensor, ids: torch.Tensor, timestep: torch.Tensor, kernel: str | None, wanted_len: int | None = None) -> Begun | None:  # fmt: skip
        """Begin a step that is going to be `run`, if that takes no more than to replay it."""
        how = self._how(weights, kernel, wanted_len, latents.dtype)
        return self.graphs.begin(*how, latents, prompt_embeds, ids, timestep)

    def _how(self, weights: Weights, kernel: str | None, wanted_len: int | None, dtype: torch.dtype) -> tuple[Hashable, Function]:  # fmt: skip
        """What makes a step, and a name for it."""
        attend = _attend(kernel, dtype)

        def work(*inputs: torch.Tensor) -> torch.Tensor:
            x, embeds, coordinates, times = inputs
            table = step.rotary_table(coordinates)
            return step.denoise(weights, x, embeds, times, table, attend, self.operations, wanted_len)  # fmt: skip

        return (weights.addresses, kernel, wanted_len), work

    def plain(self, weight: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """A weight as the step computes with it.

        Raises:
            Unknown: it lies elsewhere, or in a way that the step does not know.
        """
        self._check(weight, like)
        return weight if weight.dtype == like.dtype else self._keep((weight,), lambda: weight.to(like.dtype))  # fmt: skip

    def matrix(self, like: torch.Tensor, *parts: torch.Tensor) -> Matrix:
        """A block's matrix in the precision asked for, of one weight, or of several whose outputs stand side by side.

        Raises:
            Unknown: see `plain`.
        """
        if self.precision == "fp8":
            for part in parts:
                self._check(part, like)

            def made() -> Fp8:
                whole = torch.cat([part.to(like.dtype) for part in parts])
                return Fp8.of(whole, self.operations.quantise, self._known(like))

            return self._keep(parts, made)
        whole = tuple(self.plain(part, like) for part in parts)
        if len(whole) > 1:
            return Joined(whole)
        return Plain(whole[0], known=self._known(like))

    def matrix_of_file(self, like: torch.Tensor, data: torch.Tensor, scale: torch.Tensor) -> Fp8:
        """A block's matrix that is in fp8 already.

        Args:
            like: has the dtype to compute in, and the device.
            data: [out, in] float8_e4m3fn.
            scale: one number for all of it.

        Raises:
            Unknown: see `plain`.
        """
        if data.dtype != FP8 or scale.numel() != 1:
            raise Unknown(f"it does not know weights quantised as {data.dtype}")
        if data.device != like.device:
            raise Unknown(f"weights are on {data.device}")
        scales = self._keep((scale,), lambda: scale.float().reshape(1, 1).expand(1, len(data)).contiguous())  # fmt: skip
        return Fp8(data, scales, like.dtype, known=self._known(like))

    def _known(self, like: torch.Tensor) -> Known:
        """What multiplies by its matrices the fastest, see `toolkit/matrices.py`."""
        return self._algorithms if like.dtype == torch.bfloat16 else {}

    def _check(self, weight: torch.Tensor, like: torch.Tensor) -> None:
        if like.dtype not in COMPUTED:
            raise Unknown(f"it does not compute in {like.dtype}")
        if weight.device != like.device:
            raise Unknown(f"weights are on {weight.device}")
        if hasattr(weight, "__tensor_flatten__") or weight.dtype not in STORED:
            raise Unknown(f"it does not know weights of {weight.dtype}")

    def _keep(self, parts: tuple[torch.Tensor, ...], make: Callable[[], Any]) -> Any:
        """What was made of tensors before, while they are the same; recordings read it, so that it must stay."""
        made_of, made = self._made.get(id(parts[0]), ((), None))
        if made is None or any(r() is not p for r, p in zip(made_of, parts, strict=True)):
            made = make()
            self._made = {key: kept for key, kept in self._made.items() if all(r() is not None for r in kept[0])}  # fmt: skip
            self._made[id(parts[0])] = tuple(map(weakref.ref, parts)), made
        return made

    def release(self) -> None:
        """Give up everything that lies on the device."""
        self._made.clear()
        self.graphs.clear()


@functools.lru_cache
def operations_for(device: torch.device) -> tuple[Any, str]:
    """What is between the matrices, and a sentence about it: Triton's kernels where they compile and run."""
    if device.type != "cuda":
        return reference, f"operations in plain torch on {device.type}"
    try:
        fast = importlib.import_module(".fast", __package__)
        with torch.cuda.device(device):  # a Triton without a C compiler can be imported, too
            one = torch.ones(1, 64, device=device)
            fast.add_norm(one, None, one[0], 1e-6, one.dtype)
    except Exception as error:  # a Triton that is broken raises whatever it likes
        reason = (str(error) or type(error).__name__).splitlines()[0]
        return reference, f"operations in plain torch, which is slower ({reason})"
    return fast, "operations in Triton"


def choose_engine(device: torch.device) -> tuple[str, str]:
    """What a model is run by on a device if nobody says: "fused" where its kernels run, else "host"; and why."""
    operations, how = operations_for(device)
    return ("host", f"the fused engine would run its {how}") if operations is reference else ("fused", how)  # fmt: skip


def _attend(kernel: str | None, dtype: torch.dtype) -> step.Attend:
    """What computes attention."""
    if kernel is None:
        return step.TORCHS
    named = KERNELS[kernel]
    if dtype not in named.dtypes:
        raise Unknown(f"{kernel} does not take {dtype}")
    if named.attend_fp8:
        return step.Attend(named.attend_fp8, True, named.any_length)
    return step.Attend(functools.partial(_by_kernel, kernel), False, named.any_length)


def _by_kernel(name: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return attend_flat(name, q, k, v).unflatten(2, (q.shape[1], -1)).transpose(1, 2)
