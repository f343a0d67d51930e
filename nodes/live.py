"""What the nodes show of themselves on the canvas (web/js): kept here, sent to the open pages, given to a page opened later.

A state belongs to a node of a graph, both by the names that the canvas gave them. Nothing of a prompt's text is kept, and
nothing outlives the server.
"""

from __future__ import annotations

import sys
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

from comfy_execution.utils import get_executing_context

EVENT, ROUTE = "ark.state", "/ark/state"
KEPT_STATES, KEPT_RUNS = 200, 24
Facts = dict[str, Any]

_states: OrderedDict[tuple[str | None, str], tuple[Facts, Callable[[], Facts]]] = OrderedDict()
_runs: OrderedDict[str, Facts] = OrderedDict()


def server() -> Any:
    """The host's server; None where a program uses the nodes without one."""
    return getattr(getattr(sys.modules.get("server"), "PromptServer", None), "instance", None)


def place(node: type) -> Facts | None:
    """Where a node stands that runs now, or None outside a prompt.

    Args:
        node: the class that the host runs, with its hidden inputs.

    Returns:
        graph (None for a prompt that no canvas made), node, type and prompt.
    """
    context = get_executing_context()
    if context is None:
        return None
    png = getattr(getattr(node, "hidden", None), "extra_pnginfo", None) or {}
    graph = (png.get("workflow") or {}).get("id") if isinstance(png, dict) else None
    return {"graph": graph, "node": context.node_id, "type": node.__name__.removesuffix("Clone"), "prompt": context.prompt_id}  # fmt: skip


def show(where: Facts | None, facts: Callable[[], Facts] | Facts) -> None:
    """Let a node show facts from now on.

    Args:
        where: see `place`.
        facts: as JSON takes them; or what gives them as they are when it is called.
    """
    if where is None:
        return
    give = facts if callable(facts) else lambda: facts
    key = where["graph"], where["node"]
    _states[key] = where, give
    _states.move_to_end(key)
    while len(_states) > KEPT_STATES:
        _states.popitem(last=False)
    if (instance := server()) is not None:
        instance.send_sync(EVENT, {**where, **give()})


def add_to_run(where: Facts | None, size: str | None = None, **amounts: float) -> None:
    """Add to what is known of a prompt that makes pictures.

    Args:
        where: see `place`.
        size: of the pictures in px, as text.
        amounts: numbers, summed over the prompt's nodes.
    """
    if where is None:
        return
    run = _runs.setdefault(where["prompt"], {"prompt": where["prompt"], "at": time.time()})
    for name, value in amounts.items():
        run[name] = run.get(name, 0) + value
    if size is not None:
        run["size"] = size
    while len(_runs) > KEPT_RUNS:
        _runs.popitem(last=False)


def everything() -> Facts:
    """All states as they are now, and the last prompts that an Ark sampler took part in, the oldest first."""
    for run in list(_runs.values()):
        if "seconds" not in run:
            run.update(_whole_time(run["prompt"]))
    return {
        "states": [{**where, **give()} for where, give in list(_states.values())],
        "runs": [run for run in list(_runs.values()) if "sample_ms" in run],
    }


def _whole_time(prompt: str) -> Facts:
    """Seconds of a prompt that has ended, by the host's own history; empty as long as it runs."""
    queue = getattr(server(), "prompt_queue", None)
    history = queue.get_history(prompt_id=prompt).get(prompt) if queue else None
    messages = ((history or {}).get("status") or {}).get("messages") or []
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
