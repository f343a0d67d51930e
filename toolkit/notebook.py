"""What was measured on this machine, in small JSON files of the user's cache folder: by key, and never relied upon."""

from __future__ import annotations

import contextlib
import json
import os
from typing import Any

from .cache import cache_folder


def recall(book: str, key: str) -> Any:
    """What was remembered under a key; None if nothing was, or the file cannot be read."""
    return _read(book).get(key)


def remember(book: str, key: str, value: Any) -> None:
    """Write a value that JSON can hold; a folder that cannot be written costs only the memory."""
    path = cache_folder() / f"{book}.json"
    draft = path.with_suffix(f".{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        draft.write_text(json.dumps({**_read(book), key: value}, indent=1), encoding="utf-8")
        os.replace(draft, path)
    except OSError:
        with contextlib.suppress(OSError):
            draft.unlink()


def _read(book: str) -> dict[str, Any]:
    try:
        found = json.loads((cache_folder() / f"{book}.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):  # none yet, or damaged
        return {}
    return found if isinstance(found, dict) else {}
