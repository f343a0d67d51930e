"""The first step of a run, begun before the host asks for it: until then it has 6 ms to do, and the device nothing.

A run like the last one of a model asks for the same step of other noise and another prompt, and these are there when it
begins. What the host asks for in the end decides: the device compares that with what was begun, and where a number differs
the run is to be repeated.
"""

from __future__ import annotations

import contextlib
import logging
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from ..toolkit.answer import Answer
from ..toolkit.fused.graph import Begun
from ..toolkit.step_weights import Weights
from .deliver import current, upload

DEVICES = ("cuda",)
log = logging.getLogger("ark")


@dataclass
class _Known:
    """Of a run whose first step was given nothing but what could have been known before."""

    model: weakref.ref
    weights: weakref.ref[Weights]
    shape: torch.Size  # of its noise
    like: torch.Tensor  # has the dtype and the device of its inputs
    others: tuple  # what it was given beside noise and prompt


@dataclass
class _Run:
    """Of now: what was begun for it, and what its first step was given in the end, as `Runner.run` takes it."""

    begun: Begun | None
    weights: Weights | None
    asked: tuple | None = None


class FirstStep:
    """Begins the first step of an engine's runs.

    Args:
        engine: a `fused.Engine`, which has this.
    """

    def __init__(self, engine: Any) -> None:
        self._engine: Callable[[], Any] = weakref.ref(engine)
        self._known: _Known | None = None
        self._changed: Callable[[], Any] = lambda: (
            None
        )  # the last model whose inputs somebody changes
        self._run: _Run | None = None

    @contextlib.contextmanager
    def run(self, model: Any, noise: torch.Tensor, conditioning: torch.Tensor, doubts: list[Callable[[], bool]]) -> Iterator[None]:  # fmt: skip
        """A run of pure noise, which begins here.

        Args:
            model: the host's ModelPatcher.
            noise: [B, C, H, W] on the device, at the level of the first step.
            conditioning: [1, seq_len, C] of its prompt.
            doubts: gets what says, once the run has ended, whether it is right; else it has to be repeated.
        """
        mine = self._run = self._begin(model, noise, conditioning)
        try:
            yield
        finally:
            self._run = None
        if (begun := mine.begun) is not None:
            doubts.append(lambda: self._is_right(model, begun))
        elif mine.asked is not None:
            weights, latents, embeds, *others = mine.asked
            given = _given(noise, conditioning, latents)
            pairs = list(zip(given, (latents, embeds), strict=True))
            if all(a.shape == b.shape for a, b in pairs):
                same = Answer(torch.stack([(a == b).all() for a, b in pairs]).all())
                like = torch.empty(0, dtype=latents.dtype, device=latents.device)
                known = _Known(
                    weakref.ref(model), weakref.ref(weights), noise.shape, like, tuple(others)
                )
                doubts.append(lambda: self._learn(same, known))

    def asked(self, *call: Any) -> Begun | None:
        """What was begun of a step, if that is the first of a run: see `Runner.run`."""
        run = self._run
        if run is None or run.asked is not None:
            return None
        run.asked = call
        # the same addresses may hold others by now
        return run.begun if run.weights is call[0] else None

    def forget(self) -> None:
        """The weights are others now, or lie elsewhere."""
        self._known = None

    def _begin(self, model: Any, noise: torch.Tensor, conditioning: torch.Tensor) -> _Run:
        known = self._fitting(model, noise)
        if known is None:
            return _Run(None, None)
        try:
            with current(known.like.device), torch.inference_mode():
                given = _given(noise, conditioning, known.like)
                runner, weights = self._engine().runner, known.weights()
                return _Run(runner.begin(weights, *given, *known.others), weights)
        except RuntimeError as error:  # out of memory, too; the step is taken when it is asked for
            reason = str(error).partition("\n")[0]
        log.info("Ark: a first step could not be begun (%s).", reason)
        return _Run(None, None)

    def _fitting(self, model: Any, noise: torch.Tensor) -> _Known | None:
        known = self._known
        if known is None or known.model() is not model or known.shape != noise.shape:
            return None
        if self._changed() is model or known.like.device.type not in DEVICES:
            return None
        return known if self._engine().unchanged(known.weights()) else None

    def _is_right(self, model: Any, begun: Begun) -> bool:
        if right := begun.right():
            return True
        log.info("Ark: a first step was begun with other numbers than ComfyUI asks for; the run is repeated.")  # fmt: skip
        self._known, self._changed = None, weakref.ref(model)
        return right

    def _learn(self, same: Answer, known: _Known) -> bool:
        if same:
            self._known = known
        return True


def _given(noise: torch.Tensor, conditioning: torch.Tensor, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """The tokens that a step gets of nothing but noise, and of a prompt, in the dtype and on the device of `like`."""
    tokens = noise.flatten(2).transpose(1, 2).to(like.device, like.dtype)
    embeds = upload(conditioning, like.device).to(like.dtype).expand(len(noise), -1, -1)
    return tokens.contiguous(), embeds
