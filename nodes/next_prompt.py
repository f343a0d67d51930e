"""Texts are encoded and noise is drawn before their prompt's turn comes, while the GPU idles.

That is while a picture is saved, for the prompt that is next in the queue, and while the host looks at a prompt that has just
arrived. Only what needs no loading and no other node: a text of its own, encoded by the CLIP that an ArkFastLoader has given.
What follows is the first step (`next_step.py`).
"""

from __future__ import annotations

import functools
import json
import logging
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from comfy_execution.progress import add_progress_handler

from ..patches import fast_vae, noise
from ..patches.cached_clip import CachedCLIP
from ..toolkit.shared import short_turns
from . import live, next_step
from .next_step import SAMPLER

LOADER, CLIP_OUTPUT = "ArkFastLoader", 1
ENCODERS = "CLIPTextEncode", "ArkTextEncode"
KEPT, TEXTS = 8, 4  # loaders that are known; texts of one prompt
log = logging.getLogger("ark")
_clips: OrderedDict[str, weakref.ref[CachedCLIP]] = OrderedDict()
_worker = ThreadPoolExecutor(1, "ark-next")


def watch() -> None:
    """Look at the queue whenever a picture has been decoded, and at each prompt that arrives."""
    if look not in fast_vae.decoded:
        fast_vae.decoded.append(look)
        next_step.watch()
        if (server := live.server()) is not None:
            server.add_on_prompt_handler(arrived)


def remember(chosen: dict[str, str], clip: CachedCLIP) -> None:
    """Take down what a loader has given for its inputs."""
    name = json.dumps(chosen, sort_keys=True)
    _clips[name] = weakref.ref(clip)
    _clips.move_to_end(name)
    while len(_clips) > KEPT:
        _clips.popitem(last=False)


def look() -> list[Future[bool]]:
    """Have the texts of the next prompt encoded, in another thread; each says whether its text is known then."""
    queue = getattr(live.server(), "prompt_queue", None)
    if queue is None:
        return []
    try:
        with queue.mutex:
            waiting = queue.queue[0][2] if queue.queue else {}  # a heap
        _expect_noise(waiting)
        add_progress_handler(next_step.Then(_starts))
        return [_worker.submit(_call, functools.partial(_encode, clip, text)) for clip, text in _texts(waiting)]  # fmt: skip
    except Exception as error:  # a host that keeps its queue otherwise; the picture is there
        next_step.tell_once("the queue could not be read", error)
        return []


def _starts() -> None:
    """A prompt starts."""
    queue = live.server().prompt_queue
    with queue.mutex:
        running = list(queue.currently_running.values())
    if len(running) == 1:
        next_step.comes(running[0][2])


def arrived(request: Any) -> Any:
    """Have the texts of a prompt encoded that the host has got, if nothing else runs or waits; returns what was given."""
    try:
        queue = live.server().prompt_queue
        with queue.mutex:
            busy = bool(queue.queue or queue.currently_running)
        if not busy:
            next_step.comes(request["prompt"])  # first, as the device may idle
            _expect_noise(request["prompt"])
        for clip, text in [] if busy else _texts(request["prompt"]):
            coming = _worker.submit(_call, clip.encode_ahead(text))
            # else who is about to run the prompt keeps the interpreter for longer than all of it takes
            short_turns.__enter__()
            coming.add_done_callback(lambda _: short_turns.__exit__())
    except Exception as error:  # whatever was posted; the host will say what is wrong with it
        log.debug("Ark: a prompt could not be read (%s).", error)
    return request


def _expect_noise(prompt: dict[str, dict]) -> None:
    """Have the noise drawn of what a prompt samples first."""
    samplers = [node["inputs"] for node in prompt.values() if node.get("class_type") == SAMPLER]
    for inputs in samplers[: noise.KEPT]:
        if type(seed := inputs.get("seed")) is int:  # a bool is one, too
            noise.expect(seed)


def _texts(prompt: dict[str, dict]) -> Iterator[tuple[CachedCLIP, str]]:
    """What a prompt encodes with a CLIP that is there."""
    found = [node["inputs"] for node in prompt.values() if node.get("class_type") in ENCODERS]
    for inputs in found[:TEXTS]:
        text, link = inputs.get("text"), inputs.get("clip")
        source, output = link if isinstance(link, list) and len(link) == 2 else (None, None)
        loader = prompt.get(str(source), {})
        if not isinstance(text, str) or output != CLIP_OUTPUT or loader.get("class_type") != LOADER:
            continue
        name = json.dumps(loader["inputs"], sort_keys=True, default=str)
        if (clip := _clips.get(name, lambda: None)()) is not None:
            yield clip, text


def _encode(clip: CachedCLIP, text: str) -> bool:
    return clip.encode_ahead(text)()


def _call(encode: Callable[[], bool]) -> bool:
    try:
        return encode()
    except Exception as error:  # the prompt itself meets it again, and says so
        log.debug("Ark: a prompt could not be encoded ahead (%s).", error)
        return False
