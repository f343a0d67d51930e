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

from ..toolkit.answer import Answer, are_equal
from ..toolkit.fused.graph import Begun
from ..toolkit.step_weights import Weights
from .deliver import current, upload
from .references import REFERENCES

DEVICES = ("cuda",)
# of a model, that are known to leave alone what a step is given; the second is for hooks
OPTIONS = {"transformer_options", "to_load_options"}
log = logging.getLogger("ark")


@dataclass
class _Known:
    """Of a run whose first step was given nothing but what could have been known before."""

    model: weakref.ref
    weights: weakref.ref[Weights]
    shape: torch.Size  # of its noise
    level: float  # of that
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
        # the last model whose inputs somebody changes
        self._changed: Callable[[], Any] = lambda: None
        self._run: _Run | None = None

    def run(
        self, model: Any, noise: torch.Tensor, level: float, positive: list, doubts: list[Callable[[], bool]]
    ) -> contextlib.AbstractContextManager:  # fmt: skip
        """A run of pure noise, whose first step begins here if nothing else can have a hand in it.

        Args:
            model: the host's ModelPatcher, which lies on the device.
            noise: [B, C, H, W] there.
            level: of the first step.
            positive: the host's CONDITIONING; there is no other.
            doubts: gets what says, once the run has ended, whether it is right; else it has to be repeated.
        """
        if len(positive) != 1 or REFERENCES in positive[0][1] or not _is_arks(model):
            return contextlib.nullcontext()
        if len(positive[0][0]) not in (1, len(noise)):  # the host repeats it, or leaves some out
            return contextlib.nullcontext()
        return self._run_of(model, noise, level, positive[0][0], doubts)

    @contextlib.contextmanager
    def _run_of(
        self, model: Any, noise: torch.Tensor, level: float, conditioning: torch.Tensor, doubts: list[Callable[[], bool]]
    ) -> Iterator[None]:  # fmt: skip
        mine = self._run = self._begin(model, noise, level, conditioning)
        try:
            yield
        finally:
            self._run = None
            if mine.begun is not None:
                mine.begun.leave()
        if (begun := mine.begun) is not None:
            doubts.append(lambda: self._is_right(model, begun))
        elif mine.asked is not None:
            weights, latents, embeds, *others = mine.asked
            like = torch.empty(0, dtype=latents.dtype, device=latents.device)
            known = _Known(weakref.ref(model), weakref.ref(weights), noise.shape, level, like, tuple(others))  # fmt: skip
            if (same := _are_same(noise, level, conditioning, latents, embeds)) is not None:
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

    def _begin(self, model: Any, noise: torch.Tensor, level: float, conditioning: torch.Tensor) -> _Run:  # fmt: skip
        known = self._known
        if known is None or known.model() is not model or (known.shape, known.level) != (noise.shape, level):  # fmt: skip
            return _Run(None, None)
        if self._changed() is model or known.like.device.type not in DEVICES:
            return _Run(None, None)
        if not self._engine().unchanged(weights := known.weights()):
            return _Run(None, None)
        try:
            with current(known.like.device), torch.inference_mode():
                given = _given(noise, level, conditioning, known.like)
                return _Run(self._engine().runner.begin(weights, *given, *known.others), weights)
        except RuntimeError as error:  # out of memory, too; the step is taken when it is asked for
            reason = str(error).partition("\n")[0]
        log.info("Ark: a first step could not be begun (%s).", reason)
        return _Run(None, None)

    def _is_right(self, model: Any, begun: Begun) -> bool:
        if not begun.taken:
            self._known = None  # it was asked for something else
        if begun.right():
            return True
        log.info("Ark: a first step was begun with other numbers than ComfyUI asks for; the run is repeated.")  # fmt: skip
        self._known, self._changed = None, weakref.ref(model)
        return False

    def _learn(self, same: Answer, known: _Known) -> bool:
        if same:
            self._known = known
        return True


def _is_arks(model: Any) -> bool:
    """Whether nobody else is called in a run, who might write to weights after its first step has begun."""
    options = model.model_options.get("transformer_options", {})
    found = model.wrappers, model.callbacks, options.get("wrappers", {}), options.get("callbacks", {})  # fmt: skip
    keys = {key for kinds in found for kind in kinds.values() for key, calls in kind.items() if calls}  # fmt: skip
    return (
        all(str(key).startswith("ark_") for key in keys) and model.model_options.keys() <= OPTIONS
    )


def _are_same(
    noise: torch.Tensor, level: float, conditioning: torch.Tensor, *asked: torch.Tensor
) -> Answer | None:
    """Whether a step was given nothing but noise and a prompt; None if not, or if there is no memory to find out."""
    try:
        given = _given(noise, level, conditioning, asked[0])
        pairs = list(zip(given, asked, strict=True))
        if all(a.shape == b.shape for a, b in pairs):
            return are_equal(pairs)
    except RuntimeError as error:
        log.debug("Ark: a first step was not compared (%s).", error)
    return None


def _given(noise: torch.Tensor, level: float, conditioning: torch.Tensor, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """The tokens that a step gets of nothing but noise, and of a prompt, in the dtype and on the device of `like`."""
    tokens = (level * noise).flatten(2).transpose(1, 2).to(like.device, like.dtype)
    embeds = upload(conditioning, like.device).to(like.dtype).expand(len(noise), -1, -1)
    return tokens.contiguous(), embeds
