"""What Ark would do on this machine, and why: asked of the functions that the nodes themselves follow."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .architecture import HEAD_DIM, USUAL_HEADS, USUAL_TOKENS
from .combustion import select_attention_kernel
from .compile import MODES, unsuited
from .errors import InputError
from .fused.runner import Runner, choose_engine
from .hardware import probe_hardware
from .header import read_header
from .igniter import IN_MEMORY
from .layout import plan_layout
from .rates import link_rate
from .shipment import Shipment
from .storage import probe_storage
from .transfer import usable_paths, with_passed_over


@dataclass(frozen=True)
class Choice:
    """One decision.

    Attributes:
        what: is decided.
        choice: its name, as the nodes call it.
        why: the reason.
    """

    what: str
    choice: str
    why: str


def plan(
    device: torch.device, file: Path | None = None, broken: str | None = None, measure: bool = True
) -> list[Choice]:
    """What the loader does, and what to set in Ark Sage Combustion.

    Args:
        device: that a model would run on.
        file: of a model, for the way by which it would be loaded.
        broken: why Triton does not work, None if it does.
        measure: time what was not timed on this machine yet.

    Returns:
        loader, attention, engine, precision and compile, each decided even where another could not be.
    """

    def guarded(what: str, decide: Callable[[], tuple[str, str]]) -> Choice:
        try:
            return Choice(what, *decide())
        except Exception as error:  # the others are worth telling
            return Choice(what, "unknown", f"could not be decided ({type(error).__name__}: {error})")  # fmt: skip

    attention = guarded("attention", lambda: _attention(device, measure))
    engine = guarded("engine", lambda: _engine(device, broken))
    return [
        guarded("loader", lambda: _loader(device, file)),
        attention,
        engine,
        guarded("precision", lambda: _precision(device, engine.choice)),
        guarded("compile", lambda: _compile(device, engine.choice, attention.choice, broken)),
    ]


def _loader(device: torch.device, path: Path | None) -> tuple[str, str]:
    if device.type not in Shipment.fast_devices:
        return "mapped", f"on {device.type} the weights are views of their file; nothing is copied"
    if path is None:
        return "unknown", "there is no model file to look at"
    file = read_header(path)
    if file.size <= IN_MEMORY:
        return "read", f"{path.name} is so small that it is read whole"
    storage, passed_over = probe_storage(file), dict[str, str]()
    layout = plan_layout(file.entries)
    for way, why in usable_paths(file, layout, device, storage, link_rate(device), passed_over):
        return way.name, f"{path.name}: {with_passed_over(why, passed_over)}"
    return "host", "; ".join(f"{name}: {why}" for name, why in passed_over.items())


def _attention(device: torch.device, measure: bool) -> tuple[str, str]:
    hardware = probe_hardware(device)
    if hardware.compute_capability > (0, 0) and not measure:
        return "auto", "measured when a model first asks for it"
    shape = (1, USUAL_HEADS, USUAL_TOKENS, HEAD_DIM)
    kernel, why = select_attention_kernel("auto", hardware, device, shape, torch.bfloat16)
    return kernel.name if kernel else "host", why


def _engine(device: torch.device, broken: str | None) -> tuple[str, str]:
    engine, why = choose_engine(device)
    if engine == "fused" and broken:
        return "host", f"the fused engine needs Triton, which does not work here: {broken}"
    if engine == "fused":
        graphs = Runner(device, "bf16").graphs
        recorded = f"no CUDA graph ({graphs.why_not})" if graphs.why_not else "one CUDA graph"
        why += f", {recorded}, nothing to compile"
    return engine, why


def _precision(device: torch.device, engine: str) -> tuple[str, str]:
    if engine != "fused":
        return "bf16", "other precisions are the fused engine's"
    try:
        Runner(device, "fp8")
    except InputError as error:
        return "bf16", error.reason
    return "bf16", "lossless; fp8 runs here, too, and is faster and lossy"


def _compile(device: torch.device, engine: str, kernel: str, broken: str | None) -> tuple[str, str]:
    if engine == "fused":
        return "off", "the fused engine has nothing to compile"
    if broken and device.type == "cuda":
        return "off", f"torch.compile needs Triton, which does not work here: {broken}"
    hardware = probe_hardware(device)
    problems: dict[str, Any] = {mode: unsuited(mode, hardware, kernel, False) for mode in MODES}
    possible = [mode for mode, problem in problems.items() if not problem]
    refused = [f"{mode}: {problem[0]}" for mode, problem in problems.items() if problem]
    why = f"{', '.join(possible) or 'no mode'} would work, after some seconds of compiling"
    return "off", "; ".join([why, *refused])
