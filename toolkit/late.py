"""Numbers that another thread makes, and for which a GPU's stream waits in place of the thread that asks it for work.

So all that is to follow can be asked for meanwhile, and begins as soon as they are there.

Source: cuStreamWaitValue32 in NVIDIA's driver API.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch

AT_LEAST = 0  # CU_STREAM_WAIT_VALUE_GEQ, which goes on after the largest number, too
TURNS = 1 << 32
log = logging.getLogger("ark")


class Late:
    """Does one job after the other in a thread of its own.

    Args:
        name: of the thread.
    """

    def __init__(self, name: str) -> None:
        self._worker, self._lock = ThreadPoolExecutor(1, name), threading.Lock()
        self._begun = 0
        # the number of the last one that is, where devices can read it
        self._done: torch.Tensor | None = None

    def begin(self, job: Callable[[], object]) -> Coming:
        """Have something done. It must not wait for a device: that may be waiting for it."""
        with self._lock:
            # without CUDA there is no stream to wait
            if self._done is None and torch.cuda.is_initialized():
                self._done = torch.zeros(1, dtype=torch.int32, pin_memory=True)
            self._begun = (self._begun + 1) % TURNS
            return Coming(self._worker.submit(self._do, job, self._begun), self._done, self._begun)

    def settle(self) -> None:
        """Wait until everything is done."""
        self._worker.submit(int).result()

    def _do(self, job: Callable[[], object], number: int) -> None:
        try:
            job()
        finally:  # an error is for who asks for the result; the device must not wait for ever
            if self._done is not None:
                ctypes.c_uint32.from_address(self._done.data_ptr()).value = number


class Coming:
    """A job that has begun.

    Attributes:
        result: waits for it, and raises what it raised.
    """

    def __init__(self, future: Future[None], done: torch.Tensor | None, number: int):
        self.result, self._done, self._number = future.result, done, number

    def precede(self, device: torch.device) -> None:
        """Let whatever the current stream of a device is given from now on come after it; waits itself where no stream can.

        Until then the stream takes as much as its queue holds, about a thousand launches. Whoever waits for room there must
        not keep from the job what it needs, such as the interpreter.
        """
        if device.type == "cuda" and self._done is not None and (wait := _wait()) is not None:
            stream, where = torch.cuda.current_stream(device).cuda_stream, self._done.data_ptr()
            with torch.cuda.device(device):
                refused = wait(ctypes.c_void_p(stream), ctypes.c_uint64(where), ctypes.c_uint32(self._number), AT_LEAST)  # fmt: skip
            if not refused:
                return
            _say(f"cuStreamWaitValue32 returned {refused}")
        self.result()


@functools.lru_cache
def _wait() -> Any:
    """The driver's function, None where there is none."""
    try:
        driver = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
        return driver.cuStreamWaitValue32_v2
    except (OSError, AttributeError) as error:
        _say(str(error))
        return None


@functools.lru_cache
def _say(reason: str) -> None:
    """Once for each reason."""
    log.info("Ark: what a GPU needs of other threads is waited for before more is asked of it (%s).", reason)  # fmt: skip
