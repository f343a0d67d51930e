"""What the canvas is told of a run: by the event while it goes on, and by the route afterwards."""

from __future__ import annotations

import copy
import json
import math
import uuid

import pytest

pytestmark = pytest.mark.host


@pytest.fixture(scope="module")
def told(server) -> dict:
    """One run of the bundled workflow, with Ark's own text node, from a graph that has a name."""
    graph = server.graph(
        ArkSampler4Step={"seed": 77}, EmptyFlux2LatentImage={"width": 128, "height": 64}
    )
    text = server.node_of(graph, "CLIPTextEncode")
    graph[text]["class_type"] = "ArkTextEncode"
    graph[text]["inputs"]["text"] = "a large green star, told to nobody"
    names, post = [str(uuid.uuid4()) for _ in range(3)], server.client.post

    def named(path: str, body: dict) -> object:
        return post(path, {**body, "extra_data": {"extra_pnginfo": {"workflow": {"id": names[0]}}}})

    server.client.post = named
    try:
        post("/free", {"free_memory": True})  # the loader is to run, whatever ran before
        run = server.client.run(graph, timeout=200)
        told = {
            "graph": graph,
            "name": names[0],
            "run": run,
            "later": server.client.get("/ark/state"),
        }
        # another graph, whose loader the host need not run again
        moved = {f"7{number}": copy.deepcopy(node) for number, node in graph.items()}
        for node in moved.values():
            for input_name, value in node["inputs"].items():
                if isinstance(value, list):
                    node["inputs"][input_name] = [f"7{value[0]}", value[1]]
        moved[server.node_of(moved, "ArkSampler4Step")]["inputs"]["seed"] = 78
        for _ in range(2):  # the second time no node at all
            names.append(names.pop(0))
            server.client.run(moved, timeout=200)
            last = server.client.get("/ark/state")  # as the canvas does
    finally:
        server.client.post = post
    return {
        **told,
        "moved": moved,
        "others": (names[2], names[0]),
        "last": last,
    }


def state_of(told: dict, kind: str) -> dict:
    """What the route says of the only node of a type in the graph."""
    (state,) = (s for s in told["later"]["states"] if s["graph"] == told["name"] and s["type"] == kind)  # fmt: skip
    assert told["graph"][state["node"]]["class_type"] == kind
    return state


def test_the_event_says_what_the_route_says(told):
    sent = {data["type"]: data for kind, data in told["run"]["events"] if kind == "ark.state"}
    # the host may have the results of the others from an earlier test
    assert sent.keys() >= {"ArkTextEncode", "ArkSampler4Step"}
    for kind in sent.keys() - {"ArkFastLoader"}:  # what is resident changes
        assert sent[kind] == state_of(told, kind)


def test_the_sampler_tells_its_steps(told, server):
    state = state_of(told, "ArkSampler4Step")
    assert (state["width"], state["height"], state["batch"], state["steps"]) == (128, 64, 1, 4)
    assert state["references"] == 0 and state["instead"] == [] and state["engine"] == "host"
    assert 0 < state["step_ms"] < state["ms"]
    hidden, blocks, tokens = 256, 4, 32 + 512  # of the embedded model
    flop = blocks * (26 * tokens * hidden**2 + 4 * tokens**2 * hidden)
    assert math.isclose(state["tflops"], flop / state["step_ms"] / 1e9, rel_tol=1e-6)
    assert (
        state["floor_ms"] is None or state["floor_ms"] > 0
    )  # a server's first run does not wait for it


def test_the_loader_tells_what_is_resident(told):
    state = state_of(told, "ArkFastLoader")
    assert [part["part"] for part in state["resident"]] == ["diffusion_model", "text_encoder", "vae"]  # fmt: skip
    transformer = state["resident"][0]
    assert 1e6 < transformer["bytes"] <= transformer["of"] and transformer["device"]
    assert state["opened"]["bytes"] > 30e6 and state["pinned"]["limit"] >= 0


def test_combustion_and_text_say_why_and_whence(told):
    combustion = state_of(told, "ArkSageCombustion")
    assert combustion["why"] and combustion["engine"] == "host" and combustion["compile"] is None
    assert state_of(told, "ArkTextEncode")["source"] in ("memory", "disk", "encoder")


def test_a_run_is_kept_with_its_whole_time(told):
    (run,) = (r for r in told["later"]["runs"] if r["prompt"] == told["run"]["prompt_id"])
    assert (run["size"], run["steps"], run["images"]) == ("128x64", 4, 1)
    assert run["seconds"] >= (run["sample_ms"] + run["encode_ms"]) / 1e3 - 0.002  # whole ms


def test_no_word_of_the_prompt_is_kept(told):
    assert "told to nobody" not in json.dumps(told["later"])


def test_a_node_that_need_not_run_shows_what_it_did(told):
    there, cached = (
        {s["type"]: s for s in told["last"]["states"] if s["graph"] == name}
        for name in told["others"]
    )
    loader, before = there["ArkFastLoader"], state_of(told, "ArkFastLoader")
    assert told["moved"][loader["node"]]["class_type"] == "ArkFastLoader"
    assert loader["opened"] == before["opened"] and loader["node"] != before["node"]
    assert there["ArkSageCombustion"]["why"] == state_of(told, "ArkSageCombustion")["why"]
    assert there["ArkSampler4Step"]["ms"] != state_of(told, "ArkSampler4Step")["ms"]
    assert cached.keys() == there.keys()
    assert cached["ArkSampler4Step"]["ms"] == there["ArkSampler4Step"]["ms"]
