"""Importing large libraries, and building what they are for, in less time."""

from __future__ import annotations

import contextlib
import functools
import gc
import importlib.metadata
import sys
from collections.abc import Iterator

from .shared import Shared, short_turns
from .uncompiled import without_compiler

# What transformers and diffusers import if it is there, for models, losses and training that Klein has no use for.
OPTIONAL = "accelerate", "peft", "scipy", "sklearn", "torchaudio", "torchvision"
LOOKING = {"diffusers", "transformers"}
_unneeded: list[contextlib.ExitStack] = []  # see `left_out`; what is to be undone at its end


@contextlib.contextmanager
def left_out(*packages: str, compiler: bool = False) -> Iterator[None]:
    """Let packages that nobody has imported yet pass for not installed while diffusers and transformers look.

    They remember what they found, so nothing is done where one of them has looked before.

    Args:
        packages: their names.
        compiler: whether torch.compile and torch.distributed are not needed either: `building` does without them then. For a
            process that ends with this: the libraries remember that, too.
    """
    looked = LOOKING & sys.modules.keys()
    missing = [name for name in packages if name not in sys.modules and not looked]
    sys.modules.update(dict.fromkeys(missing))  # type: ignore[arg-type]
    try:
        with contextlib.ExitStack() as undo:
            if compiler and not looked:
                _unneeded.append(undo)
                undo.callback(_unneeded.clear)
            yield
    finally:
        for name in missing:
            if name in sys.modules and sys.modules[name] is None:
                del sys.modules[name]


def _prepare(undo: contextlib.ExitStack) -> None:
    if _unneeded:
        without_compiler(_unneeded[0])
    undo.enter_context(short_turns)
    own = importlib.metadata.packages_distributions
    undo.callback(setattr, importlib.metadata, "packages_distributions", own)
    importlib.metadata.packages_distributions = functools.cache(own)
    if gc.isenabled():
        undo.callback(gc.enable)
        gc.disable()


# To import, and to build many objects that stay, while other threads bring the weights. To look for garbage among them takes
# as long as to make them; to find out which packages are installed, as both diffusers and transformers do, half a second
# each time.
building = Shared(_prepare)
