"""The host's noise without the host, drawn before it is asked for where its seed is known.

To draw it takes the processor 2 ms for a picture of 1024x1024, in which the device would have nothing to do.
"""

from __future__ import annotations

import contextlib
import math
import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import comfy.sample
import torch

from .deliver import pinned, upload
from .euler import is_hosts
from .guard import KEY, SAMPLER_SAMPLE

SEEING_NOISE = "outer_sample", SAMPLER_SAMPLE  # of the host's WrappersMP
KEPT = 4  # seeds that are expected
MOST_NUMBERS = 1 << 21  # of what is drawn ahead: four pictures of 1024x1024
Shape = tuple[int, ...]
Drawn = tuple[torch.Tensor, torch.Generator]


class Noise(NamedTuple):
    """Of a run.

    Attributes:
        tensor: [B, C, H, W] on the model's device.
        own: whether nobody else has a hand in it.
        settle: waits until torch's own generators are as the host leaves them.
    """

    tensor: torch.Tensor
    own: bool
    settle: Callable[[], Any]


_worker, _seeds = ThreadPoolExecutor(1, "ark-noise"), ThreadPoolExecutor(1, "ark-seed")
_lock = threading.Lock()
_coming: OrderedDict[tuple[int, Shape, str], Future[Drawn]] = OrderedDict()
_last: tuple[Shape, str] | None = None  # of the last run: its shape, and the type of its device


def noise_for(model: Any, samples: torch.Tensor, seed: int, indices: Any) -> Noise:
    """The noise of a run, the same as the host's.

    Args:
        model: the host's ModelPatcher.
        samples: latents [B, C, H, W].
        seed: of the run.
        indices: of the pictures in a larger batch, None if there is none.
    """
    global _last
    device = torch.device(model.load_device)
    options = model.model_options.get("transformer_options", {})
    wrappers = model.wrappers, options.get("wrappers", {})  # either way
    seen = any(found.get(kind, {}).keys() - {KEY} for found in wrappers for kind in SEEING_NOISE)
    # nobody has replaced it
    own = is_hosts(comfy.sample, "prepare_noise")
    if indices is not None or samples.dtype is not torch.float32 or not own or seen:
        drawn = comfy.sample.prepare_noise(samples, seed, indices)
        return Noise(upload(drawn, device), False, lambda: None)
    _last = tuple(samples.shape), device.type
    with _lock:
        coming = _coming.pop((seed, *_last), None)
    found = None
    if coming is not None:
        with contextlib.suppress(RuntimeError):  # there was no memory then
            found = coming.result()
    there, generator = found or _draw(seed, *_last)
    settled = _seeds.submit(_set_seed, seed, generator)
    return Noise(there.to(device, non_blocking=there.is_pinned()), True, settled.result)


def expect(seed: int) -> None:
    """Have the noise of a seed drawn, in another thread, for a run that is otherwise like the last one."""
    last = _last
    if last is None or math.prod(last[0]) > MOST_NUMBERS:
        return
    key = seed, *last
    with _lock:
        if key not in _coming:
            _coming[key] = _worker.submit(_draw, *key)
            while len(_coming) > KEPT:
                _coming.popitem(last=False)[1].cancel()


def settle() -> None:
    """Wait until everything is drawn."""
    _worker.submit(int).result()


def _draw(seed: int, shape: Shape, device_type: str) -> Drawn:
    """In order, however the latents lie, and from where a device can be sent it."""
    generator = torch.Generator().manual_seed(seed)
    there = torch.empty(shape, dtype=torch.float32)
    if device_type == "cuda" and (found := pinned(there)) is not None:
        there = found
    return torch.randn(shape, generator=generator, out=there), generator


def _set_seed(seed: int, generator: torch.Generator) -> None:
    """Leave torch's own generators as the host does: to set the seeds of all devices takes it as long as to draw."""
    torch.manual_seed(seed)
    torch.set_rng_state(generator.get_state())
