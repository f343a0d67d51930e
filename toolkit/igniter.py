"""From a safetensors file to tensors, without copying: the plain path, a read-only view of the page cache.

The header is parsed and checked by the safetensors library (size, JSON, dtypes, offsets that must cover the file
without gaps or overlaps); what it rejects is reported with the file's name and a remedy.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from .errors import ModelFileError

_OTHER_FORMATS = {
    ".gguf": "GGUF files are not supported",
    ".ckpt": "pickle checkpoints can run code and are not read",
    ".pt": "pickle checkpoints can run code and are not read",
    ".pth": "pickle checkpoints can run code and are not read",
    ".bin": "pickle checkpoints can run code and are not read",
}


def load_state_dict(path: str | Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Map a safetensors file.

    Args:
        path: the file; opened read-only and never written.

    Returns:
        `{name: tensor}` with every tensor a view of the mapped file in the file's own dtype, and the file's metadata.

    Raises:
        ModelFileError: the file is missing, not safetensors, truncated, or its header does not fit its contents.
    """
    path = Path(path)
    if not path.is_file():
        raise ModelFileError(
            f"{path.name} is not there.", "Put the file back or choose another one."
        )
    if reason := _OTHER_FORMATS.get(path.suffix.lower()):
        raise ModelFileError(f"{path.name}: {reason}.", "Use the model's .safetensors file.")
    try:
        with safe_open(str(path), framework="pt", device="cpu") as file:
            metadata = file.metadata() or {}
            state_dict = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise ModelFileError(
            f"{path.name} is not a whole safetensors file ({error}).",
            "Download it again; if it came whole, it is not a safetensors file.",
        ) from error
    if not state_dict:
        raise ModelFileError(f"{path.name} holds no tensors.", "Download it again.")
    return state_dict, metadata


def file_fingerprint(path: str | Path) -> tuple[str, int, int]:
    """Identify a file's content cheaply: name, size in bytes, modification time in ns."""
    stat = Path(path).stat()
    return Path(path).name, stat.st_size, stat.st_mtime_ns
