"""From a safetensors file to tensors.

A file is opened read-only and its header checked (`header.py`). Large files become views of a private mapping, so that no
byte is copied and none can be written back. Small ones are read into memory at once: nothing that happens to the file
afterwards can reach them.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from .errors import ModelFileError
from .header import ModelFile, TensorEntry, read_header

IN_MEMORY = 64 << 20  # bytes; up to here a copy costs less than 20 ms and outlives the file
_OTHER_FORMATS = {
    ".gguf": "GGUF files are not supported",
    ".ckpt": "pickle checkpoints can run code and are not read",
    ".pt": "pickle checkpoints can run code and are not read",
    ".pth": "pickle checkpoints can run code and are not read",
    ".bin": "pickle checkpoints can run code and are not read",
}
log = logging.getLogger("ark")
_SHARD = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.safetensors$")


@dataclass(frozen=True)
class OpenedModel:
    """A model's tensors and where their bytes come from.

    Attributes:
        tensors: by name, in the files' own dtypes.
        metadata: of the file (of shards: of the first one).
        parts: each file with its bytes as one tensor [size] uint8, of which the tensors are views.
        mapped: identities of the files that are mapped; the others were read whole and need their file no more.
        ahead: what is on its way to a device already, see `ahead.py`.
        reports: of the transfers so far, the last one of each file.
        listeners: called with each new report, from any thread.
    """

    tensors: dict[str, torch.Tensor]
    metadata: dict[str, str]
    parts: tuple[tuple[ModelFile, torch.Tensor], ...]
    mapped: frozenset[tuple]
    ahead: dict[tuple, Any] = field(default_factory=dict)
    reports: dict[str, Any] = field(default_factory=dict)
    listeners: list[Callable[[Any], None]] = field(default_factory=list)

    def hear(self, report: Any) -> None:
        """Keep a transfer's report and pass it on."""
        self.reports[report.file] = report
        for listener in self.listeners:
            try:
                listener(report)
            except Exception as error:  # the weights have arrived all the same
                log.warning("Ark igniter: a report was not shown (%s).", error)

    def origin_of(self, tensor: torch.Tensor) -> tuple[ModelFile, TensorEntry] | None:
        """The bytes of a file that a tensor is a view of, None if it was computed since."""
        if type(tensor.data) is not torch.Tensor or tensor.is_meta or not tensor.is_contiguous():
            return None
        for file, flat in self.parts:
            start = tensor.data_ptr() - flat.data_ptr()
            if tensor.nbytes and 0 <= start <= file.size - tensor.nbytes:
                return file, TensorEntry(tensor.dtype, tuple(tensor.shape), start, tensor.nbytes)
        return None


def open_model(path: str | Path, in_memory: int | None = None) -> OpenedModel:
    """Open a model.

    Args:
        path: a safetensors file; one shard of several stands for all of them. Opened read-only and never written.
        in_memory: files up to this many bytes are read, larger ones mapped; IN_MEMORY unless given.

    Returns:
        Its tensors. Nothing is copied beyond `in_memory`, nothing cast.

    Raises:
        ModelFileError: a file is missing, not safetensors, truncated, or its header does not fit its contents.
    """
    in_memory = IN_MEMORY if in_memory is None else in_memory
    tensors: dict[str, torch.Tensor] = {}
    files = [read_header(part) for part in model_parts(path)]
    with torch.inference_mode(False):  # the tensors outlive the prompt that opened them
        parts = tuple((file, bytes_of(file, in_memory)) for file in files)
        for file, flat in parts:
            for name, entry in file.entries.items():
                if name in tensors:
                    raise ModelFileError(
                        f"{file.path.name} repeats tensor {name} of another shard.",
                        "Download it again.",
                    )
                tensors[name] = _view(flat, entry)
    mapped = frozenset(file.identity for file in files if file.size > in_memory)
    return OpenedModel(tensors, files[0].metadata, parts, mapped)


