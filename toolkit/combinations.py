"""What is known to go wrong together, and the rest of the doctor that needs torch."""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Iterator, Mapping

import torch

from .compile import MODES, unsuited
from .disk import find_model
from .finding import BAD, NOTE, OK, Finding, Subject, numbers
from .fused.graph import Graphs
from .hardware import Hardware, probe_hardware
from .kernels import KERNELS
from .paths import mmap_pin
from .plan import Choice, plan
from .probe import Probed
from .storage import available_memory, total_memory


def usual_device() -> torch.device:
    """Where a model would run if the host does not say."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def make_plan(subject: Subject, probed: Mapping[str, Probed], device: torch.device) -> list[Choice]:
    """What Ark would do; see `plan`."""
    broken = probed["triton"].problem if "triton" in probed else None
    return plan(device, find_model(subject.models), broken, subject.measure)


def check_pinning() -> Iterator[Finding]:
    """How much of the files may stay in pinned memory."""
    limit, free = mmap_pin.pin_limit(), available_memory()
    memory = f"{total_memory() / 1e9:.0f} GB of memory" + ("" if free is None else f", {free / 1e9:.0f} available")  # fmt: skip
    text = f"at most {limit / 1e9:.1f} GB of model files (ARK_PIN_LIMIT_GB), {mmap_pin.pinned() / 1e9:.1f} now; {memory}"
    if limit:
        yield Finding("pinning", OK, text)
    else:
        yield Finding("pinning", NOTE, f"nothing is pinned; {memory}", "Pinning brings an unloaded model back faster: see ARK_PIN_LIMIT_GB and ComfyUI's --disable-pinned-memory.")  # fmt: skip


def check_combinations(probed: Mapping[str, Probed], device: torch.device) -> Iterator[Finding]:
    """Every known-bad combination that is here, or one line that there is none."""
    hardware = probe_hardware(device)
    found = list(_combinations(probed, hardware))
    yield from found or [Finding("combinations", OK, "none that is known to be bad")]


def _combinations(probed: Mapping[str, Probed], hardware: Hardware) -> Iterator[Finding]:
    def bad(text: str, remedy: str = "", state: str = NOTE) -> Finding:
        return Finding("combinations", state, text, remedy)

    wanted, triton = triton_of_torch(), hardware.package_version("triton")
    if wanted and triton and numbers(wanted)[:2] != numbers(triton)[:2]:
        yield bad(f"torch {torch.__version__} was made for Triton {wanted}, {triton} is installed", f"pip install triton=={wanted}")  # fmt: skip
    sage = hardware.package_version("sageattention")
    if sage and not triton:
        yield bad(f"SageAttention {sage} cannot run without Triton", "Install Triton, or remove SageAttention.", BAD)  # fmt: skip
    if sage and numbers(sage) >= (2,):
        yield bad(f"SageAttention {sage} ignores masks; Ark sends masked calls to ComfyUI's own attention, other packs may not")  # fmt: skip
    for name, kernel in KERNELS.items():
        reason = kernel.unavailable(hardware) if kernel.package in probed else None
        if reason and "NaN" in reason:
            yield bad(reason, f"Ark does not offer {name} here; other packs may.")
    if hardware.device_type == "cuda" and (reason := Graphs().why_not):
        yield bad(f"CUDA graphs: {reason}", "Start ComfyUI with --disable-cuda-malloc to have the fused engine recorded.")  # fmt: skip
    usable = [name for name, kernel in KERNELS.items() if not kernel.unavailable(hardware)]
    if hardware.device_type == "cuda":
        problems = {p for mode in MODES for name in usable for fp8 in (False, True) if (p := unsuited(mode, hardware, name, fp8))}  # fmt: skip
        for reason, remedy in sorted(problems):
            yield bad(f"compile: {reason}", remedy)


def triton_of_torch() -> str | None:
    """The version of Triton that torch asks for, None if it does not."""
    for line in importlib.metadata.requires("torch") or []:
        if found := re.match(r"triton\s*==\s*([\w.]+)", line):
            return found[1]
    return None
