"""A result that is not finite is never handed on while another kernel can do better.

Low-precision kernels can overflow; the picture is black then. NaN and Inf survive every later step, so one look at the
end of a run sees them all, with one synchronisation a run. Who has more for the device to do until then may look later.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

import torch

from ..toolkit.answer import Answer

OVERRIDE = "optimized_attention_override"
SAMPLER_SAMPLE = "sampler_sample"  # the host's WrappersMP.SAMPLER_SAMPLE
KEY = "ark_guard"
PLAIN = "ark_plain"  # in a run's options: everything on the host's own code
log = logging.getLogger("ark")
_doubts: ContextVar[list[Callable[[], bool]] | None] = ContextVar("ark_doubts", default=None)


def add_guard(model: Any, kernel: str) -> None:
    """Repeat a run of a MODEL's clone on the host's own code if its result is not finite; later runs go there at once.

    Args:
        model: the host's ModelPatcher, with an attention override or the fused engine; a guard that it has goes.
        kernel: what they are called, for the message.
    """
    remove_guard(model)

    def guarded(executor, guider, sigmas, extra_args, *args, **kwargs):
        if guarded.failed:
            return executor(guider, sigmas, _on_the_host(extra_args), *args, **kwargs)
        if (doubts := _doubts.get()) is not None or not guarded.repeats:
            samples = executor(guider, sigmas, extra_args, *args, **kwargs)
            if doubts is not None:
                doubts.append(functools.partial(_was_finite, guarded, Answer(_finite(samples))))
                return samples
            if is_finite(samples):
                return samples
        guarded.repeats = False
        again = executor(guider, sigmas, _on_the_host(extra_args), *args, **kwargs)
        if is_finite(again):
            guarded.failed = True
            log.warning(
                "Ark: %s gave numbers that are not finite. The run was repeated on ComfyUI's own code, which is used from "
                "now on. Choose something else in ArkSageCombustion.",
                kernel,
            )
        else:
            log.warning(
                "Ark: the model gives numbers that are not finite, on ComfyUI's own code, too. "
                "Look at its file, its LoRAs and its precision."
            )
        return again

    wrapper: Any = guarded
    wrapper.failed = False  # for who reports, too
    wrapper.repeats = False  # a run that was not finite
    model.add_wrapper_with_key(SAMPLER_SAMPLE, KEY, wrapper)


@contextlib.contextmanager
def doubted() -> Iterator[list[Callable[[], bool]]]:
    """Runs in which no guard waits for the device; they end before this does.

    Yields:
        What says, when the device has come to it, whether a run is right. If one says no, the run has to be repeated outside.
    """
    doubts: list[Callable[[], bool]] = []
    before = _doubts.set(doubts)
    try:
        yield doubts
    finally:
        _doubts.reset(before)


def is_finite(samples: torch.Tensor) -> bool:
    """Whether there is neither NaN nor Inf in it; waits for the device."""
    return bool(_finite(samples))


def _finite(samples: torch.Tensor) -> torch.Tensor:
    return torch.isfinite(samples).all()


def _was_finite(guarded: Any, answer: Answer) -> bool:
    guarded.repeats = not answer
    return not guarded.repeats


def remove_guard(model: Any) -> None:
    """Undo `add_guard`."""
    model.remove_wrappers_with_key(SAMPLER_SAMPLE, KEY)


def _on_the_host(extra_args: dict) -> dict:
    options = extra_args["model_options"]
    transformer = {k: v for k, v in options["transformer_options"].items() if k != OVERRIDE}
    transformer[PLAIN] = True
    return {**extra_args, "model_options": {**options, "transformer_options": transformer}}
