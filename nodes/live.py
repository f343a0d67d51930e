"""What the nodes show of themselves on the canvas (web/js): kept here, sent to the open pages, given to a page opened later.

A state belongs to a node of a graph, both by the names that the canvas gave them. Nothing of a prompt's text is kept, and
nothing outlives the server.
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from comfy_execution.utils import get_executing_context

EVENT, ROUTE = "ark.state", "/ark/state"
KEPT_STATES, KEPT_RUNS = 200, 24
Facts = dict[str, Any]


@dataclass(frozen=True)
class Place:
    """Where a node stands that runs.

    Attributes:
        graph: the canvas's name of it; None for a prompt that no canvas made.
        node: its id in the graph.
        type: its class.
        prompt: the id of the run.
    """

    graph: str | None
    node: str
    type: str
    prompt: str

    def told(self, facts: Facts) -> Facts:
        """Facts as the canvas gets them."""
        return {"graph": self.graph, "node": self.node, "type": self.type, "prompt": self.prompt, **facts}  # fmt: skip


_states: OrderedDict[tuple[str | None, str], tuple[Place, Callable[[], Facts]]] = OrderedDict()
_keys: dict[tuple[str | None, str], str] = {}  # of the nodes with a state: what it depends on
_runs: OrderedDict[str, Facts] = OrderedDict()
_looked_at: set[str] = set()  # the prompts that `_take_over` knows


def server() -> Any:
    """The host's server; None where a program uses the nodes without one."""
    return getattr(getattr(sys.modules.get("server"), "PromptServer", None), "instance", None)


def place(node: type) -> Place | None:
    """Where a node stands, from the class that the host runs, with its hidden inputs; None outside a prompt."""
    context = get_executing_context()
    if context is None:
        return None
    graph = _graph_of(getattr(getattr(node, "hidden", None), "extra_pnginfo", None))
    return Place(graph, context.node_id, node.__name__.removesuffix("Clone"), context.prompt_id)


def _graph_of(png: Any) -> str | None:
    """The name of the graph that the canvas sends along with a prompt, for the picture's file."""
    return ((png or {}).get("workflow") or {}).get("id") if isinstance(png, dict) else None


def show(where: Place | None, facts: Callable[[], Facts] | Facts) -> None:
    """Let a node show facts from now on.

    Args:
        where: see `place`.
        facts: as JSON takes them; or what gives them as they are when it is called.
    """
    if where is None:
        return
    give = facts if callable(facts) else lambda: facts
    key = where.graph, where.node
    _states[key] = where, give
    _states.move_to_end(key)
    while len(_states) > KEPT_STATES:
        _keys.pop(_states.popitem(last=False)[0], None)
    if (instance := server()) is not None:
        instance.send_sync(EVENT, where.told(give()))


def add_to_run(where: Place | None, size: str | None = None, **amounts: float) -> None:
    """Add to what is known of a prompt that makes pictures.

    Args:
        where: see `place`.
        size: of the pictures in px, as text.
        amounts: numbers, summed over the prompt's nodes.
    """
    if where is None:
        return
    run = _runs.setdefault(where.prompt, {"prompt": where.prompt, "at": time.time()})
    for name, value in amounts.items():
        run[name] = run.get(name, 0) + value
    if size is not None:
        run["size"] = size
    while len(_runs) > KEPT_RUNS:
        _runs.popitem(last=False)


def everything() -> Facts:
    """All states as they are now, and the last prompts that an Ark sampler took part in, the oldest first."""
    _take_over()
    for run in list(_runs.values()):
        if "seconds" not in run:
            run.update(_whole_time(run["prompt"]))
    return {
        "states": [where.told(give()) for where, give in list(_states.values())],
        "runs": [run for run in list(_runs.values()) if "sample_ms" in run],
    }


def _take_over() -> None:
    """Nodes that a prompt took from the host's cache show what they did when they ran, be it in another graph."""
    last = [item["prompt"] for item in _history(max_items=KEPT_RUNS).values()]  # the oldest first
    new = [item for item in last if item[1] not in _looked_at]
    _looked_at.clear()
    _looked_at.update(item[1] for item in last)
    for _, name, prompt, extra, *_ in new:
        graph = _graph_of(extra.get("extra_pnginfo"))
        known = {key: _states[place] for place, key in list(_keys.items()) if place in _states}
        for number, key in keys_of(prompt).items():
            here = graph, number
            ran = here in _states and _states[here][0].prompt == name
            if not ran and (key not in known or _keys.get(here) == key):
                continue
            if not ran:
                kind = prompt[number]["class_type"]
                _states[here] = Place(graph, number, kind, name), known[key][1]
            _keys[here] = key


def keys_of(prompt: dict[str, dict]) -> dict[str, str]:
    """Name each node of a prompt by its class, its inputs, and the names of those that it gets inputs from."""

    def source(value: Any) -> str | None:
        """The node at the other end of an input."""
        linked = isinstance(value, list) and len(value) == 2 and str(value[0]) in prompt
        return str(value[0]) if linked else None

    keys: dict[str, str] = {}
    begun: set[str] = set()
    waiting = list(prompt)
    while waiting:  # no recursion: a chain may be longer than Python's stack
        number = waiting[-1]
        inputs = prompt[number]["inputs"]
        ahead = [] if number in begun else [s for s in map(source, inputs.values()) if s and s not in begun]  # fmt: skip
        begun.add(number)
        waiting += ahead
        if ahead:
            continue
        waiting.pop()
        values = {name: [keys.get(source(v) or ""), v[1]] if source(v) else v for name, v in inputs.items()}  # fmt: skip
        named = json.dumps([prompt[number]["class_type"], values], sort_keys=True, default=str)
        keys.setdefault(number, hashlib.sha256(named.encode()).hexdigest())
    return keys


def _history(**which: Any) -> dict[str, dict]:
    queue = getattr(server(), "prompt_queue", None)
    return queue.get_history(**which) if queue else {}


def _whole_time(prompt: str) -> Facts:
    """Seconds of a prompt that has ended, by the host's own history; empty as long as it runs."""
    history = _history(prompt_id=prompt).get(prompt) or {}
    messages = (history.get("status") or {}).get("messages") or []
    times = {kind: data.get("timestamp") for kind, data in messages}
    start = times.get("execution_start")
    end = times.get("execution_success")
    return {"seconds": (end - start) / 1e3} if start and end else {}


def serve() -> None:
    """Answer pages that ask for `everything`; once, when the host loads the pack."""
    if (instance := server()) is None:
        return
    from aiohttp import web  # the host's

    @instance.routes.get(ROUTE)
    async def states(_request: web.Request) -> web.Response:
        return web.json_response(everything())
