"""Every attention kernel at Klein's shapes: `python benchmarks/attention.py`.

Time and error against fp32 of each kernel that runs on this card, of what Ark's "auto" takes, and of what ComfyUI takes by
itself (`comfyui_default`: torch's attention with flash first, as ComfyUI 0.33 orders it on Linux). Needs an NVIDIA GPU;
`--tiny` runs it at small size on a CPU, to test the benchmark itself (then nothing is recorded).
"""

from __future__ import annotations

import argparse
import platform

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from ark.benchmarks.record import bar_chart, row, write_record
from ark.toolkit.architecture import HEAD_DIM, USUAL_HEADS
from ark.toolkit.combustion import Measurement, measure_kernels
from ark.toolkit.hardware import Hardware, probe_hardware
from ark.toolkit.kernels import KERNELS, AttentionKernel

SEQUENCES = (4608, 8704)  # text to image at 1024x1024; the same with one reference image
ORDER = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def host_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """What ComfyUI 0.33 calls, in its order of backends."""
    with sdpa_kernel(ORDER, set_priority=True):
        return F.scaled_dot_product_attention(q, k, v)


HOST = AttentionKernel("comfyui_default", tuple(KERNELS["math"].dtypes), host_attention, lambda hardware: None)  # fmt: skip


def rounds(hardware: Hardware, device: torch.device, shape: tuple, dtype: torch.dtype, count: int) -> dict[str, Measurement]:  # fmt: skip
    """The best of several rounds of each kernel, the rounds one after the other."""
    best: dict[str, Measurement] = {}
    for _ in range(count):
        for found in measure_kernels(hardware, device, shape, dtype, {**KERNELS, HOST.name: HOST}):
            if found.name not in best or (found.ms or 1e9) < (best[found.name].ms or 1e9):
                best[found.name] = found
    return best


def measure(hardware: Hardware, device: torch.device, shape: tuple[int, int, int, int], dtype: torch.dtype, count: int) -> dict:  # fmt: skip
    """One shape of q, k and v: prints the table and gives the row, in which Ark is what "auto" takes."""
    found = rounds(hardware, device, shape, dtype, count)
    print(shape, dtype)
    for measurement in sorted(found.values(), key=lambda m: m.ms or 1e9):
        print(" ", measurement)
    for name in KERNELS.keys() - found.keys():
        print(f"  {name:16} {KERNELS[name].unavailable(hardware) or 'does not take this dtype'}")
    good = {m.name: m.ms for m in found.values() if m.problem is None and m.name != HOST.name}
    auto = min(good, key=good.get)
    peers = {name: m.ms for name, m in found.items() if m.ms and name != auto}
    errors = ", ".join(f"{m.name} {m.relative_error:.4f}" for m in found.values() if m.ms)
    return row(str(shape[2]), good[auto], "ms", count, peers, note=f"auto: {auto}; relative errors: {errors}")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and not args.tiny:
        parser.error("this needs a GPU; --tiny tests the script itself")
    hardware, rows = probe_hardware(device), []
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    for seq_len in (64,) if args.tiny else SEQUENCES:
        shape = (1, 2 if args.tiny else USUAL_HEADS, seq_len, HEAD_DIM)
        rows.append(measure(hardware, device, shape, dtype, args.rounds))
    if args.tiny:
        print(rows)
        return
    versions = {"python": platform.python_version(), "torch": torch.__version__, **dict(hardware.packages)}  # fmt: skip
    print(write_record("attention", hardware.name, versions, rows))
    print(bar_chart("attention", f"Attention (1, 24, n, 128) bf16 in ms ({hardware.name}), shorter is better", rows))  # fmt: skip


if __name__ == "__main__":
    main()
