"""Importing large libraries, and building what they are for, in less time."""

from __future__ import annotations

import contextlib
import functools
import gc
import importlib.metadata
import sys
from collections.abc import Iterator

# What transformers and diffusers import if it is there, for models and losses that no Klein has.
OPTIONAL = "scipy", "sklearn", "torchvision"
SHORT = 1e-4  # s


def leave_out(*packages: str) -> None:
    """Let packages that nobody has imported yet pass for not installed from now on: for a process of one's own."""
    for name in packages:
        sys.modules.setdefault(name, None)  # type: ignore[arg-type]


@contextlib.contextmanager
def building() -> Iterator[None]:
    """Import and build many objects that stay, while other threads bring the weights.

    To look for garbage among them takes as long as to make them. To find out which packages are installed, as both diffusers
    and transformers do, takes half a second each time. And a thread that has something to send would wait 5 ms for the
    interpreter.
    """
    collects, own = gc.isenabled(), importlib.metadata.packages_distributions
    interval = sys.getswitchinterval()
    gc.disable()
    importlib.metadata.packages_distributions = functools.cache(own)
    sys.setswitchinterval(SHORT)
    try:
        yield
    finally:
        sys.setswitchinterval(interval)
        importlib.metadata.packages_distributions = own
        if collects:
            gc.enable()
