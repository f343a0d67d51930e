"""The optional packages that kernels come from; importing this needs nothing but Python."""

from __future__ import annotations

import contextlib
import importlib.machinery
import importlib.metadata
import importlib.util
from pathlib import Path

DISTRIBUTIONS = {
    "triton": "triton-windows",
    "flash_attn_interface": "flash_attn_3",
    "flash_attn": "flash_attn_4",
    "cudnn": "nvidia-cudnn-frontend",
}  # where not as the package
PACKAGES = ("triton", "sageattention", "sageattn3", "comfy_kitchen", "flash_attn_interface", "flash_attn.cute", "cudnn")  # fmt: skip


def package_version(package: str) -> str | None:
    """A package's version, "unknown" if it does not say, None if it is not installed; nothing is imported."""
    parent, _, module = package.partition(".")
    spec = importlib.util.find_spec(parent)
    if spec is None or (module and not _has_submodule(spec, module)):
        return None
    for name in (parent, DISTRIBUTIONS.get(parent, parent)):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return importlib.metadata.version(name)
    # looks at every file of every package that is installed, for half a second
    names = importlib.metadata.packages_distributions().get(parent)
    return importlib.metadata.version(names[0]) if names else "unknown"


def _has_submodule(spec: importlib.machinery.ModuleSpec, module: str) -> bool:
    return any(Path(place, module).is_dir() for place in spec.submodule_search_locations or ())
