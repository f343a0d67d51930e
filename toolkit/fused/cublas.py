"""Matrix products by a chosen algorithm of cuBLASLt, the library behind torch's own: torch takes the first one it is offered.

Which one is the fastest depends on what the card is doing: one that is held back by its power limit does as much as its watts
allow, and there others are than on a cool card (`toolkit/matrices.py` measures that).

Source: the C interface of cuBLASLt, cublasLt.h of CUDA 12 and 13.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import logging
import sys
import threading
import weakref
from typing import Any

import torch

LENGTH = 64  # bytes of an algorithm
OFFERED = 8  # algorithms that are asked for
WORKSPACE = 1 << 16  # bytes that one may take: enough to count tiles, not for parts of a result
MOST_KEPT = 256  # forms of matrices whose descriptions are kept
# Of cublasLt.h: cudaDataType, cublasComputeType_t, then attributes of a product, of a wish, and of an algorithm.
BF16, E4M3, FP32, COMPUTE_FP32 = 14, 28, 0, 68
TRANSPOSE_FIRST, FAST_ACCUMULATION = 3, 25
SCALES, SCALE_MODES, ONE_A_ROW = (17, 18), (31, 32), 3
MOST_WORKSPACE = 1
TILE, OPTION, CLUSTER = 1, 5, 8
# In fp8 the library offers one algorithm; these tiles, options and clusters of it were among the fastest on an H200.
IN_FP8 = (
    (20, 2, 5), (20, 3, 5), (405, 3, 2), (405, 1, 3), (458, 3, 5), (151, 0, 3), (151, 2, 5), (151, 2, 2), (179, 2, 5),
    (492, 3, 5), (209, 5, 5), (547, 7, 2), (127, 2, 3),
)  # fmt: skip
Form = tuple[int, int, int]
Scales = tuple[torch.Tensor, ...]
_Pointer = ctypes.c_void_p
log = logging.getLogger("ark")


class _Algorithm(ctypes.Structure):
    """Opaque; the header allows to keep its bytes for the same version of the library."""

    _fields_ = [("data", ctypes.c_uint64 * (LENGTH // 8))]


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
        """Of a device."""
        index = device.index or 0
        if index not in self._handles:
            with torch.cuda.device(index):  # a handle belongs to the one that is current
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
    """`x @ weight.T` of matrices that lie in one way, in bf16.

    Args:
        x: rows (count), columns (K), and the step from one row to the next.
        weight: likewise, N and K.
        out: likewise, count and N.
        fp8: x and weight are float8_e4m3fn with a scale a row, and tensor cores accumulate as they do it fast.

    Raises:
        RuntimeError: cuBLASLt cannot be called, or does not know such matrices.
    """

    def __init__(self, x: Form, weight: Form, out: Form, *, fp8: bool = False):
        found = library()
        if isinstance(found, str):
            raise RuntimeError(found)
        self._lt = found
        self._made: list[tuple[str, _Pointer]] = []
        weakref.finalize(self, _destroy, found, self._made).atexit = False
        self._how = self._keep("MatmulDesc", COMPUTE_FP32, FP32)
        self._set(TRANSPOSE_FIRST, ctypes.c_int32(1))
        if fp8:
            self._set(FAST_ACCUMULATION, ctypes.c_int8(1))
            for mode, pointer in zip(SCALE_MODES, SCALES, strict=True):
                self._set(mode, ctypes.c_int32(ONE_A_ROW))
                self._set(pointer, ctypes.c_uint64(1 << 8))  # until there is one
        # the library counts by columns: to it each of these is transposed
        kinds = (E4M3, E4M3, BF16) if fp8 else (BF16,) * 3
        self._forms = [
            self._keep("MatrixLayout", kind, ctypes.c_uint64(columns), ctypes.c_uint64(rows), ctypes.c_int64(step))
            for kind, (rows, columns, step) in zip(kinds, (weight, x, out), strict=True)
        ]  # fmt: skip
        self._one, self._zero = ctypes.c_float(1.0), ctypes.c_float(0.0)
        self.refused: set[bytes] = set()  # algorithms that failed
        self._workspace: dict[bytes, int] = {}  # bytes that they need
        self._lock = threading.Lock()  # the scales of a call are set before it

    def _keep(self, kind: str, *given: Any) -> _Pointer:
        self._made.append((kind, self._lt.make(kind, *given)))
        return self._made[-1][1]

    def _set(self, attribute: int, value: Any) -> None:
        self._lt("MatmulDescSetAttribute", self._how, attribute, ctypes.byref(value), ctypes.sizeof(value))  # fmt: skip

    def offered(self, device: torch.device) -> list[bytes]:
        """Algorithms that the library thinks fit, by its own order; each as it may be kept for this version of it."""
        wish, most = self._keep("MatmulPreference"), ctypes.c_uint64(WORKSPACE)
        self._lt("MatmulPreferenceSetAttribute", wish, MOST_WORKSPACE, ctypes.byref(most), ctypes.sizeof(most))  # fmt: skip
        offers, count = (_Offer * OFFERED)(), ctypes.c_int()
        weight, x, out = self._forms
        self._lt("MatmulAlgoGetHeuristic", self._lt.handle(device), self._how, weight, x, out, out, wish, OFFERED, offers, ctypes.byref(count))  # fmt: skip
        return [bytes(offer.algorithm) for offer in offers[: count.value] if not offer.state]

    def variants(self, algorithm: bytes, device: torch.device) -> list[bytes]:
        """An algorithm with other tiles, those of IN_FP8, as far as it knows them."""
        found = []
        for tile, option, cluster in IN_FP8:
            made = _Algorithm.from_buffer_copy(algorithm)
            values = (TILE, ctypes.c_uint32(tile)), (OPTION, ctypes.c_uint32(option)), (CLUSTER, ctypes.c_uint16(cluster))  # fmt: skip
            with contextlib.suppress(RuntimeError):
                for attribute, value in values:
                    self._lt("MatmulAlgoConfigSetAttribute", ctypes.byref(made), attribute, ctypes.byref(value), ctypes.sizeof(value))  # fmt: skip
                self.workspace(bytes(made), device)
                found.append(bytes(made))
        return found

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

    def run(self, algorithm: bytes, x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor, scales: Scales = ()) -> None:  # fmt: skip
        """Multiply tensors of the shapes and strides given, on the current stream; see `multiply`."""
        form_weight, form_x, form_out = self._forms
        # of this call alone: a scheduler of tiles counts there
        space = torch.empty(self.workspace(algorithm, x.device), dtype=torch.uint8, device=x.device)
        stream = _Pointer(torch.cuda.current_stream(x.device).cuda_stream)
        result = _Pointer(out.data_ptr())
        with self._lock, torch.cuda.device(x.device):
            for attribute, scale in zip(SCALES, reversed(scales), strict=False):
                self._set(attribute, ctypes.c_uint64(scale.data_ptr()))
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


def multiply(
    algorithm: bytes, x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor | None = None, scales: Scales = ()
) -> torch.Tensor | None:  # fmt: skip
    """`x @ weight.T` by an algorithm.

    Args:
        algorithm: that `Product` has offered, on this device.
        x: [count, K] on a CUDA device, bf16, or float8_e4m3fn with scales.
        weight: [N, K], likewise.
        out: [count, N] bf16 to write to.
        scales: in fp8 of x and of weight, one a row, fp32, contiguous.

    Returns:
        [count, N] bf16; None if the algorithm cannot do that, the log says why, once.
    """
    out = x.new_empty(len(x), len(weight), dtype=torch.bfloat16) if out is None else out
    forms = tuple(map(form_of, (x, weight, out)))
    product = _product(algorithm, x.device, bool(scales), *forms)
    if product is None or algorithm in product.refused:
        return None
    try:
        product.run(algorithm, x, weight, out, scales)
    except torch.cuda.OutOfMemoryError:
        raise
    except RuntimeError as error:  # the check had let it pass
        product.refused.add(algorithm)
        log.warning("Ark matrices: torch multiplies %s by itself (%s).", forms, error)
        return None
    return out


def form_of(matrix: torch.Tensor) -> Form:
    """How a matrix lies, see `Product`; the step is 0 if its columns are apart."""
    step = matrix.stride(0) if matrix.stride(1) == 1 else 0
    return matrix.shape[0], matrix.shape[1], step


@functools.lru_cache(maxsize=MOST_KEPT)
def _product(algorithm: bytes, device: torch.device, fp8: bool, *forms: Form) -> Product | None:
    try:
        if not all(step for _, _, step in forms):
            raise RuntimeError("columns lie apart")
        product = Product(*forms, fp8=fp8)
        product.workspace(algorithm, device)
        return product
    except RuntimeError as error:
        log.info("Ark matrices: torch multiplies %s by itself (%s).", forms, error)
        return None
