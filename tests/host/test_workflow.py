"""The bundled workflow through the API of a real server."""

from __future__ import annotations

import copy
import json
import re
import urllib.request

import numpy as np
import pytest

from ark.bootstrap import WORKFLOW, to_api

pytestmark = pytest.mark.host

NODES = ("ArkFastLoader", "ArkSageCombustion", "ArkSampler4Step")
SMALL = {"EmptyFlux2LatentImage": {"width": 128, "height": 128}}


@pytest.mark.parametrize("node", NODES)
def test_node_is_listed_and_every_input_has_a_tooltip(server, node: str):
    info = server.client.object_info()[node]
    assert info["category"] == "Ark"
    assert info["description"]
    inputs = {**info["input"].get("required", {}), **info["input"].get("optional", {})}
    assert inputs
    for name, spec in inputs.items():
        assert len(spec) > 1 and spec[1].get("tooltip"), f"{node}.{name} has no tooltip"


def test_embedded_files_are_in_the_loaders_lists(server):
    inputs = server.client.object_info()["ArkFastLoader"]["input"]["required"]
    chosen = server.api_graph[server.node_of(server.api_graph, "ArkFastLoader")]["inputs"]
    for name, spec in inputs.items():
        options = spec[0] if isinstance(spec[0], list) else spec[1]["options"]
        assert chosen[name] in options


def test_workflow_renders_with_progress_and_previews(server):
    graph = server.graph(ArkSampler4Step={"seed": 20261124})  # a seed no other test has cached
    result = server.client.run(graph, timeout=120)
    sampler = server.node_of(graph, "ArkSampler4Step")
    steps = [
        data
        for kind, data in result["events"]
        if kind == "progress" and data.get("node", sampler) == sampler
    ]
    assert [(data["value"], data["max"]) for data in steps if data["value"]] == [
        (i, 4) for i in (1, 2, 3, 4)
    ]
    assert result["previews"] >= 1
    assert result["status"] == "success"
    assert result["history"]["status"]["status_str"] == "success"
    (png,) = result["images"]
    image = server.pixels(png)
    assert image.shape == (256, 256, 3)
    assert image.std() > 2, "the image is blank"


def test_the_kernel_and_its_reason_are_readable_from_the_nodes_result(server):
    graph = server.graph(ArkSampler4Step={"steps": 1}, **SMALL)
    report = [server.node_of(graph, "ArkSageCombustion"), 1]
    graph["report"] = {"class_type": "PreviewAny", "inputs": {"source": report}}
    text = server.client.run(graph, timeout=120)["history"]["outputs"]["report"]["text"][0]
    if server.on_cpu:
        assert re.search("cudnn, .*: needs an NVIDIA GPU", text)
    assert text


def test_same_seed_same_pixels_other_seed_other_pixels(server):
    first = server.render(server.graph(ArkSampler4Step={"seed": 7}, **SMALL))
    other = server.render(
        server.graph(ArkSampler4Step={"seed": 8}, **SMALL)
    )  # also pushes seed 7 out of the cache
    graph = server.graph(ArkSampler4Step={"seed": 7}, **SMALL)
    again = server.client.run(graph, timeout=120)
    assert server.node_of(graph, "ArkSampler4Step") in again["node_seconds"], (
        "the second run came from the cache"
    )
    np.testing.assert_array_equal(server.pixels(again["images"][0]), first)
    assert (other != first).any()


def test_steps_and_denoise_take_effect(server, fresh_seed: int):
    seed = {"seed": fresh_seed}
    four = server.render(server.graph(ArkSampler4Step=seed, **SMALL))
    one = server.render(server.graph(ArkSampler4Step={**seed, "steps": 1}, **SMALL))
    half = server.render(server.graph(ArkSampler4Step={**seed, "denoise": 0.5}, **SMALL))
    assert (four != one).any() and (four != half).any()


@pytest.mark.parametrize(("width", "height"), [(320, 192), (144, 400)])
def test_other_sizes(server, width: int, height: int):
    image = server.render(server.graph(EmptyFlux2LatentImage={"width": width, "height": height}))
    assert image.shape == (height, width, 3)
    assert image.std() > 2, "the image is blank"


def test_batch_of_two(server):
    result = server.client.run(
        server.graph(EmptyFlux2LatentImage={"width": 128, "height": 128, "batch_size": 2})
    )
    first, second = map(server.pixels, result["images"])
    assert (first != second).any()


def test_bypassing_the_attention_node_changes_nothing(server, fresh_seed: int):
    def render_with(attention: str):
        return server.render(
            server.graph(
                ArkSageCombustion={"attention": attention},
                ArkSampler4Step={"seed": fresh_seed},
                **SMALL,
            )
        )

    bypassed = copy.deepcopy(server.workflow)
    next(node for node in bypassed["nodes"] if node["type"] == "ArkSageCombustion")["mode"] = 4
    graph = to_api(bypassed, server.client.object_info())
    assert not any(node["class_type"] == "ArkSageCombustion" for node in graph.values())
    graph[server.node_of(graph, "ArkSampler4Step")]["inputs"]["seed"] = fresh_seed
    graph[server.node_of(graph, "EmptyFlux2LatentImage")]["inputs"].update(
        SMALL["EmptyFlux2LatentImage"]
    )
    render_with("math")  # of this kernel nothing must stay behind
    expected = server.render(graph)
    np.testing.assert_array_equal(render_with("none"), expected)
    if server.on_cpu:  # where auto has nothing better than the host's own attention
        np.testing.assert_array_equal(render_with("auto"), expected)


