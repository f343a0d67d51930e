"""Which attention kernel: measured at the model's own shape, checked against fp32, and never chosen without a reason."""

from __future__ import annotations

import dataclasses
import logging
import math
import statistics
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from .ahead import settle
from .errors import KernelUnavailable
from .hardware import Hardware
from .kernels import KERNELS, AttentionKernel
from .kernels.sdpa import attend_math
from .notebook import recall, remember

# At most, against fp32, of kernels that quantise and of those that do not. INT8 kernels have 0.016 on random numbers, those
# in fp8 0.06: they run where they are named.
RELATIVE_ERROR = {True: 0.03, False: 0.02}
COSINE = 0.995  # at least
WARM_UP, REPEAT = 3, 10
STEADY, ATTEMPTS = 1.5, 3  # the spread of what is remembered; how often it is tried
CHECKED_HEADS = 2  # fp32 attention of all heads would take gigabytes
BOOK = "attention"
log = logging.getLogger("ark")
_measuring = threading.Lock()


@dataclass(frozen=True)
class Measurement:
    """One kernel at one shape.

    Attributes:
        name: the kernel's.
        ms: median of a call; None if it failed.
        tflops: what that is in TFLOP/s.
        relative_error: of its result against fp32, |a - b| / |b|.
        cosine: between its result and fp32's.
        problem: why it must not be chosen, or None.
        spread: how many times the fastest call the median is; near 1 on a device that does nothing else.
    """

    name: str
    ms: float | None = None
    tflops: float | None = None
    relative_error: float | None = None
    cosine: float | None = None
    problem: str | None = None
    spread: float | None = None

    def __str__(self) -> str:
        if self.ms is None:
            return f"{self.name:16} {self.problem}"
        figures = f"{self.name:16} {self.ms:7.3f} ms  {self.tflops:5.0f} TFLOP/s  error {self.relative_error:.4f}"
        return figures + (f"  ({self.problem})" if self.problem else "")


def measure_kernels(
    hardware: Hardware,
    device: torch.device,
    shape: tuple[int, int, int, int],
    dtype: torch.dtype,
    kernels: Mapping[str, AttentionKernel] = KERNELS,
) -> list[Measurement]:
    """Time every kernel that can run and starts at once, and compare what it computes with attention in fp32.

    Args:
        hardware: what the device is.
        device: where to run.
        shape: of q, k and v: batch, num_heads, seq_len, head_dim.
        dtype: of q, k and v.
        kernels: which ones.

    Returns:
        One measurement a kernel that fits, the fastest first, those with a problem last.
    """
    generator = torch.Generator(device).manual_seed(0)
    q, k, v = (torch.randn(shape, generator=generator, device=device).to(dtype) for _ in range(3))
    expected = attend_math(*(x[:, :CHECKED_HEADS].float() for x in (q, k, v)))
    flop = 4 * shape[0] * shape[1] * shape[2] ** 2 * shape[3]
    fitting = [
        kernel
        for kernel in kernels.values()
        if kernel.unavailable(hardware) is None
        and not kernel.slow_start
        and dtype in kernel.dtypes
        and shape[-1] in kernel.head_dims
    ]
    found = [_check(kernel, (q, k, v), expected) for kernel in fitting]
    running = [kernels[m.name] for m in found if m.relative_error is not None]
    seconds, failures = _time(running, (q, k, v))
    timed = [
        Measurement(m.name, problem=failures[m.name])
        if m.name in failures
        else _with_time(m, seconds.get(m.name, []), flop)
        for m in found
    ]
    return sorted(timed, key=lambda m: (m.problem is not None, m.ms or math.inf))


def _check(
    kernel: AttentionKernel,
    qkv: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    expected: torch.Tensor,
) -> Measurement:
    """Compare what a kernel computes with attention in fp32."""
    try:
        out = kernel.attend(*qkv)[:, :CHECKED_HEADS].float()
        relative = float((out - expected).norm() / expected.norm())
    except Exception as error:  # a kernel may fail in ways of its own: then it is not chosen
        return Measurement(kernel.name, problem=_failure(error))
    cosine = float(F.cosine_similarity(out.flatten(), expected.flatten(), dim=0))
    limit, problem = RELATIVE_ERROR[kernel.lossy], None
    if not relative <= limit or not cosine >= COSINE:  # NaN is neither
        problem = f"relative error {relative:.3g} of at most {limit}, cosine {cosine:.4f} of at least {COSINE}"
    return Measurement(kernel.name, None, None, relative, cosine, problem)


