"""Ark's folder in the user's cache; importing this needs nothing but Python."""

from __future__ import annotations

import os
import sys
from pathlib import Path


def cache_folder() -> Path:
    """Where Ark keeps what it made: ARK_CACHE_DIR, else the system's usual place."""
    if chosen := os.environ.get("ARK_CACHE_DIR"):
        return Path(chosen)
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA", Path.home() / "AppData" / "Local")) / "ark"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "ark"
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "ark"
