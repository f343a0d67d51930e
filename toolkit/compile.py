"""torch.compile for one kind of block: what it traced and compiled is counted, and kept for the next process.

The settings of a compilation travel with it (`config_patches`); no configuration of torch is changed, no environment
variable set. What is kept is read in the background, by a server that idles before anybody queues.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import inspect
import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from . import traces
from .cache import cache_folder
from .hardware import Hardware
from .trace_draft import Draft

MODES = ("default", "reduce-overhead", "max-autotune-no-cudagraphs")
FILES = (
    16  # of a kind, kept at most; what an older one held is in a newer one too if it was used since
)
TORCHS, TRACE = ".bin", ".trace"  # suffixes of the files
_loaded: set[Path] = set()
_ahead: dict[Path, Future] = {}  # what is read, or was, and nobody has asked for
_queue = ThreadPoolExecutor(1, "ark-compile")
log = logging.getLogger("ark")


@dataclass
class Kept:
    """What earlier processes left in a folder.

    Attributes:
        tracing: whether what is traced can be kept there, too.
        ready: what was traced, ready to run.
        torchs: whether torch's own cache was there.
    """

    tracing: bool = False
    ready: list[traces.Ready] = field(default_factory=list)
    torchs: bool = False


def read_ahead() -> None:
    """Read what was compiled last, if this user compiles: it takes seconds, which a server has until somebody queues."""
    found = (cache_folder() / "compiled").glob(f"*/*{TRACE}")
    newest = max(found, key=lambda path: path.stat().st_mtime, default=None)
    if newest:
        _ahead[newest.parent] = _queue.submit(_read, newest.parent, True)
        _ahead[newest.parent].result()


def _read(folder: Path, with_traces: bool) -> Kept:
    """Torch's cache and the traces of a folder; without any, torch's compiler is imported."""
    kept = Kept()
    try:
        kept.tracing = with_traces and traces.available()
        files = sorted(folder.glob(f"*{TORCHS}"))
        kept.torchs = bool(files)
        for file in files:
            if file not in _loaded:
                _loaded.add(file)
                if torch.compiler.load_cache_artifacts(file.read_bytes()) is None:
                    log.warning("Ark: %s is damaged and not used.", file)
        for file in sorted(folder.glob(f"*{TRACE}")) if kept.tracing else ():
            kept.ready += _read_trace(file)
        if not kept.ready:  # else most likely nothing is compiled, and this takes seconds
            importlib.import_module("torch._inductor.compile_fx")
    except Exception as error:  # torch's own way remains
        if threading.main_thread().is_alive():  # else the process ends before anyone compiled
            log.warning("Ark compile: %s is not used (%s: %s).", folder, type(error).__name__, error)  # fmt: skip
    return kept


def _read_trace(file: Path) -> list[traces.Ready]:
    """One, or none if it does not hold any more."""
    try:
        trace = traces.Trace.read(file)
        if path := trace.stale():
            log.info("Ark compile: %s is traced anew, as %s changed.", trace.function, path)
            return []
        return [traces.Ready(trace)]
    except Exception as error:  # whatever torch raises at its own bytes: it is compiled anew
        log.warning("Ark: %s is damaged and not used (%s: %s).", file, type(error).__name__, error)  # fmt: skip
        return []


class Compiler:
    """Compiles functions with one mode and one cache on disk.

    Args:
        mode: one of MODES.
        cache: the folder that keeps what was compiled, None to keep nothing (as torch before 2.7 does).

    Attributes:
        graphs: how many graphs were traced since this was made, compiled or not; doing so anew counts, too.
        found: how many graphs of earlier processes are in use, with nothing traced.
        seconds: that torch's backend took.
    """

    def __init__(self, mode: str, cache: Path | None):
        self.mode = mode
        self.cache = cache if hasattr(torch.compiler, "load_cache_artifacts") else None
        self.graphs, self.found, self.seconds = 0, 0, 0.0
        self._fresh = False  # something was compiled that the cache does not have
        self._compiled: dict[Callable, Callable] = {}
        self._made: list[traces.Trace] = []
        self._kept, self._reading = Kept(), None
        if self.cache:
            ahead, with_traces = _ahead.pop(self.cache, None), mode != "reduce-overhead"
            self._reading = ahead or _queue.submit(_read, self.cache, with_traces)

    def __call__(self, function: Callable, prepare: Callable[..., None] | None = None) -> Callable:
        """The compiled function; the same one for the same function.

        Args:
            function: of the top level of a module.
            prepare: called with the arguments before they are traced, to mark what may have any length.
        """
        if function not in self._compiled:
            self._compiled[function] = Compiled(self, function, prepare)
        return self._compiled[function]

    def backend(self, graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable:
        """What torch.compile calls with each graph."""
        from torch._dynamo.utils import counters
        from torch._inductor import list_mode_options
        from torch._inductor.compile_fx import compile_fx

        self.wait()
        start, found = time.perf_counter(), _hits(counters)
        options = {} if self.mode == "default" else list_mode_options(self.mode)
        compiled: Any = compile_fx(graph, inputs, config_patches=options)
        self.graphs += 1
        self._fresh |= _hits(counters) == found
        self.seconds += time.perf_counter() - start
        return compiled

    def wait(self) -> None:
        """Wait until what is kept was read."""
        reading, self._reading = self._reading, None
        if reading:
            self._kept = reading.result()
            self._fresh = not self._kept.torchs

    @property
    def keeps_traces(self) -> bool:
        """Whether what is traced is kept, too: since torch 2.9, not for what CUDA records."""
        self.wait()
        return self._kept.tracing

    def kept(self, function: Callable) -> list[traces.Ready]:
        """What earlier processes traced of a function, ready to run."""
        self.wait()
        return [
            ready for ready in self._kept.ready if ready.trace.function == traces.name_of(function)
        ]

    def add(self, trace: traces.Trace) -> None:
        """Let a trace be kept."""
        self._made.append(trace)

    def keep(self) -> None:
        """Add what was compiled since the last time to the cache; a folder that cannot be written costs only that."""
        if not self.cache or not (self._made or (self._fresh and self.graphs)):
            return
        made, self._made = self._made, []
        found = torch.compiler.save_cache_artifacts() if self._fresh else None
        self._fresh = False
        try:
            self.cache.mkdir(parents=True, exist_ok=True)
            for trace in made:
                trace.write(self.cache / f"{time.time_ns()}{TRACE}")
            if found:
                # A file of its own each time: torch reads back only what was added last.
                file = self.cache / f"{time.time_ns()}{TORCHS}"
                _loaded.add(file)
                draft = file.with_suffix(".draft")
                draft.write_bytes(found[0])
                draft.replace(file)
            for kind in (TORCHS, TRACE):
                for old in sorted(self.cache.glob(f"*{kind}"))[:-FILES]:
                    old.unlink()
        except OSError as error:
            log.warning("Ark: what was compiled is not kept (%s).", error)


class Compiled:
    """A function that runs by a trace of an earlier process, or else through torch.compile.

    Args:
        compiler: compiles, keeps and counts.
        function: the function.
        prepare: called with the arguments before they are traced.
    """

    def __init__(self, compiler: Compiler, function: Callable, prepare: Callable[..., None] | None):
        self._compiler, self._function, self._prepare = compiler, function, prepare
        self._signature = inspect.signature(function)
        self._traced: Callable | None = None
        self._draft = Draft()

    @functools.cached_property
    def _kept(self) -> list[traces.Ready]:
        return self._compiler.kept(self._function)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As the function."""
        bound = self._signature.bind(*args, **kwargs)
        bound.apply_defaults()
        call, why_not = bound.arguments, ""
        for ready in self._kept:
            if not (why_not := ready.why_not(call)):
                self._compiler.found += not ready.used
                return ready(call)
        graphs = self._compiler.graphs
        result = self._trace(call, *args, **kwargs)
        if why_not and self._compiler.graphs > graphs:
            log.info("Ark compile: %s was traced anew (%s).", self._function.__name__, why_not)
        return result

    def _trace(self, call: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Through torch.compile; what it traces is kept."""
        self._compiler.wait()
        if self._prepare:
            self._prepare(*args, **kwargs)
        if not self._compiler.keeps_traces:
            self._traced = self._traced or torch.compile(self._function, backend=self._compiler.backend)  # fmt: skip
            return self._traced(*args, **kwargs)
        if self._traced is None:
            options: dict[str, Any] = {
                "guard_filter_fn": lambda guards: self._draft.guarded(guards)
            }
            self._traced = torch.compile(self._function, backend=self._backend, options=options)
        graphs, state = self._compiler.graphs, traces.state()
        self._draft = draft = Draft()
        try:
            result = self._traced(*args, **kwargs)
            if self._compiler.graphs > graphs:
                self._keep(draft, call, result, state)
        finally:
            draft.close()
        return result

    def _keep(self, draft: Draft, call: dict[str, Any], result: Any, state: str) -> None:
        try:
            self._compiler.add(draft.finish(self._function, call, result, state))
        except Exception as why:  # whatever torch raises where it cannot write; the result is there
            log.info("Ark compile: the next process traces %s again (%s: %s).", self._function.__name__, type(why).__name__, why)  # fmt: skip

    def _backend(self, graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable:
        with torch._functorch.config.patch(bundled_autograd_cache=True):
            compiled = self._compiler.backend(graph, inputs)
        return self._draft.compiled(graph, compiled)


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


def unsuited(mode: str, hardware: Hardware, kernel: str, fp8: bool) -> tuple[str, str] | None:
    """Why a mode cannot work on a machine with an attention kernel, and what can; None if it can.

    Args:
        mode: one of MODES.
        hardware: the card.
        kernel: the attention kernel's name.
        fp8: whether weights are in it.
    """
    if kernel.startswith("sage") and getattr(torch.backends.cuda.matmul, "allow_fp16_accumulation", False):  # fmt: skip
        return (
            "SageAttention, fp16 accumulation and compiling together give noise.",
            "Start ComfyUI without --fast fp16_accumulation, choose another kernel, or set compile to off.",
        )
    if fp8 and (0, 0) < hardware.compute_capability < (8, 9):
        return (
            f"{hardware.name} cannot compile fp8 weights.",
            "Use the bf16 file, or set compile to off.",
        )
    if mode == "reduce-overhead":
        if hardware.device_type != "cuda":
            return f"reduce-overhead records CUDA graphs, this is {hardware.name}.", "Choose default."  # fmt: skip
        if torch.cuda.get_allocator_backend() == "cudaMallocAsync":
            return (
                "reduce-overhead records CUDA graphs, which cudaMallocAsync does not allow.",
                "Start ComfyUI with --disable-cuda-malloc, or choose default.",
            )
    return None


def any_length(tensor: torch.Tensor, dim: int) -> None:
    """Let what is compiled with this argument serve every length of one dimension; all others are compiled in."""
    torch._dynamo.maybe_mark_dynamic(tensor, dim)


def describe(model: Any) -> str:
    """What compiled code depends on of a module: its class, and the shapes and dtypes of its weights."""
    shapes = sorted({(tuple(w.shape), str(w.dtype)) for w in model.parameters()}, key=str)
    return f"{type(model).__qualname__} {shapes}"


def _hits(counters: Any) -> int:
    return (
        counters["inductor"]["fxgraph_cache_hit"] + counters["aot_autograd"]["autograd_cache_hit"]
    )
