"""torch.compile for one kind of block: what it compiled is counted, and kept for the next process.

The settings of a compilation travel with it (`config_patches`); no configuration of torch is changed, no environment
variable set.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from .embedded import cache_folder
from .hardware import Hardware

MODES = ("default", "reduce-overhead", "max-autotune-no-cudagraphs")
_loaded: set[Path] = set()
log = logging.getLogger("ark")


class Compiler:
    """Compiles functions with one mode and one cache on disk.

    Args:
        mode: one of MODES.
        cache: the file that keeps what was compiled, None to keep nothing (as torch before 2.7 does).

    Attributes:
        graphs: how many graphs were compiled since this was made; a recompilation counts, too.
        seconds: that it took.
    """

    def __init__(self, mode: str, cache: Path | None):
        self.mode = mode
        self.cache = cache = cache if hasattr(torch.compiler, "load_cache_artifacts") else None
        self.graphs, self.seconds = 0, 0.0
        self._kept = 0
        self._compiled: dict[Callable, Callable] = {}
        if cache and cache not in _loaded and cache.is_file():
            _loaded.add(cache)
            if torch.compiler.load_cache_artifacts(cache.read_bytes()) is None:
                log.warning("Ark: %s is damaged, so everything is compiled anew.", cache)

    def __call__(self, function: Callable) -> Callable:
        """The compiled function; the same one for the same function."""
        if function not in self._compiled:
            self._compiled[function] = torch.compile(function, backend=self.backend, dynamic=True)
        return self._compiled[function]

    def backend(self, graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable:
        """What torch.compile calls with each graph."""
        from torch._inductor import list_mode_options
        from torch._inductor.compile_fx import compile_fx

        start = time.perf_counter()
        options = {} if self.mode == "default" else list_mode_options(self.mode)
        compiled = compile_fx(graph, inputs, config_patches=options)
        self.graphs += 1
        self.seconds += time.perf_counter() - start
        return compiled

    def keep(self) -> None:
        """Write what was compiled since the last time to the cache; a folder that cannot be written costs only that."""
        if not self.cache or self._kept == self.graphs:
            return
        self._kept = self.graphs
        found = torch.compiler.save_cache_artifacts()
        if found is None:
            return
        draft = self.cache.with_suffix(f".{os.getpid()}")
        try:
            self.cache.parent.mkdir(parents=True, exist_ok=True)
            draft.write_bytes(found[0])
            draft.replace(self.cache)
        except OSError as error:
            log.warning("Ark: what was compiled is not kept (%s).", error)


@functools.lru_cache
def compiler(mode: str, hardware: Hardware, model: str, kernel: str) -> Compiler:
    """The compiler of this process for one mode, card, kind of model and attention kernel.

    Args:
        mode: one of MODES.
        hardware: the card.
        model: what its code depends on: the class and the dimensions.
        kernel: the attention kernel's name.
    """
    versions = dict(hardware.packages)
    parts = (torch.__version__, versions.get("triton"), hardware.name, model, kernel, mode)
    digest = hashlib.sha256(repr(parts).encode()).hexdigest()[:16]
    return Compiler(mode, cache_folder() / "compiled" / f"{digest}.bin")


def describe(model: Any) -> str:
    """What compiled code depends on of a module: its class, and the shapes and dtypes of its weights."""
    shapes = sorted({(tuple(w.shape), str(w.dtype)) for w in model.parameters()}, key=str)
    return f"{type(model).__qualname__} {shapes}"