def test_branches_with_different_attention_do_not_disturb_each_other(server, fresh_seed: int):
    choices = ("none", "math", "none")
    alone = {
        choice: server.render(
            server.graph(
                ArkSageCombustion={"attention": choice},
                ArkSampler4Step={"seed": fresh_seed},
                **SMALL,
            )
        )
        for choice in dict.fromkeys(choices)
    }
    graph = server.graph(ArkSampler4Step={"seed": fresh_seed}, **SMALL)
    branch = ("ArkSageCombustion", "ArkSampler4Step", "VAEDecode", "SaveImage")
    numbers = {server.node_of(graph, name) for name in branch}
    combustion, save = (
        server.node_of(graph, "ArkSageCombustion"),
        server.node_of(graph, "SaveImage"),
    )
    parts = {number: graph.pop(number) for number in numbers}
    for index, choice in enumerate(choices):
        for number, node in parts.items():
            node = copy.deepcopy(node)
            for name, value in node["inputs"].items():
                if isinstance(value, list) and value[0] in numbers:
                    node["inputs"][name] = [f"{index}{value[0]}", value[1]]
            if node["class_type"] == "ArkSageCombustion":
                node["inputs"]["attention"] = choice
            if node["class_type"] == "ArkSampler4Step":
                node["inputs"]["seed"] = fresh_seed
            if node["class_type"] == "SaveImage":
                node["inputs"]["filename_prefix"] = f"branch{index}"
            graph[f"{index}{number}"] = node
        graph[f"report{index}"] = {
            "class_type": "PreviewAny",
            "inputs": {"source": [f"{index}{combustion}", 1]},
        }
    result = server.client.run(graph, timeout=120)
    outputs = result["history"]["outputs"]
    reports = [outputs[f"report{index}"]["text"][0] for index in range(len(choices))]
    assert [report.split(":")[0] for report in reports] == ["host", "math", "host"]
    for index, choice in enumerate(choices):
        (saved,) = outputs[f"{index}{save}"]["images"]
        png = server.client.get(
            f"/view?filename={saved['filename']}&type=output&subfolder=", raw=True
        )
        np.testing.assert_array_equal(server.pixels(png), alone[choice])


def test_interrupt_stops_and_the_next_run_is_clean(server, fresh_seed: int):
    small = server.graph(ArkSampler4Step={"seed": fresh_seed}, **SMALL)
    before = server.render(small)
    long = server.graph(
        ArkSampler4Step={"seed": fresh_seed, "steps": 50},
        EmptyFlux2LatentImage={"width": 512, "height": 512},
    )
    seen = []

    def stop(kind: str, data: dict) -> None:
        if kind == "progress":
            seen.append(data["value"])
            if len(seen) == 2:
                server.client.interrupt()

    result = server.client.run(long, stop, timeout=120)
    assert result["status"] == "interrupted"
    assert max(seen) < 50, "the interrupt came only after the last step"
    assert not result["images"]
    again = server.client.run(small, timeout=120)
    np.testing.assert_array_equal(server.pixels(again["images"][0]), before)


def test_workflow_is_listed_as_a_template(server):
    assert WORKFLOW.stem in server.client.get("/api/workflow_templates")["ark"]
    assert server.client.get(f"/api/workflow_templates/ark/{WORKFLOW.name}") == json.loads(
        WORKFLOW.read_text(encoding="utf-8")
    )


def test_template_has_its_thumbnail(server):
    url = f"{server.host.url}/api/workflow_templates/ark/{WORKFLOW.stem}.jpg"
    with urllib.request.urlopen(url, timeout=10) as reply:
        assert reply.read(3) == b"\xff\xd8\xff"


def stock_sampler_graph(server, seed: int, width: int, height: int) -> dict:
    """The bundled graph with the host's own sampling nodes in place of ArkSampler4Step."""
    graph = server.graph(EmptyFlux2LatentImage={"width": width, "height": height})
    sampler = server.node_of(graph, "ArkSampler4Step")
    wired = graph.pop(sampler)["inputs"]
    graph |= {
        "guider": {
            "class_type": "BasicGuider",
            "inputs": {"model": wired["model"], "conditioning": wired["positive"]},
        },
        "sigmas": {
            "class_type": "Flux2Scheduler",
            "inputs": {"steps": 4, "width": width, "height": height},
        },
        "euler": {"class_type": "KSamplerSelect", "inputs": {"sampler_name": "euler"}},
        "noise": {"class_type": "RandomNoise", "inputs": {"noise_seed": seed}},
        sampler: {
            "class_type": "SamplerCustomAdvanced",
            "inputs": {
                "noise": ["noise", 0],
                "guider": ["guider", 0],
                "sampler": ["euler", 0],
                "sigmas": ["sigmas", 0],
                "latent_image": wired["latent_image"],
            },
        },
    }
    return graph


@pytest.mark.parametrize(("width", "height"), [(256, 256), (320, 192)])
def test_stock_sampling_nodes_give_the_same_image(server, fresh_seed: int, width: int, height: int):
    size = {"width": width, "height": height}
    ours = server.render(
        server.graph(ArkSampler4Step={"seed": fresh_seed}, EmptyFlux2LatentImage=size)
    )
    stock = server.render(stock_sampler_graph(server, fresh_seed, width, height))
    assert (
        np.abs(ours.astype(int) - stock.astype(int)).max() <= 1
    )  # latents agree to 1e-5; a pixel may round the other way
