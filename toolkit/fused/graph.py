"""A step recorded as a CUDA graph: the card runs it as one, and the processor is no longer asked for each kernel.

ComfyUI's default allocator, cudaMallocAsync, makes what is allocated during a recording a part of the graph, there only
while that runs. So nothing of it may outlive the recording, not even a failed one: torch would end the process when it
frees it. The result is copied to a place of its own, what libraries keep for a stream is allocated by a run on that stream
before, and Triton gets addresses (`launch.py`).
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import logging
import sys
import threading
import traceback
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any

import torch

from ..answer import Answer, are_equal
from ..gpu_thread import run_there
from .allocator import ASYNC, refusal

SHAPES = 4  # recorded at most; each holds the memory of one step
log = logging.getLogger("ark")
# held meanwhile: under cudaMallocAsync no other thread may use the device then
recording = threading.Lock()
_turn = threading.RLock()  # to write to what a recording reads, and to run it
Function = Callable[..., torch.Tensor]


class Begun:
    """A result that was begun before it was asked for.

    Args:
        key: of what makes it, and its inputs' forms.
        inputs: that it was begun with.
        result: of them.
        made: the event after which that is there; None if it is.
    """

    def __init__(self, key: Hashable, inputs: tuple[torch.Tensor, ...], result: torch.Tensor, made: Any = None):  # fmt: skip
        self._key, self._inputs, self._result, self._made = key, inputs, result, made
        self._same: Answer | None = None

    def take(self, key: Hashable, inputs: tuple[torch.Tensor, ...]) -> torch.Tensor | None:
        """The result, once, if it may be what is asked for; the device compares the inputs, and nobody waits for that."""
        if self._same is not None or key != self._key:
            return None
        self.leave()
        self._same = are_equal(zip(self._inputs, inputs, strict=True))
        return self._result

    def leave(self) -> None:
        """Let what comes after in the current stream come after it, whether it is wanted or not: it may get its memory."""
        if self._made is not None:
            torch.cuda.current_stream(self._result.device).wait_event(self._made)

    @property
    def taken(self) -> bool:
        """Whether somebody has the result."""
        return self._same is not None

    def right(self) -> bool:
        """Whether the result, if somebody has it, is of the inputs asked for; waits until they are compared."""
        return self._same is None or bool(self._same)


class Graphs:
    """Runs functions of tensors, recorded once the same key has come a few times; a bounded number is kept.

    The first runs load the kernels, and let libraries choose theirs; they go to the thread where those are warm.

    Args:
        after: how many runs of a key are not recorded; recording takes as long as a run, and whoever waits for a first picture
            does not wait for that.
        trying: record whatever the allocator is, to find out.
    """

    def __init__(self, after: int = 1, trying: bool = False) -> None:
        self._failed: str | None = None
        self._after, self._trying = after, trying
        self._runs: dict[Hashable, int] = {}
        self._forms: dict[Hashable, torch.Tensor] = {}  # results without their numbers
        self._recorded: OrderedDict[Hashable, _Recorded] = OrderedDict()
        # one memory for all: they never run at the same time, as there is one stream
        self._pool: Any = None
        self._refusal()  # what is to be found out is so the sooner

    @property
    def why_not(self) -> str | None:
        """The reason why nothing is recorded, None if it is."""
        return self._failed or self._refusal()

    @why_not.setter
    def why_not(self, reason: str) -> None:
        self._failed = reason

    def _refusal(self) -> str | None:
        return None if self._trying or not torch.cuda.is_initialized() else refusal()

    def settled(self, key: Hashable, *inputs: torch.Tensor) -> bool:
        """Whether `run` would record nothing, now or later: it has, or does not."""
        if inputs[0].device.type != "cuda" or self.why_not:
            return True
        return _with_forms(key, inputs) in self._recorded

    def begin(self, key: Hashable, function: Function, *inputs: torch.Tensor) -> Begun | None:
        """Replay what a function did, for who is going to `run` it; None if that takes more than to replay.

        Whoever waits for the current stream does not wait for it. Without a device that has something to replay the function
        is called.
        """
        form = _with_forms(key, inputs)
        if inputs[0].device.type != "cuda":
            return Begun(form, inputs, function(*inputs))
        with _turn:
            if (recorded := self._recorded.get(form)) is None:
                return None
            for each in inputs:  # who has them may let go of them before
                each.record_stream(recorded.stream)
            result, made = recorded.replay(inputs)
            result.record_stream(recorded.stream)
            return Begun(form, inputs, result, made)

    def run(self, key: Hashable, function: Function, *inputs: torch.Tensor, begun: Begun | None = None) -> torch.Tensor:  # fmt: skip
        """Call a function, or replay what it did.

        Args:
            key: of everything but the inputs' numbers: what function reads beside them must stay where it is.
            function: launches kernels only; makes no decision by a number.
            inputs: on a CUDA device.
            begun: what may be the result of it.
        """
        device = inputs[0].device
        if begun and (found := begun.take(_with_forms(key, inputs), inputs)) is not None:
            return found
        call = functools.partial(run_there, function, device=device)
        if device.type != "cuda" or self.why_not:
            return call(*inputs)
        key = _with_forms(key, inputs)
        if (recorded := self._recorded.get(key)) is not None:
            self._recorded.move_to_end(key)
            try:
                return self._replayed(recorded, inputs)
            except RuntimeError as error:  # others have the memory now that it needs while it runs
                log.warning("Ark: a recording is made anew (%s).", str(error).partition("\n")[0])
            del recorded  # here, where the error holds nothing of it any more
            self._drop(key)
            return call(*inputs)
        try:
            if key in self._forms:
                return self._record(key, function, inputs)
        except Exception as error:  # out of memory, or something that cannot be recorded
            self.clear()
            self.why_not = (str(error).splitlines() or [type(error).__name__])[0]
            log.warning("Ark: nothing is recorded as a CUDA graph (%s).", self.why_not)
            torch.cuda.empty_cache()
            return call(*inputs)
        self._runs[key] = runs = self._runs.get(key, 0) + 1
        if runs < self._after:
            return call(*inputs)
        result = self._aside(call, inputs)
        self._forms[key] = torch.empty_like(result, device="meta")
        return result

    def _replayed(self, recorded: _Recorded, inputs: tuple[torch.Tensor, ...]) -> torch.Tensor:
        with _turn:
            result, made = recorded.replay(inputs)
        torch.cuda.current_stream(result.device).wait_event(made)
        return result

    def _aside(self, call: Function, inputs: tuple[torch.Tensor, ...]) -> torch.Tensor:
        """Run it where it will be recorded, if that matters to the allocator."""
        if torch.cuda.get_allocator_backend() != ASYNC:
            return call(*inputs)
        current = torch.cuda.current_stream()
        stream = _stream_on(inputs[0].device)
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            there = call(*inputs)
        current.wait_stream(stream)
        result = there.clone()
        stream.wait_stream(current)  # before it is freed there
        return result

    def _record(self, key: Hashable, function: Function, inputs: tuple[torch.Tensor, ...]) -> torch.Tensor:  # fmt: skip
        if torch.cuda.get_allocator_backend() != ASYNC:  # which shares by itself
            self._pool = self._pool or torch.cuda.graph_pool_handle()
        stream = _stream_on(inputs[0].device)
        with recording:
            how = function, inputs, self._forms[key], self._pool, stream
            recorded = run_there(_Recorded, *how, device=inputs[0].device)
        result = self._replayed(recorded, inputs)
        self._recorded[key] = recorded
        while len(self._recorded) > SHAPES:
            self._drop(next(iter(self._recorded)))
        return result

    def _drop(self, *keys: Hashable) -> None:
        """Give up recordings; one of them may have been begun, and is still running."""
        with _turn:
            for key in keys:
                self._recorded[key].stream.synchronize()
                del self._recorded[key]

    @property
    def recorded(self) -> int:
        """How many recordings there are."""
        return len(self._recorded)

    def holds(
        self, key: Hashable, *forms: tuple[tuple[int, ...], torch.dtype, torch.device]
    ) -> bool:
        """Whether there is one for a key and the shapes, dtypes and devices of its inputs."""
        return (key, *forms) in self._recorded

    def clear(self) -> None:
        """Give up what was recorded, and its memory."""
        with _turn:
            self._runs.clear()
            self._forms.clear()
            self._pool = None
            if self._recorded:
                self._drop(*self._recorded)
                trim()


@functools.lru_cache
def _stream_on(device: torch.device) -> Any:
    """The one that all recordings are made and replayed on."""
    return torch.cuda.Stream(device)


def _with_forms(key: Hashable, inputs: tuple[torch.Tensor, ...]) -> Hashable:
    return (key, *((tuple(x.shape), x.dtype, x.device) for x in inputs))


class _Recorded:
    """One recording and the buffers that it reads and writes.

    All are replayed on one stream of a device: so they take turns, and under cudaMallocAsync they share their memory, which
    stays where it is.
    """

    def __init__(self, function: Function, inputs: tuple[torch.Tensor, ...], form: torch.Tensor, pool: Any, stream: Any):  # fmt: skip
        self.inputs = tuple(x.clone(memory_format=torch.contiguous_format) for x in inputs)
        self.output = torch.empty_like(form, device=inputs[0].device)
        self.graph, self.stream = torch.cuda.CUDAGraph(), stream
        with torch.cuda.graph(self.graph, pool, stream, capture_error_mode="thread_local"):
            try:
                self.output.copy_(function(*self.inputs))
            except BaseException as error:
                _forget(error)
                raise

    def replay(self, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, Any]:
        """The result, and the event after which it is there."""
        result, made = torch.empty_like(self.output), torch.cuda.Event()
        self.stream.wait_stream(torch.cuda.current_stream(result.device))
        with torch.cuda.stream(self.stream):
            for mine, given in zip(self.inputs, inputs, strict=True):
                mine.copy_(given)
            self.graph.replay()
            result.copy_(self.output)
            made.record(self.stream)
        return result, made


def _forget(error: BaseException | None) -> None:
    """Free what the frames hold that an error went through, and those before it."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__


def trim() -> None:
    """Give the memory of recordings that are gone back to the device, which under cudaMallocAsync torch does not do."""
    if torch.cuda.get_allocator_backend() != ASYNC:
        return
    with contextlib.suppress(OSError, AttributeError):
        driver = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
        for number in range(torch.cuda.device_count()):
            driver.cuDeviceGraphMemTrim(number)
