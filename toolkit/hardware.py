"""One probe of the machine: what it can run, and the reason for what it cannot."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

from .packages import PACKAGES, package_version

HOPPER = 9, 0  # compute capability


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
    found = {package: package_version(package) for package in PACKAGES}
    packages = tuple((package, version) for package, version in found.items() if version)
    return Hardware(device.type, name, capability, packages)
