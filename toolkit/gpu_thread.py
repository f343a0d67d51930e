"""The thread in which a GPU's libraries get ready, and in which the first runs of an engine follow.

Torch keeps what cuDNN and cuBLAS prepare, like the plan of an attention of one size (40 ms), for each thread of its own:
warmed up anywhere else, a first picture would wait for it again.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

import torch

Result = TypeVar("Result")
_local = threading.local()
_waiting: deque[tuple[Future, Callable[[], Any]]] = deque()
_executor = ThreadPoolExecutor(1, "ark-gpu", initializer=lambda: setattr(_local, "here", True))


def submit(job: Callable[[], Result]) -> Future[Result]:
    """Have something done there, after all that waits."""
    return _put(_waiting.append, job)


def run_there(function: Callable[..., Result], *inputs: Any, device: torch.device) -> Result:
    """Call a function there, before anything else that waits, as if it were called here.

    Whoever holds a lock that a submitted job waits for must not call this.

    Args:
        function: launches work on a device.
        inputs: of the function.
        device: a CUDA device, whose current stream is current there, too; elsewhere there is nothing to be gained.

    Raises:
        Exception: whatever the function does.
    """
    if device.type != "cuda" or getattr(_local, "here", False):
        return function(*inputs)
    stream = torch.cuda.current_stream(device)
    inference, grad = torch.is_inference_mode_enabled(), torch.is_grad_enabled()

    def there() -> Result:
        with torch.inference_mode(inference), torch.set_grad_enabled(grad), torch.cuda.stream(stream):  # fmt: skip
            return function(*inputs)

    return _put(_waiting.appendleft, there).result()


def _put(put: Callable[[Any], None], job: Callable[[], Result]) -> Future[Result]:
    future: Future[Result] = Future()
    put((future, job))
    _executor.submit(_next)
    return future


def _next() -> None:
    future, job = _waiting.popleft()
    try:
        future.set_result(job())
    except BaseException as error:  # whoever waits for it gets it
        future.set_exception(error)
        del future, job  # the error knows this frame
