"""A custom node pack for a test's server: first steps are begun on a CPU, too, and counted, for whoever asks at /begun."""

import sys
import threading

import server
from aiohttp import web

NODE_CLASS_MAPPINGS = {}
LOG = []


def module(name):
    return next(found for key, found in sys.modules.items() if key.endswith(name))


def watch(first_step):
    """Note down what is begun ahead, and what a run finds."""
    begin, arrived = first_step.FirstStep.begin, first_step.FirstStep._arrived

    def noted_begin(self, seed, draw, text):
        before = self._ahead
        begin(self, seed, draw, text)
        when = "at its start" if text is None else "after its text"
        if threading.current_thread() is threading.main_thread():
            when = "on arrival"
        if self._ahead is None or self._ahead[2].begun is None:
            LOG.append(f"not begun {when}")
        elif (
            self._ahead is not before
        ):  # it is asked for when the prompt arrives and when it starts
            LOG.append(f"begun {when}")

    def noted_arrived(self, *given):
        found = arrived(self, *given)
        LOG.append("taken" if found else "not taken")
        return found

    first_step.FirstStep.begin, first_step.FirstStep._arrived = noted_begin, noted_arrived


@server.PromptServer.instance.routes.get("/begun")
async def begun(request):
    first_step = module("patches.first_step")
    module("toolkit.fused.graph").Graphs.recorded = 1
    if not hasattr(first_step, "watched"):
        first_step.watched = True
        watch(first_step)
    if "on" in request.query:
        first_step.DEVICES = ("cpu",) if request.query["on"] == "1" else ()
    found = list(LOG)
    LOG.clear()
    return web.json_response(found)
