"""torch.compile for one kind of block: what it compiled is counted, and kept for the next process.

The settings of a compilation travel with it (`config_patches`); no configuration of torch is changed, no environment
variable set.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from .embedded import cache_folder
from .hardware import Hardware

MODES = ("default", "reduce-overhead", "max-autotune-no-cudagraphs")
FILES = 16  # kept at most; what an older one held is in a newer one too if it was used since
_loaded: set[Path] = set()
log = logging.getLogger("ark")


class Compiler:
    """Compiles functions with one mode and one cache on disk.

    Args:
        mode: one of MODES.
        cache: the folder that keeps what was compiled, None to keep nothing (as torch before 2.7 does).

    Attributes:
        graphs: how many graphs were compiled since this was made, or found in the cache; a recompilation counts, too.
        seconds: that it took.
    """

    def __init__(self, mode: str, cache: Path | None):
        self.mode = mode
        self.cache = cache = cache if hasattr(torch.compiler, "load_cache_artifacts") else None
        self.graphs, self.seconds = 0, 0.0
        files = sorted(cache.glob("*.bin")) if cache else []
        self._fresh = not files  # something was compiled that the cache does not have
        self._compiled: dict[Callable, Callable] = {}
        for file in files:
            if file not in _loaded:
                _loaded.add(file)
                if torch.compiler.load_cache_artifacts(file.read_bytes()) is None:
                    log.warning("Ark: %s is damaged and not used.", file)

    def __call__(self, function: Callable) -> Callable:
        """The compiled function; the same one for the same function."""
        if function not in self._compiled:
            self._compiled[function] = torch.compile(function, backend=self.backend)
        return self._compiled[function]

    def backend(self, graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable:
        """What torch.compile calls with each graph."""
        from torch._dynamo.utils import counters
        from torch._inductor import list_mode_options
        from torch._inductor.compile_fx import compile_fx

        start, found = time.perf_counter(), counters["inductor"]["fxgraph_cache_hit"]
        options = {} if self.mode == "default" else list_mode_options(self.mode)
        compiled = compile_fx(graph, inputs, config_patches=options)
        self.graphs += 1
        self._fresh |= counters["inductor"]["fxgraph_cache_hit"] == found
        self.seconds += time.perf_counter() - start
        return compiled

    def keep(self) -> None:
        """Add what was compiled since the last time to the cache; a folder that cannot be written costs only that."""
        if not self.cache or not self._fresh or not self.graphs:
            return
        self._fresh = False
        found = torch.compiler.save_cache_artifacts()
        if found is None:
            return
        # A file of its own each time: torch reads back only what was added last.
        file = self.cache / f"{time.time_ns()}.bin"
        _loaded.add(file)
        draft = file.with_suffix(".draft")
        try:
            self.cache.mkdir(parents=True, exist_ok=True)
            draft.write_bytes(found[0])
            draft.replace(file)
            for old in sorted(self.cache.glob("*.bin"))[:-FILES]:
                old.unlink()
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
    return Compiler(mode, cache_folder() / "compiled" / digest)


def any_length(tensor: torch.Tensor, dim: int) -> None:
    """Let what is compiled with this argument serve every length of one dimension; all others are compiled in."""
    torch._dynamo.maybe_mark_dynamic(tensor, dim)


def describe(model: Any) -> str:
    """What compiled code depends on of a module: its class, and the shapes and dtypes of its weights."""
    shapes = sorted({(tuple(w.shape), str(w.dtype)) for w in model.parameters()}, key=str)
    return f"{type(model).__qualname__} {shapes}"
