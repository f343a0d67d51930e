"""A step recorded as a CUDA graph: the card runs it as one, and the processor is no longer asked for each kernel."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any

import torch

SHAPES = 4  # recorded at most; each holds the memory of one step
log = logging.getLogger("ark")
Function = Callable[..., torch.Tensor]


class Graphs:
    """Runs functions of tensors, recorded at the second time that the same key comes; a bounded number is kept.

    The first run loads the kernels, and lets libraries choose theirs.

    Attributes:
        why_not: the reason why nothing is recorded any more, None if it is.
    """

    def __init__(self) -> None:
        self.why_not: str | None = None
        if torch.cuda.is_available() and torch.cuda.get_allocator_backend() == "cudaMallocAsync":
            self.why_not = "cudaMallocAsync does not allow it, --disable-cuda-malloc does"
        self._seen: set[Hashable] = set()
        self._recorded: OrderedDict[Hashable, _Recorded] = OrderedDict()
        self._pool: Any = None  # one memory for all: they never run at the same time

    def run(self, key: Hashable, function: Function, *inputs: torch.Tensor) -> torch.Tensor:
        """Call a function, or replay what it did.

        Args:
            key: of everything but the inputs' numbers: what function reads beside them must stay where it is.
            function: launches kernels only; makes no decision by a number.
            inputs: on a CUDA device.
        """
        if self.why_not or inputs[0].device.type != "cuda":
            return function(*inputs)
        key = (key, *((tuple(x.shape), x.dtype, x.device) for x in inputs))
        if key in self._recorded:
            self._recorded.move_to_end(key)
            return self._recorded[key].replay(inputs)
        if key not in self._seen:
            self._seen.add(key)
            return function(*inputs)
        try:
            self._pool = self._pool or torch.cuda.graph_pool_handle()
            recorded = _Recorded(function, inputs, self._pool)
        except RuntimeError as error:  # out of memory, or something that cannot be recorded
            self.clear()
            self.why_not = str(error).splitlines()[0]
            log.warning("Ark: nothing is recorded as a CUDA graph (%s).", self.why_not)
            torch.cuda.empty_cache()
            return function(*inputs)
        self._recorded[key] = recorded
        while len(self._recorded) > SHAPES:
            self._recorded.popitem(last=False)
        return recorded.replay(inputs)

    @property
    def recorded(self) -> int:
        """How many recordings there are."""
        return len(self._recorded)

    def clear(self) -> None:
        """Give up what was recorded, and its memory."""
        self._seen.clear()
        self._recorded.clear()
        self._pool = None


class _Recorded:
    """One recording and the buffers that it reads and writes."""

    def __init__(self, function: Function, inputs: tuple[torch.Tensor, ...], pool: Any):
        self.inputs = tuple(x.clone(memory_format=torch.contiguous_format) for x in inputs)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, pool=pool, capture_error_mode="thread_local"):
            self.output = function(*self.inputs)

    def replay(self, inputs: tuple[torch.Tensor, ...]) -> torch.Tensor:
        for mine, given in zip(self.inputs, inputs, strict=True):
            mine.copy_(given)
        self.graph.replay()
        return self.output.clone()
