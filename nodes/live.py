"""What the nodes show of themselves on the canvas (web/js): kept here, sent to the open pages, given to a page opened later.

A state belongs to a node of a graph, both by the names that the canvas gave them. Nothing of a prompt's text is kept, and
nothing outlives the server.
"""

from __future__ import annotations

import functools
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
        key: names the node with all that its result depends on.
    """

    graph: str | None
    node: str
    type: str
    prompt: str
    key: str

    def told(self, facts: Facts) -> Facts:
        """Facts as the canvas gets them."""
        return {"graph": self.graph, "node": self.node, "type": self.type, "prompt": self.prompt, **facts}  # fmt: skip


_states: OrderedDict[tuple[str | None, str], tuple[Place, Callable[[], Facts]]] = OrderedDict()
_runs: OrderedDict[str, Facts] = OrderedDict()


def server() -> Any:
    """The host's server; None where a program uses the nodes without one."""
    return getattr(getattr(sys.modules.get("server"), "PromptServer", None), "instance", None)


def place(node: type) -> Place | None:
    """Where a node stands, from the class that the host runs, with its hidden inputs; None outside a prompt."""
    context = get_executing_context()
    if context is None:
        return None
    hidden, number = getattr(node, "hidden", None), context.node_id
    prompt = getattr(hidden, "prompt", None) or {}
    own = f"{context.prompt_id} {number}"  # of a node that another one put there
    key = keys_of(prompt)[number] if number in prompt else own
    kind = node.__name__.removesuffix("Clone")
    return Place(_graph_of(getattr(hidden, "extra_pnginfo", None)), number, kind, context.prompt_id, key)  # fmt: skip


def _graph_of(png: Any) -> str | None:
    """The name of the graph that the canvas sends along with a prompt, for the picture's file."""
    return ((png or {}).get("workflow") or {}).get("id") if isinstance(png, dict) else None


def keys_of(prompt: dict[str, dict]) -> dict[str, str]:
    """Name each node of a prompt by its class, its inputs, and the names of those that it gets inputs from."""

    @functools.cache
    def key(number: str) -> str:
        inputs = {
            name: [key(str(value[0])), value[1]] if linked(value) else value
            for name, value in prompt[number]["inputs"].items()
        }
        named = json.dumps([prompt[number]["class_type"], inputs], sort_keys=True, default=str)
        return hashlib.sha256(named.encode()).hexdigest()

    def linked(value: Any) -> bool:
        return isinstance(value, list) and len(value) == 2 and str(value[0]) in prompt

    return {number: key(number) for number in prompt}


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
        _states.popitem(last=False)
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
    """Nodes that the last prompt took from the host's cache show what they did when they ran, be it in another graph."""
    known = {where.key: give for where, give in list(_states.values())}
    for _, name, prompt, extra, *_ in (item["prompt"] for item in _history(max_items=1).values()):
        graph = _graph_of(extra.get("extra_pnginfo"))
        for number, key in keys_of(prompt).items():
            there = _states.get((graph, number))
            if key in known and (there is None or there[0].key != key):
                kind = prompt[number]["class_type"]
                _states[graph, number] = Place(graph, number, kind, name, key), known[key]


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
