"""Which algorithm of cuBLASLt multiplies by a model's matrices: measured once a card, under the load of whole pictures.

Only what gives torch's own numbers bit for bit is considered, so a choice changes no picture.
"""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Callable

import torch

from .ahead import settle
from .architecture import MLP, TXT_LEN, USUAL_TOKENS
from .fused.cublas import Product, form_of, library
from .hardware import Hardware, probe_hardware
from .notebook import recall, remember

BOOK = "matrices"
HEAT = 0.15  # s of work before anything is timed: a card slows down when it has reached its power limit
SLICE, TURNS = 0.015, 4  # s that one algorithm works at a time, and how often
WORTH = 0.98  # of torch's time, at most
Shape = tuple[int, int, int]  # rows of the input, outputs, inputs
log = logging.getLogger("ark")


def usual_shapes(hidden: int) -> list[Shape]:
    """The large products of a step at 1024x1024: of a double block's image stream, and of a single block.

    Args:
        hidden: the model's width.
    """
    img_len, mlp = USUAL_TOKENS - TXT_LEN, MLP * hidden
    double = [(3 * hidden, hidden), (hidden, hidden), (2 * mlp, hidden), (hidden, mlp)]
    single = [(3 * hidden + 2 * mlp, hidden), (hidden, hidden + mlp)]
    return [(img_len, *form) for form in double] + [(USUAL_TOKENS, *form) for form in single]


def known_algorithms(device: torch.device) -> dict[tuple[int, int], bytes]:
    """What `choose_algorithms` remembers, by outputs and inputs: an algorithm, empty where torch's choice is as good."""
    if (key := _key(probe_hardware(device))) is None:
        return {}
    try:
        return {(shape[0], shape[1]): bytes.fromhex(algorithm) for shape, algorithm in recall(BOOK, key)}  # fmt: skip
    except (TypeError, ValueError, LookupError):  # none yet, or not ours
        return {}


def choose_algorithms(device: torch.device, shapes: list[Shape], busy: Callable[[], bool] = lambda: False) -> int:  # fmt: skip
    """Time the algorithms that cuBLASLt offers against torch's choice, and remember the best; a third of a second a shape.

    Args:
        device: that does nothing else meanwhile; nothing is done but on NVIDIA GPUs.
        shapes: of bf16 products, see `usual_shapes`; what is known is not timed again.
        busy: whether the device is wanted for something else; the rest is then left for the next time.

    Returns:
        How many shapes were timed.
    """
    if (key := _key(probe_hardware(device))) is None:
        return 0
    known = known_algorithms(device)
    missing = [shape for shape in shapes if shape[1:] not in known]
    settle()
    with torch.cuda.device(device), torch.inference_mode():
        for done, shape in enumerate(missing):
            if busy():
                return done
            known[shape[1:]] = _fastest(device, shape)
            remember(BOOK, key, [[form, algorithm.hex()] for form, algorithm in known.items()])
    return len(missing)


def _fastest(device: torch.device, shape: Shape) -> bytes:
    """The best algorithm for one shape, empty if that is torch's choice, or hardly faster."""
    count, outputs, inputs = shape
    generator = torch.Generator(device).manual_seed(0)
    x, weight = (torch.randn(rows, inputs, generator=generator, device=device).bfloat16() for rows in (count, outputs))  # fmt: skip
    out, expected = x.new_empty(count, outputs), torch.mm(x, weight.t())
    product = Product(*map(form_of, (x, weight, out)))

    def runs(algorithm: bytes) -> Callable[[], None]:
        return lambda: product.run(algorithm, x, weight, out)

    ways: dict[bytes, Callable[[], object]] = {b"": lambda: torch.mm(x, weight.t(), out=out)}
    for algorithm in product.offered(device):
        out.zero_()
        product.run(algorithm, x, weight, out)
        if torch.equal(out, expected):
            ways[algorithm] = runs(algorithm)
    once = _time(ways[b""], HEAT)
    times: dict[bytes, list[float]] = {algorithm: [] for algorithm in ways}
    for turn in range(TURNS):  # in turns, there and back: what disturbs one disturbs all
        for algorithm in list(ways)[:: 1 if turn % 2 == 0 else -1]:
            times[algorithm].append(_time(ways[algorithm], SLICE, once))
    medians = {algorithm: statistics.median(found) for algorithm, found in times.items()}
    best = min(medians, key=lambda algorithm: medians[algorithm])
    log.info("Ark matrices %s: %.0f us, torch's choice %.0f us.", shape, 1e6 * medians[best], 1e6 * medians[b""])  # fmt: skip
    return best if medians[best] < WORTH * medians[b""] else b""


def _time(work: Callable[[], object], seconds: float, once: float | None = None) -> float:
    """Seconds that one call takes on the device, of as many as fill a time."""
    if once is None:
        start = time.perf_counter()
        work()
        torch.cuda.synchronize()
        once = time.perf_counter() - start
    count = max(2, round(seconds / once))
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(count):
        work()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3 / count


def _key(hardware: Hardware) -> str | None:
    """None where there is nothing to choose from."""
    found = library()
    if hardware.compute_capability == (0, 0) or isinstance(found, str):
        return None
    return f"{hardware.name}, torch {torch.__version__}, cuBLASLt {found.version}"
