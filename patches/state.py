"""What is set on a model, and what a run with it took: facts for whoever shows them."""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass
from typing import Any

import torch

from ..toolkit.architecture import SPATIAL_FACTOR
from ..toolkit.clock import StepClock, step_flop
from ..toolkit.floor import matrix_rate
from . import compile as compiling
from . import fused, guard
from .references import REFERENCES
from .sampling import sample_klein


@dataclass(frozen=True)
class Settings:
    """What Ark set on a MODEL.

    Attributes:
        kernel: of attention, None for the host's own.
        compile: torch.compile's mode, None if nothing is compiled.
        engine: "fused" or "host".
        precision: of the fused engine, None for the host's.
        instead: why the host's own code runs after all; empty if nothing had to be given up.
    """

    kernel: str | None
    compile: str | None
    engine: str
    precision: str | None
    instead: list[str]


def settings_of(model: Any) -> Settings:
    """Look at the host's ModelPatcher."""
    override = model.model_options.get("transformer_options", {}).get(guard.OVERRIDE)
    compiled = model.get_wrappers(compiling.APPLY_MODEL, compiling.KEY)
    guards = model.get_wrappers(guard.SAMPLER_SAMPLE, guard.KEY)
    engine = fused.engine_on(model)
    runner = engine.runner if engine else None
    instead = sorted(runner.reasons) if runner else []
    if any(guarded.failed for guarded in guards):
        instead.append("a result was not finite")
    return Settings(
        getattr(override, "kernel", None),
        compiled[0].compiler.mode if compiled else None,
        "fused" if runner else "host",
        runner.precision if runner else None,
        instead,
    )


def sample_and_tell(model: Any, positive: list, latent: dict, seed: int, steps: int, denoise: float, **others: Any) -> tuple[dict, dict]:  # fmt: skip
    """As `sample_klein`; also what it took.

    Returns:
        The LATENT, and a table: width, height (px), batch, references, steps, ms (all of it, waiting for weights
        included), step_ms (None for a single step), tflops (TFLOP/s in a step, None likewise), floor_ms (what the
        arithmetic of all steps takes at the rate of one large matrix product, None if not known yet), device, and `Settings`.
    """
    device, start = torch.device(model.load_device), time.perf_counter()
    clock = StepClock(device)
    result = sample_klein(model, positive, latent, seed, steps, denoise, watch=clock.mark, **others)
    step_ms = clock.step_ms()
    ms = 1e3 * (time.perf_counter() - start)
    batch, _, down, across = latent["samples"].shape
    references = max((options.get(REFERENCES, ()) for _, options in positive), key=len, default=())
    tokens = down * across + sum(image.shape[-2] * image.shape[-1] for image in references)
    tokens += max((tensor.shape[1] for tensor, _ in positive), default=0)
    passes = 2 if others.get("negative") is not None and others.get("cfg", 1.0) != 1 else 1
    flux = model.model.diffusion_model
    blocks = len(flux.double_blocks) + len(flux.single_blocks)
    flop = batch * passes * step_flop(flux.hidden_size, blocks, tokens)
    sigmas = others.get("sigmas")
    count = steps if sigmas is None else len(sigmas) - 1
    settings = settings_of(model)
    rate = matrix_rate(device, "fp8" if settings.precision == "fp8" else _dtype_name(model.model))
    return result, {
        "width": across * SPATIAL_FACTOR,
        "height": down * SPATIAL_FACTOR,
        "batch": batch,
        "references": len(references),
        "steps": count,
        "ms": ms,
        "step_ms": step_ms,
        "tflops": step_ms and flop / step_ms / 1e9,
        "floor_ms": rate and 1e3 * count * flop / rate,
        "device": device.type,
        **dataclasses.asdict(settings),
    }


def _dtype_name(model: Any) -> str:
    """What the host's model computes in, whatever its weights are kept in."""
    return str(model.manual_cast_dtype or model.get_dtype()).removeprefix("torch.")
