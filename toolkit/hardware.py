"""One probe of the machine: what it can run, and the reason for what it cannot."""

from __future__ import annotations

import contextlib
import functools
import importlib.machinery
import importlib.metadata
import importlib.util
from dataclasses import dataclass
from pathlib import Path

import torch

DISTRIBUTIONS = {
    "triton": "triton-windows",
    "flash_attn_interface": "flash_attn_3",
    "flash_attn": "flash_attn_4",
    "cudnn": "nvidia-cudnn-frontend",
}  # where not as the package
PACKAGES = ("triton", "sageattention", "sageattn3", "comfy_kitchen", "flash_attn_interface", "flash_attn.cute", "cudnn")  # fmt: skip


@dataclass(frozen=True)
class Hardware:
    """What Ark needs to know of a device.

    Attributes:
        device_type: "cuda" or "cpu" (or what torch calls another accelerator).
        name: the card's name, or "CPU".
        compute_capability: (major, minor) of an NVIDIA card, (0, 0) elsewhere.
        packages: installed versions of the optional kernel packages; absent if not installed.
    """

    device_type: str
    name: str
    compute_capability: tuple[int, int]
    packages: tuple[tuple[str, str], ...]

    def package_version(self, name: str) -> str | None:
        """Version of an optional package, None if it is not installed."""
        return dict(self.packages).get(name)


@functools.lru_cache
def probe_hardware(device: torch.device | str) -> Hardware:
    """Look at one device; nothing is imported and nothing runs on it."""
    device = torch.device(device)
    nvidia = device.type == "cuda" and torch.version.cuda is not None
    capability = torch.cuda.get_device_capability(device) if nvidia else (0, 0)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type.upper()
    found = {package: _version_of(package) for package in PACKAGES}
    packages = tuple((package, version) for package, version in found.items() if version)
    return Hardware(device.type, name, capability, packages)


def _version_of(package: str) -> str | None:
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
