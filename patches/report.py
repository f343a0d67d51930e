"""What was set on a model, what it does to a step's time, and to the result."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from typing import Any

import torch

from ..toolkit.architecture import LATENT_CHANNELS, SPATIAL_FACTOR
from . import fused
from .attention import set_attention
from .compile import APPLY_MODEL, KEY, set_compile
from .guard import OVERRIDE
from .sampling import sample_klein

STEPS, RUNS = 4, 3


@dataclass(frozen=True)
class Report:
    """What was found.

    Attributes:
        lines: of the text.
        step_ms: time of a step in ms, by what was measured.
    """

    lines: list[str]
    step_ms: dict[str, float]


def report_on(model: Any, size: tuple[int, int], compare: bool) -> Report:
    """Look at a MODEL and run it.

    Args:
        model: the host's ModelPatcher of a FLUX.2 model, with whatever was set on it.
        size: (width, height) in px.
        compare: also run it without what Ark set, and say how far the results are apart.

    Returns:
        The report; steps are timed over whole runs of 4, the first of which is not counted.
    """
    override = model.model_options.get("transformer_options", {}).get(OVERRIDE)
    kernel = getattr(override, "kernel", "ComfyUI's own")
    lines = [f"attention: {kernel}"]
    wrappers = model.get_wrappers(APPLY_MODEL, KEY)
    compiler = wrappers[0].compiler if wrappers else None
    before = compiler.graphs if compiler else 0
    step_ms, samples = {}, {}
    models = {"this model": model}
    if compare:
        plain, _ = set_attention(model, "none")
        models["without Ark"] = fused.remove_fused(set_compile(plain, "off")[0])
    for name, patched in models.items():
        step_ms[name], samples[name] = _time(patched, size)
    if compiler:
        lines.append(
            f"compile: {compiler.mode}, {compiler.graphs} graphs in {compiler.seconds:.1f} s, "
            f"{compiler.graphs - before} of them now, {compiler.found} more from an earlier process"
        )
    else:
        lines.append("compile: off")
    if engine := fused.engine_on(model):
        lines.append(f"engine: {engine.runner}")
    lines += [f"{name}: {ms:.2f} ms a step at {size[0]}x{size[1]}" for name, ms in step_ms.items()]
    if compare:
        here, there = samples.values()
        lines.append(f"difference: {float((here - there).norm() / there.norm()):.2e} of the latents after {STEPS} steps")  # fmt: skip
    if masters := getattr(model.model, "ark_masters", None):
        lines += [f"load: {report}" for report in masters.opened.reports.values()]
    return Report(lines, step_ms)


def _time(model: Any, size: tuple[int, int]) -> tuple[float, torch.Tensor]:
    """Milliseconds of a step, and the latents of one run."""
    width = model.model.diffusion_model.txt_in.weight.shape[1]
    generator = torch.Generator().manual_seed(0)
    positive = [[torch.randn(1, 512, width, generator=generator), {"pooled_output": None}]]
    across, down = (length // SPATIAL_FACTOR for length in size)
    latent = {"samples": torch.zeros(1, LATENT_CHANNELS, down, across)}
    seconds = []
    for _ in range(1 + RUNS):
        start = time.perf_counter()
        result = sample_klein(model, positive, latent, 0, STEPS, 1.0, preview=False)
        samples = result["samples"].cpu()  # waits
        seconds.append(time.perf_counter() - start)
    return 1e3 * statistics.median(seconds[1:]) / STEPS, samples