def _time(
    kernels: Sequence[AttentionKernel], qkv: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Seconds of every call, and who failed why, by the kernel's name; they take turns: what disturbs one disturbs all."""

    def synchronize() -> None:
        if qkv[0].is_cuda:
            torch.cuda.synchronize(qkv[0].device)

    seconds: dict[str, list[float]] = {}
    failures: dict[str, str] = {}
    for turn in range(WARM_UP + REPEAT):
        for kernel in kernels:
            if kernel.name in failures:
                continue
            synchronize()
            start = time.perf_counter()
            try:
                kernel.attend(*qkv)
                synchronize()
            except Exception as error:
                failures[kernel.name] = _failure(error)
                continue
            if turn >= WARM_UP:
                seconds.setdefault(kernel.name, []).append(time.perf_counter() - start)
    return seconds, failures


def _failure(error: Exception) -> str:
    return f"failed: {(str(error) or type(error).__name__).splitlines()[0]}"


def _with_time(measurement: Measurement, seconds: list[float], flop: int) -> Measurement:
    if not seconds:
        return measurement
    median = statistics.median(seconds)
    return dataclasses.replace(measurement, ms=median * 1e3, tflops=flop / median / 1e12, spread=median / min(seconds))  # fmt: skip


def measured_kernels(
    hardware: Hardware, device: torch.device, shape: tuple[int, int, int, int], dtype: torch.dtype
) -> list[Measurement]:
    """As `measure_kernels`, remembered for this card, shape, dtype and these versions of torch and the kernels' packages."""
    with _measuring:  # two at once would disturb each other
        if (known := known_kernels(hardware, shape, dtype)) is not None:
            return known
        for _ in range(ATTEMPTS):
            settle()
            found = measure_kernels(hardware, device, shape, dtype)
            if all(m.spread is None or m.spread < STEADY for m in found):
                break
        else:
            log.warning("Ark: attention kernels were measured on a busy device; they are measured again the next time.")  # fmt: skip
            return found
        key = _key(hardware, shape, dtype)
        remember(BOOK, key, [dataclasses.asdict(measurement) for measurement in found])
        return found


def known_kernels(
    hardware: Hardware, shape: tuple[int, int, int, int], dtype: torch.dtype
) -> list[Measurement] | None:
    """What `measured_kernels` remembers, None if nothing; of an older Ark's, what would be measured today."""
    try:
        found = [Measurement(**fields) for fields in recall(BOOK, _key(hardware, shape, dtype))]
        return [m for m in found if m.name in KERNELS and not KERNELS[m.name].slow_start] or None
    except TypeError:  # none yet, or not ours
        return None


def _key(hardware: Hardware, shape: tuple[int, int, int, int], dtype: torch.dtype) -> str:
    versions = ", ".join(f"{package} {version}" for package, version in hardware.packages)
    return f"{hardware.name}, torch {torch.__version__}, {versions}, {tuple(shape)}, {dtype}"


def unavailable_kernels(hardware: Hardware) -> dict[str, str]:
    """Every kernel that cannot run on this hardware, with the reason."""
    return {name: why for name, kernel in KERNELS.items() if (why := kernel.unavailable(hardware))}


def select_attention_kernel(
    choice: str,
    hardware: Hardware,
    device: torch.device | None = None,
    shape: tuple[int, int, int, int] | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[AttentionKernel | None, str]:
    """Decide on a kernel.

    Args:
        choice: "auto" or a kernel's name.
        hardware: what the model runs on.
        device: what "auto" measures on; these three are needed on a GPU only, see `measure_kernels`.
        shape: batch, num_heads, seq_len, head_dim.
        dtype: of q, k and v.

    Returns:
        The kernel, None for the host's own, and a sentence that says why; of "auto" with the table.

    Raises:
        KernelUnavailable: a kernel was named that cannot run here.
        ValueError: "auto" was not told what to measure with.
    """
    reasons = unavailable_kernels(hardware)
    if choice != "auto":
        if choice not in KERNELS:
            raise KernelUnavailable(
                {choice: f"there is no kernel of this name, only {', '.join(KERNELS)}"}
            )
        if choice in reasons:
            raise KernelUnavailable({choice: reasons[choice]})
        return KERNELS[choice], f"{choice}: chosen by name, on {hardware.name}.{_loss(choice)}"
    if hardware.compute_capability == (0, 0):
        names = {
            why: [name for name in reasons if reasons[name] == why] for why in reasons.values()
        }
        listed = "; ".join(f"{', '.join(names[why])}: {why}" for why in names)
        return None, f"host: ComfyUI's own attention stays, none of Ark's kernels gains on {hardware.name} ({listed})."  # fmt: skip
    if device is None or shape is None or dtype is None:
        raise ValueError('"auto" measures: it needs a device, a shape and a dtype.')
    table = measured_kernels(hardware, device, shape, dtype)
    listed = "\n".join(map(str, table))
    if not table or table[0].problem:
        return (
            None,
            f"host: ComfyUI's own attention stays, no kernel passed its check here.\n{listed}",
        )
    best = table[0].name
    return KERNELS[best], f"{best}: the fastest of {len(table)} at {tuple(shape)} on {hardware.name}.{_loss(best)}\n{listed}"  # fmt: skip


def _loss(name: str) -> str:
    return " It quantises, which is slightly lossy." if KERNELS[name].lossy else ""