def model_parts(path: str | Path) -> list[Path]:
    """The files that hold one model: the file itself, or all shards of the set that it belongs to.

    Raises:
        ModelFileError: the file is missing or of another format, or a shard is missing.
    """
    path = Path(path)
    if reason := _OTHER_FORMATS.get(path.suffix.lower()):
        raise ModelFileError(f"{path.name}: {reason}.", "Use the model's .safetensors file.")
    if not path.is_file():
        raise ModelFileError(
            f"{path.name} is not there.", "Put the file back or choose another one."
        )
    shard = _SHARD.match(path.name)
    if not shard:
        return [path]
    stem, _, count = shard.groups()
    names = [f"{stem}-{number:05}-of-{count}.safetensors" for number in range(1, int(count) + 1)]
    index = path.with_name(f"{stem}.safetensors.index.json")
    if index.is_file():
        names = _indexed_shards(index)
    missing = [name for name in names if not path.with_name(name).is_file()]
    if missing:
        raise ModelFileError(
            f"{path.name} is one of {len(names)} parts, and {missing[0]} is not beside it.",
            "Download the missing parts into the same folder.",
        )
    return [path.with_name(name) for name in names]


def _indexed_shards(index: Path) -> list[str]:
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        if not all(Path(name).name == name for name in names):
            raise ValueError("a part lies in another folder")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelFileError(
            f"{index.name} is not an index of safetensors files ({error}).", "Download it again."
        ) from error
    return names


def bytes_of(file: ModelFile, in_memory: int) -> torch.Tensor:
    """A file's bytes, [size] uint8, read or mapped; see `open_model`.

    Raises:
        ModelFileError: the file is no longer the one whose header was read.
    """
    file.check_unchanged()
    try:
        flat = _read(file) if file.size <= in_memory else _map(file)
    except (OSError, RuntimeError) as error:
        file.check_unchanged()
        raise ModelFileError(
            f"{file.path.name} cannot be opened ({str(error).splitlines()[0]}).",
            "Free some memory, or copy the file to a local disk.",
        ) from error
    file.check_unchanged()  # so what was read or mapped belongs to the header
    return flat


def _read(file: ModelFile) -> torch.Tensor:
    """The whole file in memory, [size] uint8."""
    flat = torch.empty(file.size, dtype=torch.uint8)
    buffer, done = flat.numpy().data, 0
    with file.path.open("rb", buffering=0) as source:
        while done < file.size and (count := source.readinto(buffer[done:])):
            done += count
    return flat


def _map(file: ModelFile) -> torch.Tensor:
    """The whole file as a private mapping, [size] uint8: writing to it changes memory, never the file."""
    storage: Any = torch.UntypedStorage.from_file(str(file.path), False, file.size)
    return torch.empty(0, dtype=torch.uint8).set_(storage, 0, (file.size,), (1,))


def _view(flat: torch.Tensor, entry: TensorEntry) -> torch.Tensor:
    data = flat[entry.start : entry.start + entry.nbytes]
    if entry.start % entry.dtype.itemsize:
        data = data.clone()  # a header of odd length: torch cannot view at such an address
    return data.view(entry.dtype).view(entry.shape)


def strip_prefix(
    state_dict: dict[str, torch.Tensor], prefix: str, sign: str
) -> dict[str, torch.Tensor]:
    """Pick one part out of a checkpoint.

    Args:
        state_dict: of a checkpoint, or of the part alone.
        prefix: a regular expression for what stands before the part's names.
        sign: a name that the part surely has.

    Returns:
        The part under its own names; everything as it was when no `prefix` + `sign` is there.
    """
    pattern = re.compile(f"({prefix}){re.escape(sign)}$")
    match = next(filter(None, map(pattern.match, state_dict)), None)
    if match is None:
        return state_dict
    found = match[1]
    return {k[len(found) :]: v for k, v in state_dict.items() if k.startswith(found)}


def file_fingerprint(path: str | Path) -> tuple[str, int, int]:
    """Identify a file's content cheaply: name, size in bytes, modification time in ns."""
    stat = Path(path).stat()
    return Path(path).name, stat.st_size, stat.st_mtime_ns
