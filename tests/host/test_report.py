"""ArkReport says what was set, with figures from runs."""

from __future__ import annotations

import re

import pytest

from ark.bootstrap import NodeError

pytestmark = pytest.mark.host


def run(server, attention: str, compare: bool, size: str = "64x64") -> tuple[str, bytes]:
    """The report's text and the chart that a graph of loader, combustion and report gives."""
    graph = server.graph(ArkSageCombustion={"attention": attention})
    model = graph[server.node_of(graph, "ArkSampler4Step")]["inputs"]["model"]
    wanted = {model[0], server.node_of(graph, "ArkFastLoader")}
    graph = {number: node for number, node in graph.items() if number in wanted}
    inputs = {"model": model, "size": size, "compare": compare}
    graph["report"] = {"class_type": "ArkReport", "inputs": inputs}
    graph["save"] = {"class_type": "SaveImage", "inputs": {"images": ["report", 1], "filename_prefix": "report"}}  # fmt: skip
    result = server.client.run(graph, timeout=180)
    (text,) = next(d["output"]["text"] for k, d in result["events"] if k == "executed" and d["node"] == "report")  # fmt: skip
    return text, result["images"][0]


def test_kernel_times_and_difference(server):
    text, chart = run(server, "math", compare=True)
    lines = text.splitlines()
    assert lines[:2] == ["attention: math", "compile: off"]
    here, there = (float(re.search(r"([0-9.]+) ms a step at 64x64", line)[1]) for line in lines[2:4])  # fmt: skip
    assert here > 0 and there > 0
    assert 0 <= float(lines[4].split()[1]) < 1e-4
    pixels = server.pixels(chart)
    assert pixels.shape[1] == 768 and (pixels == (215, 80, 30)).all(-1).sum() > 1000  # Ark's bar


def test_without_anything_set(server):
    text, _ = run(server, "none", compare=False)
    assert text.startswith("attention: ComfyUI's own\ncompile: off\nthis model: ")


def test_a_size_that_cannot_be_read_is_refused(server):
    with pytest.raises(NodeError, match="size: "):
        run(server, "none", False, "wide")


def test_the_engine_is_named(server):
    graph = server.graph(ArkSageCombustion={"attention": "none", "engine": "fused"})
    model = graph[server.node_of(graph, "ArkSampler4Step")]["inputs"]["model"]
    wanted = {model[0], server.node_of(graph, "ArkFastLoader")}
    graph = {number: node for number, node in graph.items() if number in wanted}
    graph["report"] = {"class_type": "ArkReport", "inputs": {"model": model, "size": "64x64", "compare": True}}  # fmt: skip
    events = server.client.run(graph, timeout=180)["events"]
    (text,) = next(d["output"]["text"] for k, d in events if k == "executed" and d["node"] == "report")  # fmt: skip
    assert "engine: fused, bf16, 0 CUDA graphs\n" in text
    assert 0 < float(text.split("difference: ")[1].split()[0]) < 1e-4
