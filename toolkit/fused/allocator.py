"""Whether anything may be recorded under the allocator that this process has.

Under torch's own, always. Under cudaMallocAsync, which ComfyUI chooses, torch ends the process where a recording goes
wrong: so that is tried in a process of its own first, once for each card and set of versions, and remembered.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import threading
import time
from pathlib import Path

import torch

from ..cache import cache_folder
from ..notebook import recall, remember
from ..packages import package_version
from ..probe import probe

ASYNC = "cudaMallocAsync"
BOOK, ATTEMPT = "recordings", "cuda_graph"
LATER = 5.0  # s; whoever asked is about to make a first picture
SECONDS = 120.0  # a cold disk, and kernels to compile
NEEDED = 3 << 30  # bytes that must be free on the device for another process
WAIT = "it is being tried whether cudaMallocAsync allows it"
PASSING = "out of memory", "did not end"  # what may be otherwise the next time
# what the answer depends on beside versions
SOURCES = "graph.py", "graph_attempt.py", "launch.py", "../gpu_thread.py"
log = logging.getLogger("ark")
_lock = threading.Lock()
_answers: dict[tuple[str, str], str | None] = {}  # why not, by cache folder and key


def refusal() -> str | None:
    """Why nothing is recorded at present, None if it is; the first question starts the attempt."""
    if torch.cuda.get_allocator_backend() != ASYNC:
        return None
    name = str(cache_folder()), _key()
    with _lock:
        if name not in _answers:
            _answers[name] = known = recall(BOOK, name[1])
            if not isinstance(known, str):
                _answers[name] = WAIT
                threading.Thread(target=_find_out, args=(name,), daemon=True).start()
        return _answers[name] or None


def _find_out(name: tuple[str, str]) -> None:
    time.sleep(LATER)
    try:
        problem = _attempt()
    except Exception as error:
        problem = f"the attempt failed: {error}"
    if problem:
        problem = f"cudaMallocAsync does not allow it ({problem}), --disable-cuda-malloc does"
        log.warning("Ark: nothing is recorded as a CUDA graph: %s.", problem)
    if not (problem and any(passing in problem.lower() for passing in PASSING)):
        remember(BOOK, name[1], problem or "")
    _answers[name] = problem


def _attempt() -> str | None:
    """Record in another process; what went wrong."""
    if torch.cuda.mem_get_info()[0] < NEEDED:
        return f"the device was out of memory for the attempt, which wants {NEEDED >> 30} GB"
    tried = probe((ATTEMPT,), SECONDS)[ATTEMPT]
    if not tried.problem and tried.facts["backend"] != ASYNC:
        return "it was tried under another allocator"
    return tried.problem


@functools.cache
def _key() -> str:
    here = Path(__file__).parent
    code = hashlib.sha256(b"".join((here / name).read_bytes() for name in SOURCES)).hexdigest()[:12]
    cards = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    versions = torch.__version__, package_version("triton"), torch.backends.cudnn.version()
    return ", ".join(map(str, (*cards, *versions, code)))
