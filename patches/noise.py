"""The host's noise without the host, drawn before it is asked for where its seed is known.

To draw it takes the processor 2 to 4 ms for a picture of 1024x1024, in which the device would have nothing to do. What a step is
begun with before that is there the device draws itself (`toolkit/mersenne.py`).
"""

from __future__ import annotations

import contextlib
import logging
import math
import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import comfy.sample
import torch

from ..toolkit.fused import reference
from ..toolkit.fused.graph import recording
from ..toolkit.fused.runner import operations_for
from ..toolkit.mersenne import CpuRandn
from .deliver import current, pinned, upload
from .euler import is_hosts
from .guard import KEY, SAMPLER_SAMPLE

SEEING_NOISE = "outer_sample", SAMPLER_SAMPLE  # of the host's WrappersMP
KEPT = 4  # seeds that are expected, and shapes that a device draws
SEED = 2685821657736338717  # of the numbers by which it is found out whether that is right
MOST_NUMBERS = 1 << 21  # of what is drawn ahead: four pictures of 1024x1024
LEAST_NUMBERS = 1 << 17  # that a device draws: a picture of 512x512
PARTS = 16  # in which it does
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


log = logging.getLogger("ark")
_worker, _seeds = ThreadPoolExecutor(1, "ark-noise"), ThreadPoolExecutor(1, "ark-seed")
_finder = ThreadPoolExecutor(1, "ark-randn")
_lock = threading.Lock()
_coming: OrderedDict[tuple[int, Shape, str], Future[Drawn]] = OrderedDict()
_last: tuple[Shape, str] | None = None  # of the last run: its shape, and the type of its device
# what draws a shape on a device, if anything
_there: dict[tuple[Shape, torch.device], CpuRandn | None] = {}


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


def ahead(seed: int, shape: Shape, device: torch.device) -> torch.Tensor | None:
    """The noise of a seed on a device, at once; None if that takes long."""
    shape = tuple(shape)
    if math.prod(shape) > MOST_NUMBERS:
        return None
    key = seed, shape, device.type
    with _lock:
        coming = _coming.get(key)
    # no other thread is waited for, which may wait for this one
    if coming is None or not coming.done():
        if (found := _draw_there(seed, shape, device)) is not None:
            return found
        coming = Future()
        coming.set_result(_draw(*key))
        _keep(key, coming)  # for the run that is going to ask for it
    there, _ = coming.result()
    return there.to(device, non_blocking=there.is_pinned())


def hurry(device: torch.device) -> None:
    """Find out, in another thread, whether a device can draw noise as the last run's.

    Args:
        device: of its model.
    """
    if _last is not None and (_last[0], device) not in _there:
        _finder.submit(_find, _last[0], device)


def expect(seed: int) -> None:
    """Have the noise of a seed drawn, in another thread, for a run that is otherwise like the last one."""
    last = _last
    if last is None or math.prod(last[0]) > MOST_NUMBERS:
        return
    key = seed, *last
    with _lock:
        known = key in _coming
    if not known:
        _keep(key, _worker.submit(_draw, *key))


def _keep(key: tuple[int, Shape, str], coming: Future[Drawn]) -> None:
    with _lock:
        _coming[key] = coming
        while len(_coming) > KEPT:
            _coming.popitem(last=False)[1].cancel()


def settle() -> None:
    """Wait until everything is drawn, and found out."""
    _worker.submit(int).result()
    _finder.submit(int).result()


def _find(shape: Shape, device: torch.device) -> None:
    """It has to draw the same as the processor, whatever torch this is."""
    if (shape, device) in _there:  # it was asked for twice
        return
    count, made = math.prod(shape), None
    operations, _ = operations_for(device)
    if LEAST_NUMBERS <= count <= MOST_NUMBERS and operations is not reference:
        try:
            drawing = CpuRandn(count, PARTS, device, operations)
            with current(device), torch.inference_mode():
                operations.compile_randn()
                with recording:
                    found = drawing.randn(SEED)
            expected, _ = _draw(SEED, shape, "cpu")
            if not torch.equal(found.cpu(), expected.view(-1)):
                raise ValueError("the device's is another, as of a processor without AVX2")
            made = drawing
        except torch.cuda.OutOfMemoryError:  # the next run asks again
            return
        except Exception as error:  # a Triton that is broken raises whatever it likes
            log.info("Ark: the processor draws noise (%s).", str(error).partition("\n")[0])
    while len(_there) >= KEPT:
        del _there[next(iter(_there))]
    _there[shape, device] = made


def _draw_there(seed: int, shape: Shape, device: torch.device) -> torch.Tensor | None:
    if (drawing := _there.get((shape, device))) is None:
        return None
    try:
        return drawing.randn(seed).view(shape)
    except torch.cuda.OutOfMemoryError:
        raise
    except Exception as error:  # a Triton that is broken raises whatever it likes
        _there[shape, device] = None
        log.info("Ark: the processor draws noise from now on (%s).", str(error).partition("\n")[0])
        return None


def _draw(seed: int, shape: Shape, device_type: str) -> Drawn:
    """In order, however the latents lie, and from where a device can be sent it."""
    generator = torch.Generator().manual_seed(seed)
    there = _empty(shape, device_type)
    return torch.randn(shape, generator=generator, out=there), generator


def _empty(shape: Shape, device_type: str) -> torch.Tensor:
    there = torch.empty(shape, dtype=torch.float32)
    found = pinned(there) if device_type == "cuda" else None
    return there if found is None else found


def _set_seed(seed: int, generator: torch.Generator) -> None:
    """Leave torch's own generators as the host does: to set the seeds of all devices takes it as long as to draw."""
    torch.manual_seed(seed)
    torch.set_rng_state(generator.get_state())
