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
LOOKING = {"diffusers", "transformers"}
SHORT = 1e-4  # s


@contextlib.contextmanager
def left_out(*packages: str) -> Iterator[None]:
    """Let packages that nobody has imported yet pass for not installed while diffusers and transformers look.

    They remember what they found, so nothing is done where one of them has looked before.
    """
    looked = LOOKING & sys.modules.keys()
    missing = [name for name in packages if name not in sys.modules and not looked]
    sys.modules.update(dict.fromkeys(missing))  # type: ignore[arg-type]
    try:
        yield
    finally:
        for name in missing:
            if name in sys.modules and sys.modules[name] is None:
                del sys.modules[name]


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
