"""The header of a safetensors file, read and checked before a byte of its tensors is touched.

Format: 8 bytes little-endian length N, N bytes of JSON `{name: {dtype, shape, data_offsets}}`, then the tensors' bytes.
Source: huggingface/safetensors, README "Format". Nothing is allocated from a number that has not been checked against the
file's true size.
"""

from __future__ import annotations

import json
import math
import os
import struct
from dataclasses import dataclass
from pathlib import Path

import torch

from .errors import ModelFileError

MAX_HEADER = 100_000_000  # bytes, the format's own limit
MAX_TENSORS = 100_000
MAX_DIMENSIONS = 8
_NAMES = {
    "BOOL": "bool", "U8": "uint8", "I8": "int8", "U16": "uint16", "I16": "int16", "U32": "uint32", "I32": "int32",
    "U64": "uint64", "I64": "int64", "F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64",
    "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F8_E8M0": "float8_e8m0fnu",
}  # fmt: skip
DTYPES = {
    k: getattr(torch, name) for k, name in _NAMES.items() if hasattr(torch, name)
}  # older torch has fewer


@dataclass(frozen=True)
class TensorEntry:
    """Where one tensor's bytes are.

    Attributes:
        dtype: as stored.
        shape: as stored.
        start: first byte, counted from the start of the file.
        nbytes: how many.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    nbytes: int


@dataclass(frozen=True)
class ModelFile:
    """A checked safetensors file.

    Attributes:
        path: where it is.
        identity: device, inode, size in bytes and modification time in ns when the header was read.
        entries: its tensors by name, in the order of their bytes.
        metadata: the file's own text.
    """

    path: Path
    identity: tuple[int, int, int, int]
    entries: dict[str, TensorEntry]
    metadata: dict[str, str]

    @property
    def size(self) -> int:
        """Bytes of the whole file."""
        return self.identity[2]

    def check_unchanged(self) -> None:
        """Raise ModelFileError if the file is not the one whose header was read."""
        try:
            now = identity_of(os.stat(self.path))
        except OSError as error:
            raise ModelFileError(
                f"{self.path.name} is gone ({error.strerror}).",
                "Put the file back and queue again.",
            ) from error
        if now != self.identity:
            raise ModelFileError(
                f"{self.path.name} was changed while it was in use.",
                "Wait until it is written completely, then queue again.",
            )


def identity_of(stat: os.stat_result) -> tuple[int, int, int, int]:
    """What tells one state of a file from another: device, inode, size, modification time in ns."""
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns


def read_header(path: str | Path) -> ModelFile:
    """Read and check a file's header.

    Args:
        path: a safetensors file.

    Returns:
        Its tensors' places, every one inside the file, none overlapping, none missing.

    Raises:
        ModelFileError: the file is missing or its header is damaged or lies; names the file, the tensor and the reason.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            stat = os.fstat(file.fileno())
            text = _header_text(file, stat.st_size, path.name)
    except OSError as error:
        raise ModelFileError(
            f"{path.name} cannot be read ({error.strerror}).",
            "Put the file back or choose another one.",
        ) from error
    header, metadata = _parse(text, path.name)
    data_start, data_size = 8 + len(text), stat.st_size - 8 - len(text)
    entries = {
        name: _entry(path.name, name, value, data_start, data_size)
        for name, value in header.items()
    }
    entries = dict(sorted(entries.items(), key=lambda item: (item[1].start, item[1].nbytes)))
    _check_coverage(path.name, entries, data_start, stat.st_size)
    return ModelFile(path, identity_of(stat), entries, metadata)


def _header_text(file, size: int, name: str) -> bytes:
    if size < 8:
        raise _damaged(name, f"it has {size} bytes, too few for a header")
    (length,) = struct.unpack("<Q", file.read(8))
    if length > MAX_HEADER:
        raise _damaged(
            name, f"its header claims {length} bytes, more than the {MAX_HEADER} allowed"
        )
    if length > size - 8:
        raise _damaged(name, f"its header claims {length} bytes, the file has {size}")
    return file.read(length)


def _parse(text: bytes, name: str) -> tuple[dict, dict[str, str]]:
    def unique(pairs: list[tuple[str, object]]) -> dict:
        made = dict(pairs)
        if len(made) != len(pairs):
            raise ValueError("a name appears twice")
        return made

    if not text.startswith(b"{"):
        raise _damaged(name, "its header is not JSON")
    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise _damaged(name, f"its header is not JSON: {error}") from error
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise _damaged(name, "its __metadata__ is not a table of texts")
    if not header:
        raise ModelFileError(f"{name} holds no tensors.", "Download it again.")
    if len(header) > MAX_TENSORS:
        raise _damaged(name, f"its header lists {len(header)} tensors, more than {MAX_TENSORS}")
    return header, metadata


def _entry(file: str, name: str, value: object, data_start: int, data_size: int) -> TensorEntry:
    def natural(numbers: object) -> bool:
        return isinstance(numbers, list) and all(type(n) is int and n >= 0 for n in numbers)

    if not isinstance(value, dict) or not {"dtype", "shape", "data_offsets"} <= set(value):
        raise _damaged(file, f"tensor {name} lacks dtype, shape or data_offsets")
    shape, offsets, dtype = value["shape"], value["data_offsets"], DTYPES.get(str(value["dtype"]))
    if dtype is None:
        raise ModelFileError(
            f"{file}: tensor {name} has dtype {str(value['dtype'])[:40]}, which Ark does not read.",
            "Use the model's bf16 or fp8 file.",
        )
    if not natural(shape) or len(shape) > MAX_DIMENSIONS:
        raise _damaged(file, f"tensor {name} has an impossible shape")
    if not natural(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise _damaged(file, f"tensor {name} has impossible offsets")
    start, end = offsets
    if end > data_size:
        raise _damaged(file, f"tensor {name} ends at byte {end} of {data_size}")
    nbytes = math.prod(shape) * dtype.itemsize
    if nbytes != end - start:
        raise _damaged(
            file, f"tensor {name} needs {nbytes} bytes by its shape and has {end - start}"
        )
    return TensorEntry(dtype, tuple(shape), data_start + start, nbytes)


def _check_coverage(file: str, entries: dict[str, TensorEntry], position: int, end: int) -> None:
    for name, entry in entries.items():
        if entry.start != position:
            what = "overlaps the one before" if entry.start < position else "leaves a gap before it"
            raise _damaged(file, f"tensor {name} {what}")
        position += entry.nbytes
    if position != end:
        raise _damaged(file, f"{end - position} bytes follow its last tensor")


def _damaged(file: str, reason: str) -> ModelFileError:
    return ModelFileError(
        f"{file} is not a whole safetensors file: {reason[:300]}.",
        "Download it again; if it came whole, it is not a safetensors file.",
    )
