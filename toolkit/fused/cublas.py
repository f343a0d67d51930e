"""Matrix products by a chosen algorithm of cuBLASLt, the library behind torch's own: torch takes the first one it is offered.

What it is offered differs in more than speed on a cool card: one that is held back by its power limit does as much as its
watts allow, and there the tiles that move fewer bytes are the faster ones (`toolkit/matrices.py` measures that).

Source: the C interface of cuBLASLt, cublasLt.h of CUDA 12 and 13.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import sys
import weakref
from typing import Any

import torch

OFFERED = 8  # algorithms that are asked for
WORKSPACE = 1 << 16  # bytes that one may take: enough to count tiles, not for parts of a result
# of cublasLt.h: cudaDataType, cublasComputeType_t, cublasLtMatmulDescAttributes_t, cublasLtMatmulPreferenceAttributes_t
BF16, FP32, COMPUTE_FP32 = 14, 0, 68
TRANSPOSE_FIRST = 3
MOST_WORKSPACE = 1
MOST_KEPT = 256  # forms of matrices whose descriptions are kept
Form = tuple[int, int, int]
_Pointer = ctypes.c_void_p
log = logging.getLogger("ark")


class _Algorithm(ctypes.Structure):
    _fields_ = [("data", ctypes.c_uint64 * 8)]


class _Offer(ctypes.Structure):
    _fields_ = [
        ("algorithm", _Algorithm),
        ("workspace", ctypes.c_size_t),
        ("state", ctypes.c_int),
        ("waves", ctypes.c_float),
        ("reserved", ctypes.c_int * 4),
    ]


class _Library:
    """cuBLASLt as torch has loaded it, and one handle a device."""

    def __init__(self) -> None:
        major = (torch.version.cuda or "0").partition(".")[0]
        name = f"cublasLt64_{major}.dll" if sys.platform == "win32" else f"libcublasLt.so.{major}"
        self._functions = ctypes.CDLL(name)  # by its name only: the one that is there
        self._functions.cublasLtGetVersion.restype = ctypes.c_size_t
        self.version: int = self._functions.cublasLtGetVersion()
        self._handles: dict[int, _Pointer] = {}

    def __call__(self, name: str, *given: Any) -> None:
        status = getattr(self._functions, f"cublasLt{name}")(*given)
        if status:
            raise RuntimeError(f"cublasLt{name} returned {status}")

    def make(self, kind: str, *given: Any) -> _Pointer:
        """Create what functions of the library take."""
        made = _Pointer()
        self(f"{kind}Create", ctypes.byref(made), *given)
        return made

    def handle(self, device: torch.device) -> _Pointer:
        """Of a device that is the current one."""
        index = device.index or 0
        if index not in self._handles:
            self._handles[index] = self.make("")
        return self._handles[index]


@functools.lru_cache
def library() -> _Library | str:
    """cuBLASLt, or why it cannot be used."""
    if torch.version.cuda is None:
        return "this torch has no CUDA"
    try:
        return _Library()
    except (OSError, AttributeError, RuntimeError) as error:
        return f"cuBLASLt cannot be called ({error})"


class Product:
    """`x @ weight.T` of matrices in bf16 that lie in one way.

    Args:
        x: rows (count), columns (K), and the step from one row to the next.
        weight: likewise, N and K.
        out: likewise, count and N.

    Raises:
        RuntimeError: cuBLASLt cannot be called, or does not know such matrices.
    """

    def __init__(self, x: Form, weight: Form, out: Form):
        found = library()
        if isinstance(found, str):
            raise RuntimeError(found)
        self._lt = found
        self._made: list[tuple[str, _Pointer]] = []
        weakref.finalize(self, _destroy, found, self._made).atexit = False
        self._how = self._keep("MatmulDesc", COMPUTE_FP32, FP32)
        transpose = ctypes.c_int32(1)
        found("MatmulDescSetAttribute", self._how, TRANSPOSE_FIRST, ctypes.byref(transpose), ctypes.sizeof(transpose))  # fmt: skip
        # the library counts by columns: to it each of these is transposed
        self._forms = [self._keep("MatrixLayout", BF16, ctypes.c_uint64(columns), ctypes.c_uint64(rows), ctypes.c_int64(step)) for rows, columns, step in (weight, x, out)]  # fmt: skip
        self._one, self._zero = ctypes.c_float(1.0), ctypes.c_float(0.0)
        self._workspace: dict[bytes, int] = {}  # bytes that algorithms need

    def _keep(self, kind: str, *given: Any) -> _Pointer:
        self._made.append((kind, self._lt.make(kind, *given)))
        return self._made[-1][1]

    def offered(self, device: torch.device) -> list[bytes]:
        """Algorithms that the library thinks fit, by its own order; each as it may be kept for this version of it."""
        wish, most = self._keep("MatmulPreference"), ctypes.c_uint64(WORKSPACE)
        self._lt("MatmulPreferenceSetAttribute", wish, MOST_WORKSPACE, ctypes.byref(most), ctypes.sizeof(most))  # fmt: skip
        offers, count = (_Offer * OFFERED)(), ctypes.c_int()
        weight, x, out = self._forms
        self._lt("MatmulAlgoGetHeuristic", self._lt.handle(device), self._how, weight, x, out, out, wish, OFFERED, offers, ctypes.byref(count))  # fmt: skip
        return [bytes(offer.algorithm) for offer in offers[: count.value] if not offer.state]

    def workspace(self, algorithm: bytes, device: torch.device) -> int:
        """Bytes that an algorithm needs, which may have been offered for another shape.

        Raises:
            RuntimeError: it cannot do this one.
        """
        if algorithm not in self._workspace:
            offer, weight, x, out = _Offer(), *self._forms
            self._lt("MatmulAlgoCheck", self._lt.handle(device), self._how, weight, x, out, out, _algorithm(algorithm), ctypes.byref(offer))  # fmt: skip
            if offer.workspace > WORKSPACE:
                raise RuntimeError(f"it needs {offer.workspace} bytes of workspace")
            self._workspace[algorithm] = offer.workspace
        return self._workspace[algorithm]

    def run(self, algorithm: bytes, x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor) -> None:  # fmt: skip
        """Multiply tensors of the shapes and strides given, on the current stream."""
        form_weight, form_x, form_out = self._forms
        # of this call alone: a scheduler of tiles counts there
        space = torch.empty(self.workspace(algorithm, x.device), dtype=torch.uint8, device=x.device)
        stream = _Pointer(torch.cuda.current_stream(x.device).cuda_stream)
        result = _Pointer(out.data_ptr())
        self._lt(
            "Matmul", self._lt.handle(x.device), self._how, ctypes.byref(self._one),
            _Pointer(weight.data_ptr()), form_weight, _Pointer(x.data_ptr()), form_x, ctypes.byref(self._zero),
            result, form_out, result, form_out, _algorithm(algorithm),
            _Pointer(space.data_ptr()), ctypes.c_size_t(space.nbytes), stream,
        )  # fmt: skip


def _algorithm(kept: bytes) -> Any:
    return ctypes.byref(_Algorithm.from_buffer_copy(kept))


def _destroy(lt: _Library, made: list[tuple[str, _Pointer]]) -> None:
    for kind, pointer in made:
        lt(f"{kind}Destroy", pointer)


def multiply(algorithm: bytes, x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:  # fmt: skip
    """`x @ weight.T` by an algorithm, or as torch does it where the algorithm cannot.

    Args:
        algorithm: that `Product.offered` gave, on this device.
        x: [count, K] bf16 on a CUDA device.
        weight: [N, K], likewise.
        out: [count, N] to write to.

    Returns:
        [count, N].
    """
    out = x.new_empty(len(x), len(weight)) if out is None else out
    product = _product(algorithm, x.device, *map(form_of, (x, weight, out)))
    if product is None:
        return torch.mm(x, weight.t(), out=out)
    product.run(algorithm, x, weight, out)
    return out


def form_of(matrix: torch.Tensor) -> Form:
    """How a matrix lies, see `Product`; the step is 0 if its columns are apart."""
    step = matrix.stride(0) if matrix.stride(1) == 1 else 0
    return matrix.shape[0], matrix.shape[1], step


@functools.lru_cache(maxsize=MOST_KEPT)
def _product(algorithm: bytes, device: torch.device, *forms: Form) -> Product | None:
    try:
        if not all(step for _, _, step in forms):
            raise RuntimeError("columns lie apart")
        product = Product(*forms)
        product.workspace(algorithm, device)
        return product
    except RuntimeError as error:
        log.info("Ark matrices: torch multiplies %s by itself (%s).", forms, error)
        return None
