"""Klein 4B's matrix products by torch's choice of cuBLASLt's algorithms, and by Ark's: `python benchmarks/matrices.py`.

In bf16 and in fp8, at the shapes of 1024x1024 and of editing with one reference, each as many times as fill a while, in turns,
on a card that is kept at work, as it is during a picture. What Ark has chosen is remembered; on a card that is new to it this
chooses first. The results must be the same, bit for bit. Needs an NVIDIA GPU.
"""

from __future__ import annotations

import argparse
import dataclasses
import platform
import statistics

import torch

from ark.benchmarks.record import row, write_record
from ark.toolkit.fused.cublas import library
from ark.toolkit.fused.matrix import Fp8, Known, Plain, algorithm_for, quantise
from ark.toolkit.fused.runner import PRECISIONS
from ark.toolkit.matrices import (
    HEAT,
    Shape,
    choose_algorithms,
    known_algorithms,
    seconds_of,
    usual_shapes,
)

HIDDEN = 3072  # width of Klein 4B
WHILE = 0.04  # s that one works at a time


def compare(device: torch.device, shape: Shape, precision: str, known: Known, turns: int) -> dict:  # fmt: skip
    """A row: milliseconds of one product."""
    count, outputs, inputs = shape
    x, weight = (torch.randn(rows, inputs, device=device).bfloat16() for rows in (count, outputs))
    given = quantise(x) if precision == "fp8" else x
    own = Fp8.of(weight, quantise) if precision == "fp8" else Plain(weight)
    ways = {"torch": own, "ark": dataclasses.replace(own, known=known)}
    if not torch.equal(ways["ark"](given), own(given)):
        raise SystemExit(f"{shape} in {precision}: the algorithm gives other numbers.")
    once = seconds_of(lambda: own(given), HEAT)
    times: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(turns):
        for name in list(ways)[:: 1 if turn % 2 == 0 else -1]:
            times[name].append(1e3 * seconds_of(lambda way=ways[name]: way(given), WHILE, once))
    median = {name: statistics.median(found) for name, found in times.items()}
    rate = 2 * count * outputs * inputs / median["ark"] / 1e9
    note = f"{rate:.0f} TFLOP/s" + (
        "" if algorithm_for(count, weight, known) else "; torch's choice is as good"
    )
    found = row(f"{count}x{outputs}x{inputs} {precision}", median["ark"], "ms", turns, {"torch": median["torch"]}, note=note)  # fmt: skip
    print(found, flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--turns", type=int, default=6)
    args = parser.parse_args()
    if not torch.cuda.is_available() or isinstance(library(), str):
        parser.error("this needs an NVIDIA GPU, and torch's cuBLASLt")
    device, rows = torch.device("cuda", torch.cuda.current_device()), []
    with torch.inference_mode():
        for precision in PRECISIONS:
            shapes = usual_shapes(HIDDEN)
            choose_algorithms(device, shapes, precision)
            known = known_algorithms(device, precision)
            rows += [compare(device, shape, precision, known, args.turns) for shape in shapes]
    versions = {"python": platform.python_version(), "torch": torch.__version__, "cublaslt": str(library().version)}  # fmt: skip
    print(write_record("matrices", torch.cuda.get_device_name(), versions, rows))


if __name__ == "__main__":
    main()
