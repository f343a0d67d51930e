"""Which algorithm of cuBLASLt multiplies by a model's matrices: measured once a card, under the load of whole pictures.

Only what gives torch's own numbers bit for bit, at the sizes that are timed, is considered.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from .ahead import settle
from .architecture import MLP, TXT_LEN, USUAL_TOKENS
from .fused.cublas import LENGTH, Product, form_of, library, multiply
from .fused.matrix import Chosen, Fp8, Known, Plain, quantise
from .hardware import Hardware, probe_hardware
from .notebook import recall, remember

BOOK = "matrices"
HEAT = 0.15  # s of work before anything is timed: a card slows down when it has reached its power limit
SLICE, TURNS = 0.015, 4  # s that one algorithm works at a time, and how often
FINALISTS = 4  # that are looked at so closely
WORTH = 0.98  # of torch's time, at most
# compute capability that has the precision, in fp8 with a scale a row
FIRST = {"bf16": (8, 0), "fp8": (9, 0)}
Shape = tuple[int, int, int]  # rows of the input, outputs, inputs
log = logging.getLogger("ark")


def usual_shapes(hidden: int, references: Sequence[int] = (0, 1)) -> list[Shape]:
    """The large products of a step at 1024x1024: of a double block's image stream, and of a single block, whose first may be two.

    Args:
        hidden: the model's width.
        references: how many pictures of the same size are edited.
    """
    mlp, qkv = MLP * hidden, 3 * hidden
    double = [(qkv, hidden), (hidden, hidden), (2 * mlp, hidden), (hidden, mlp)]
    single = [(qkv + 2 * mlp, hidden), (qkv, hidden), (hidden, hidden + mlp)]
    shapes: list[Shape] = []
    for count in references:
        img_len = (1 + count) * (USUAL_TOKENS - TXT_LEN)
        shapes += [(img_len, *form) for form in double]
        shapes += [(TXT_LEN + img_len, *form) for form in single]
    return shapes


def known_algorithms(device: torch.device, precision: str) -> Known:
    """What `choose_algorithms` remembers, by outputs and inputs."""
    found: dict[tuple[int, int], Chosen] = {}
    for (count, *form), algorithm in _known(device, precision).items():
        found[form[0], form[1]] = (*found.get((form[0], form[1]), ()), (count, algorithm))
    return found


def _known(device: torch.device, precision: str) -> dict[Shape, bytes]:
    if (key := _key(probe_hardware(device), precision)) is None:
        return {}
    found: dict[Shape, bytes] = {}
    try:
        for (count, outputs, inputs), algorithm in recall(BOOK, key):
            if len(kept := bytes.fromhex(algorithm)) in (0, LENGTH) and int(count) > 0:
                found[int(count), int(outputs), int(inputs)] = kept
    except (TypeError, ValueError, LookupError):  # none yet, or not ours
        return {}
    return found


def choose_algorithms(
    device: torch.device, shapes: list[Shape], precision: str, busy: Callable[[], bool] = lambda: False
) -> int:  # fmt: skip
    """Time the algorithms that cuBLASLt offers against torch's choice, and remember the best; half a second a shape.

    Args:
        device: that does nothing else meanwhile; nothing is done but on NVIDIA GPUs.
        shapes: of products, see `usual_shapes`; what is known is not timed again.
        precision: of the inputs, "bf16", or "fp8" with a scale a row; results are bf16.
        busy: whether the device is wanted for something else; the rest is then left for the next time.

    Returns:
        How many shapes were timed.
    """
    if (key := _key(probe_hardware(device), precision)) is None:
        return 0
    known = _known(device, precision)
    missing = [shape for shape in shapes if shape not in known]
    if not missing:
        return 0
    log.info("Ark matrices: products in %s are timed, once for this card.", precision)
    settle()
    with torch.cuda.device(device), torch.inference_mode():
        for done, shape in enumerate(missing):
            if busy():
                return done
            try:
                known[shape] = _fastest(device, shape, precision)
            except RuntimeError as error:
                # out of memory, too: torch's choice runs, until it is tried again
                log.warning("Ark matrices: %s in %s could not be timed (%s).", shape, precision, str(error).splitlines()[0])  # fmt: skip
                return done
            remember(BOOK, key, [[each, algorithm.hex()] for each, algorithm in known.items()])
    return len(missing)


def _fastest(device: torch.device, shape: Shape, precision: str) -> bytes:
    """The best algorithm for one shape, empty if that is torch's choice, or hardly faster."""
    count, outputs, inputs = shape
    generator = torch.Generator(device).manual_seed(0)
    x, weight = (torch.randn(rows, inputs, generator=generator, device=device).bfloat16() for rows in (count, outputs))  # fmt: skip
    out, fp8 = x.new_empty(count, outputs), precision == "fp8"
    given: Any = quantise(x) if fp8 else x
    matrix = Fp8.of(weight, quantise) if fp8 else Plain(weight)
    data, scales = (given.data, (given.scale, matrix.scale)) if isinstance(matrix, Fp8) else (x, ())
    product = Product(*map(form_of, (data, matrix.weight, out)), fp8=fp8)
    offered = product.offered(device)
    offered += product.variants(offered[0], device) if fp8 and offered else []
    ways: dict[bytes, Callable[[], object]] = {b"": lambda: matrix(given, out)}
    expected = matrix(given)
    for algorithm in offered:
        out.zero_()
        found = multiply(algorithm, data, matrix.weight, out, scales)
        if found is not None and torch.equal(found, expected):
            known = {(outputs, inputs): ((count, algorithm),)}
            by_it: Any = dataclasses.replace(matrix, known=known)
            ways[algorithm] = functools.partial(by_it, given, out)
    once = seconds_of(ways[b""], HEAT)
    first = _in_turns(ways, SLICE / 2, 2, once)
    best = {b"", *sorted(first, key=lambda algorithm: first[algorithm])[:FINALISTS]}
    times = _in_turns({algorithm: ways[algorithm] for algorithm in best}, SLICE, TURNS, once)
    chosen = min(times, key=lambda algorithm: times[algorithm])
    log.info("Ark matrices %s in %s: %.0f us, torch's choice %.0f us.", shape, precision, 1e6 * times[chosen], 1e6 * times[b""])  # fmt: skip
    return chosen if times[chosen] < WORTH * times[b""] else b""


def _in_turns(ways: dict[bytes, Callable[[], object]], seconds: float, turns: int, once: float) -> dict[bytes, float]:  # fmt: skip
    """Median time of each, s, in turns, there and back: what disturbs one disturbs all."""
    times: dict[bytes, list[float]] = {algorithm: [] for algorithm in ways}
    for turn in range(turns):
        for algorithm in list(ways)[:: 1 if turn % 2 == 0 else -1]:
            times[algorithm].append(seconds_of(ways[algorithm], seconds, once))
    return {algorithm: statistics.median(found) for algorithm, found in times.items()}


def seconds_of(work: Callable[[], object], seconds: float, once: float | None = None) -> float:
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


def _key(hardware: Hardware, precision: str) -> str | None:
    """None where there is nothing to choose from."""
    found = library()
    if hardware.compute_capability < FIRST[precision] or isinstance(found, str):
        return None
    return f"{hardware.name}, torch {torch.__version__}, cuBLASLt {found.version}, {precision}"
