"""The first step of a prompt is begun before its sampler's turn comes, if that is the last prompt but for its seed or its text.

It is begun when the prompt arrives, or, if it had to wait for a picture that Ark decoded, when it starts; with a new text, when
the text's node has ended. Not before: in dynamic VRAM mode the host waits for the device at the end of each node.
"""

from __future__ import annotations

import functools
import logging
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from comfy_execution.progress import ProgressHandler, add_progress_handler, get_progress_state
from comfy_execution.utils import get_executing_context

from ..patches import cached_clip, noise
from ..patches.first_step import FirstStep

SAMPLER = "ArkSampler4Step"
SEEDS = 1 << 64  # others are refused by the host when the prompt has arrived
log = logging.getLogger("ark")
Prompt = dict[str, dict]


class _Form(NamedTuple):
    """A prompt with one sampler: what may differ from one to the next, and all else."""

    seed: int
    text: str | None  # of the node whose result the sampler gets
    encoder: str | None
    others: dict[str, Any]


# what was sampled with, by which node, and where that begins
_last: tuple[_Form, str, weakref.ref[FirstStep]] | None = None
_awaited: _Form | None = None  # whose text's node is still to run
_said: set[tuple[str, type[Exception]]] = set()  # what the log has told of


def watch() -> None:
    """Look at each text that is encoded for a prompt."""
    if _encoded not in cached_clip.encoded:
        cached_clip.encoded.append(_encoded)


def sampled(prompt: Prompt | None, sampler: str, first: FirstStep, device: Any) -> None:
    """Take down what a sampler has run with.

    Args:
        prompt: as the host has got it, None if it does not say.
        sampler: its node.
        first: of its engine.
        device: that it has run on.
    """
    global _last, _awaited
    form = _form(prompt, sampler) if prompt else None
    _last, _awaited = form and (form, sampler, weakref.ref(first)), None
    if form:
        noise.hurry(torch.device(device))


def comes(prompt: Prompt) -> None:
    """Begin, or see to it that it is begun, with a prompt that nothing else runs or waits before, or that starts now."""
    global _awaited
    _awaited = None
    if _last is None:
        return
    before, sampler, _ = _last
    form = _form(prompt, sampler)
    if form is None or form[2:] != before[2:] or form == before:  # the same is in the host's cache
        return
    if form.text == before.text:
        _begin(form.seed)
    else:
        _awaited = form


def _encoded(conditioning: torch.Tensor) -> None:
    """The node that runs has its text."""
    _try(lambda: _await_end(conditioning))


def _await_end(conditioning: torch.Tensor) -> None:
    context, awaited, last = get_executing_context(), _awaited, _last
    if context is None or awaited is None or last is None:
        return
    runs = get_progress_state().dynprompt.original_prompt  # another one may have come before
    if context.node_id == awaited.encoder and _form(runs, last[1]) == awaited:
        begin = functools.partial(_begin, awaited.seed, weakref.ref(conditioning))
        add_progress_handler(Then(begin, context.node_id))


class Then(ProgressHandler):
    """Does something once.

    Args:
        work: is done.
        node: when this one has ended; None for when the next prompt starts. There is one of each kind at a time.
    """

    def __init__(self, work: Callable[[], None], node: str | None = None):
        super().__init__("ark_next_prompt" if node is None else "ark_next_step")
        self._node, self._work = node, work

    def finish_handler(self, node_id: str, state: Any, prompt_id: str) -> None:
        """Called by the host."""
        if node_id == self._node:
            self._once()

    def reset(self) -> None:
        """Called by the host."""
        if self._node is None:
            self._once()

    def _once(self) -> None:
        if self.enabled:
            self.disable()
            _try(self._work)


def _begin(seed: int, conditioning: Callable[[], torch.Tensor | None] | None = None) -> None:
    text = conditioning and conditioning()
    if _last is None or (first := _last[2]()) is None or (conditioning and text is None):
        return
    _try(lambda: first.begin(seed, noise.ahead, text))


def _try(work: Callable[[], None]) -> None:
    """Let nobody else come to harm: the prompt does it itself then, and says what is wrong."""
    try:
        work()
    except Exception as error:
        tell_once("a first step could not be begun ahead", error)


def tell_once(what: str, error: Exception) -> None:
    """Let the log say what is not done ahead, and why: once, as it is likely to be so with each prompt."""
    level = logging.DEBUG if (what, type(error)) in _said else logging.INFO
    _said.add((what, type(error)))
    log.log(level, "Ark: %s (%s).", what, error)


def _form(prompt: Prompt, sampler: str) -> _Form | None:
    """None without a seed, or with another sampler beside this one."""
    samplers = [number for number, node in prompt.items() if node.get("class_type") == SAMPLER]
    if samplers != [sampler]:
        return None
    inputs = prompt[sampler].get("inputs", {})
    seed, link = inputs.get("seed"), inputs.get("positive")
    if type(seed) is not int or not 0 <= seed < SEEDS:  # a bool is one, too
        return None
    encoder = str(link[0]) if isinstance(link, list) and len(link) == 2 else None
    text = prompt.get(encoder or "", {}).get("inputs", {}).get("text")
    if not isinstance(text, str):
        encoder = text = None
    # the host adds other things to a node than these
    others: dict[str, Any] = {number: (node.get("class_type"), {**node.get("inputs", {})}) for number, node in prompt.items()}  # fmt: skip
    del others[sampler][1]["seed"]
    if encoder is not None:
        del others[encoder][1]["text"]
    return _Form(seed, text, encoder, others)
