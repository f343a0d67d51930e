"""The first step of a run, begun before the host asks for it: until then it has 6 ms to do, and the device nothing.

A run like the last one of a model asks for the same step of other noise and another prompt. These are there when it begins, and
may be known before (`nodes/next_step.py`). What the host asks for in the end decides: the device compares that with what was
begun, and where a number differs the run is to be repeated.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from ..toolkit.answer import Answer, are_equal
from ..toolkit.fused.graph import Begun, recording
from ..toolkit.step_weights import Weights
from .deliver import current, upload
from .references import REFERENCES

DEVICES = ("cuda",)
# of a model, that are known to leave alone what a step is given; the second is for hooks
OPTIONS = {"transformer_options", "to_load_options"}
PAUSE = 7  # runs: a step for nothing costs as much as is won in so many
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
class _Form:
    """What a run is given beside its seed."""

    model: weakref.ref
    conditioning: weakref.ref[torch.Tensor]
    shape: torch.Size  # of the noise
    level: float  # of that

    def is_like(self, other: _Form) -> bool:
        """Whether it is the same."""
        same = self.model() is other.model() and self.conditioning() is other.conditioning()
        return same and (self.shape, self.level) == (other.shape, other.level)


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
        self._last: _Form | None = None
        self._ahead: tuple[int, _Form, _Run] | None = None  # of a run with this seed
        self._pause = 0  # so many runs, as nobody has come for one

    def begin(self, seed: int, draw: Callable[..., torch.Tensor | None], conditioning: torch.Tensor | None = None) -> None:  # fmt: skip
        """Begin the first step of a run that is expected to differ from the last one in its seed and its prompt only.

        Args:
            seed: of its noise.
            draw: gives that for a seed, a shape and a device; None if it takes too long.
            conditioning: of its prompt, the very tensor that it is going to be given; None for the last run's.
        """
        last = self._last
        if last is None or self._pause:
            return
        if conditioning is not None:
            last = dataclasses.replace(last, conditioning=weakref.ref(conditioning))
        if (ahead := self._ahead) is not None:
            if ahead[0] != seed or not ahead[1].is_like(last):
                self._in_vain()
            return
        model, conditioning = last.model(), last.conditioning()
        if model is None or conditioning is None or not self._fits(model, last.shape, last.level):
            return
        if not _is_arks(model) or not recording.acquire(blocking=False):
            return
        try:
            device = torch.device(model.load_device)
            with current(device), torch.inference_mode():
                if (noise := draw(seed, last.shape, device)) is None:
                    return
                begun = self._begin(model, noise, last.level, conditioning)
            self._ahead = (seed, last, begun) if begun.begun is not None else None
            if self._known is None:  # another thread has unloaded it
                self._give_up()
        finally:
            recording.release()

    def run(
        self, model: Any, seed: int, noise: torch.Tensor, level: float, positive: list, doubts: list[Callable[[], bool]]
    ) -> contextlib.AbstractContextManager:  # fmt: skip
        """A run of pure noise, whose first step begins here if nothing else can have a hand in it.

        Args:
            model: the host's ModelPatcher, which lies on the device.
            seed: of the noise.
            noise: [B, C, H, W] there.
            level: of the first step.
            positive: the host's CONDITIONING; there is no other.
            doubts: gets what says, once the run has ended, whether it is right; else it has to be repeated.
        """
        if len(positive) != 1 or REFERENCES in positive[0][1] or not _is_arks(model):
            return contextlib.nullcontext()
        if len(positive[0][0]) not in (1, len(noise)):  # the host repeats it, or leaves some out
            return contextlib.nullcontext()
        return self._run_of(model, seed, noise, level, positive[0][0], doubts)

    @contextlib.contextmanager
    def _run_of(
        self, model: Any, seed: int, noise: torch.Tensor, level: float, conditioning: torch.Tensor, doubts: list[Callable[[], bool]]
    ) -> Iterator[None]:  # fmt: skip
        form = _Form(weakref.ref(model), weakref.ref(conditioning), noise.shape, level)
        mine = self._arrived(seed, form) or self._begin(model, noise, level, conditioning)
        self._run = mine
        try:
            yield
        finally:
            self._run = None
            if mine.begun is not None:
                mine.begun.leave()
        self._last = form
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
        if run is None:  # of another kind than what could be begun ahead
            self._last = None
        if run is None or run.asked is not None:
            return None
        run.asked = call
        # the same addresses may hold others by now
        return run.begun if run.weights is call[0] else None

    def forget(self) -> None:
        """The weights are others now, or lie elsewhere."""
        self._known = None
        self._give_up()

    def _arrived(self, seed: int, form: _Form) -> _Run | None:
        """What was begun for this run before it began."""
        self._pause = max(self._pause - 1, 0)
        if (ahead := self._ahead) is None:  # another thread may unload the model at any time
            return None
        expected, of, run = ahead
        if expected == seed and of.is_like(form):
            self._ahead = None
            return run
        self._in_vain()
        return None

    def _in_vain(self) -> None:
        """Nobody has come for what was begun."""
        self._pause = PAUSE
        self._give_up()

    def _give_up(self) -> None:
        ahead, self._ahead = self._ahead, None
        if ahead is not None and (begun := ahead[2].begun) is not None:
            begun.leave()

    def _fits(self, model: Any, shape: torch.Size, level: float) -> bool:
        """Whether all that a first step is given beside noise and prompt is known."""
        known = self._known
        if known is None or known.model() is not model or (known.shape, known.level) != (shape, level):  # fmt: skip
            return False
        if self._changed() is model or known.like.device.type not in DEVICES:
            return False
        return self._engine().unchanged(known.weights())

    def _begin(self, model: Any, noise: torch.Tensor, level: float, conditioning: torch.Tensor) -> _Run:  # fmt: skip
        known: Any = self._known
        if not self._fits(model, noise.shape, level) or (weights := known.weights()) is None:
            return _Run(None, None)
        try:
            with current(known.like.device), torch.inference_mode():
                tokens, embeds = _given(noise, level, conditioning, known.like)
                # somebody may write to it meanwhile
                if embeds.data_ptr() == conditioning.data_ptr():
                    embeds = embeds.clone()
                given = tokens, embeds, *known.others
                return _Run(self._engine().runner.begin(weights, *given), weights)
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
