"""The first step of a prompt is begun before its sampler's turn comes, if that is the last prompt but for its seed or its text.

It is begun when the prompt arrives, or, with a new text, when the text's node has ended; of the prompt that is next in the queue
when the decoder's node has ended. Not before: in dynamic VRAM mode the host waits for the device at the end of each node.
"""

from __future__ import annotations

import functools
import logging
import weakref
from collections.abc import Callable, Mapping
from concurrent.futures import Future, wait
from typing import Any, NamedTuple

import torch
from comfy_execution.progress import ProgressHandler, add_progress_handler, get_progress_state
from comfy_execution.utils import get_executing_context

from ..patches import cached_clip, noise
from ..patches.cached_clip import CachedCLIP
from ..patches.first_step import FirstStep

SAMPLER = "ArkSampler4Step"
PATIENCE = 0.01  # s for a text that is being encoded
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


# what was sampled with, by which node, and in which run
_last: tuple[_Form, str, weakref.ref[FirstStep], str | None] | None = None
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
    _last, _awaited = form and (form, sampler, weakref.ref(first), _run()), None
    if form:
        noise.hurry(torch.device(device))


def arrived(prompt: Prompt, clips: Clips) -> None:
    """Begin, or see to it that it is begun, with a prompt that the host has got while nothing else runs or waits."""
    global _awaited
    _awaited = None
    if (found := _next(prompt, clips)) is None:
        return
    if found.clip is None:
        _begin(found)
    else:
        _awaited = found


def decoded(prompt: Prompt, clips: Clips, coming: Mapping[str, Future]) -> None:
    """See to it that it is begun with the prompt that is next in the queue when the node that runs has ended.

    Args:
        prompt: as the host has got it.
        clips: of its texts.
        coming: those that are being encoded, likewise.
    """
    context, found = get_executing_context(), _next(prompt, clips)
    # what this one decodes before it samples is followed by its own step
    if context is not None and found is not None and _last is not None and _last[3] == _run():
        text = coming.get(found.form.encoder or "")
        add_progress_handler(_After(context.node_id, functools.partial(_begin, found, text)))


def _asked() -> None:
    """The node that runs has asked for a text."""
    context, awaited, last = get_executing_context(), _awaited, _last
    if (
        context is None
        or awaited is None
        or last is None
        or context.node_id != awaited.form.encoder
    ):
        return
    # another prompt may have come before
    if _form(get_progress_state().dynprompt.original_prompt, last[1]) == awaited.form:
        add_progress_handler(_After(context.node_id, functools.partial(_begin, awaited)))


def _run() -> str | None:
    """The id of the prompt that runs."""
    context = get_executing_context()
    return context and context.prompt_id


class _After(ProgressHandler):
    """Does something when a node has ended; there is one of them at a time."""

    def __init__(self, node: str, work: Callable[[], None]):
        super().__init__("ark_next_step")
        self._node, self._work = node, work

    def finish_handler(self, node_id: str, state: Any, prompt_id: str) -> None:
        """Called by the host."""
        if node_id != self._node:
            return
        self.disable()
        try:
            self._work()
        except Exception as error:  # the prompt takes the step itself, and says what is wrong
            log.debug("Ark: a first step could not be begun (%s).", error)


def _begin(given: _Next, text: Future | None = None) -> None:
    global _awaited
    wait([text] if given.clip and text else [], PATIENCE)
    clip, first = given.clip() if given.clip else None, given.first()
    conditioning = clip.known(given.form.text or "") if clip else None
    _awaited = given if given.clip and conditioning is None else None
    if _awaited is None and first is not None:
        first.begin(given.form.seed, noise.ahead, conditioning)


def _next(prompt: Prompt, clips: Clips) -> _Next | None:
    """A prompt that may follow the last one; None if it is another, or the same, which is in the host's cache."""
    if _last is None:
        return None
    before, sampler, first, _ = _last
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
