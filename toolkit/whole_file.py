"""Files that are there whole or not at all."""

from __future__ import annotations

import contextlib
import os
import secrets
from pathlib import Path


def write_whole(path: Path, *pieces: bytes | memoryview) -> None:
    """Write a file under a passing name in the same folder, `.NAME.*.part`, then give it its own in one step.

    Args:
        path: a file that was there is replaced.
        pieces: all of it, one after the other.

    Raises:
        OSError: the disk is full, or the folder cannot be written; nothing is left then.
    """
    draft = path.with_name(f".{path.name[:40]}.{secrets.token_hex(4)}.part")  # a long name has room
    try:
        with draft.open("xb") as file:
            file.writelines(pieces)
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, path)
    except BaseException:
        with contextlib.suppress(OSError):
            draft.unlink()
        raise
