"""The first step of a prompt is begun before its sampler's turn comes, if that is the last prompt but for its seed or its text.

It is begun when the prompt arrives, or, if others are in the way then, when it starts; with a new text, when the text's node has
ended. Not before: in dynamic VRAM mode the host waits for the device at the end of each node.
"""

from __future__ import annotations

import functools
import logging
import weakref
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from comfy_execution.progress import ProgressHandler, add_progress_handler, get_progress_state
from comfy_execution.utils import get_executing_context

from ..patches import cached_clip, noise
from ..patches.cached_clip import CachedCLIP
from ..patches.first_step import FirstStep

SAMPLER = "ArkSampler4Step"
log = logging.getLogger("ark")
Prompt = dict[str, dict]
Clips = Mapping[str, CachedCLIP]  # by the node that encodes a text of its own with one


class _Form(NamedTuple):
    """A prompt with one sampler: what may differ from one to the next, and all else."""

    seed: int
    text: str | None  # of the node whose result the sampler gets
    encoder: str | None
    others: dict[str, Any]


class _Next(NamedTuple):
    """What is expected to be sampled with next."""

    form: _Form
    clip: weakref.ref[CachedCLIP] | None  # None for the last run's text
    first: weakref.ref[FirstStep]


# what was sampled with, and by which node
_last: tuple[_Form, str, weakref.ref[FirstStep]] | None = None
_awaited: _Next | None = None  # whose text's node is still to run


def watch() -> None:
    """Look at each text that a prompt asks for."""
    if _asked not in cached_clip.asked:
        cached_clip.asked.append(_asked)


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


def comes(prompt: Prompt, clips: Clips) -> None:
    """Begin, or see to it that it is begun, with a prompt that nothing else runs or waits before, or that starts now."""
    global _awaited
    _awaited = found = _next(prompt, clips)
    if found is not None and found.clip is None:
        _begin(found)


def _asked() -> None:
    """The node that runs has asked for a text."""
    context, awaited, last = get_executing_context(), _awaited, _last
    if context is None or awaited is None or last is None:
        return
    runs = get_progress_state().dynprompt.original_prompt  # another one may have come before
    if context.node_id == awaited.form.encoder and _form(runs, last[1]) == awaited.form:
        add_progress_handler(Then(functools.partial(_begin, awaited), context.node_id))


class Then(ProgressHandler):
    """Does something once.

    Args:
        work: is done, and may fail: the prompt does it itself then, and says what is wrong.
        node: when this one has ended; None for when the next prompt starts. There is one of each kind at a time.
    """

    def __init__(self, work: Callable[[], None], node: str | None = None):
        super().__init__("ark_next_prompt" if node is None else "ark_next_step")
        self._node, self._work = node, work

    def finish_handler(self, node_id: str, state: Any, prompt_id: str) -> None:
        """Called by the host."""
        if node_id == self._node:
            self.disable()
            self._try()

    def reset(self) -> None:
        """Called by the host."""
        if self._node is None:
            self._try()

    def _try(self) -> None:
        try:
            self._work()
        except Exception as error:
            log.debug("Ark: a first step could not be begun (%s).", error)


def _begin(given: _Next) -> None:
    global _awaited
    _awaited = None
    clip, first = given.clip and given.clip(), given.first()
    conditioning = clip.known(given.form.text or "") if clip else None
    if first is not None and (given.clip is None or conditioning is not None):
        first.begin(given.form.seed, noise.ahead, conditioning)


def _next(prompt: Prompt, clips: Clips) -> _Next | None:
    """A prompt that may follow the last one; None if it is another, or the same, which is in the host's cache."""
    if _last is None:
        return None
    before, sampler, first = _last
    form = _form(prompt, sampler)
    if form is None or form[2:] != before[2:] or form == before:
        return None
    if form.text == before.text:
        return _Next(form, None, first)
    clip = clips.get(form.encoder or "")
    return None if clip is None else _Next(form, weakref.ref(clip), first)


def _form(prompt: Prompt, sampler: str) -> _Form | None:
    """None without a seed, or with another sampler beside this one."""
    samplers = [number for number, node in prompt.items() if node.get("class_type") == SAMPLER]
    if samplers != [sampler]:
        return None
    inputs = prompt[sampler].get("inputs", {})
    seed, link = inputs.get("seed"), inputs.get("positive")
    if type(seed) is not int:  # a bool is one, too
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
