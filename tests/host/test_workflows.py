"""Each bundled workflow through the API of a real server, and beside it the same graph of the host's own sampling nodes."""

from __future__ import annotations

import copy
import io
import json

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from safetensors.torch import save_file

from ark.bootstrap import ROOT, WORKFLOW, to_api

pytestmark = pytest.mark.host

WORKFLOWS = sorted((ROOT / "workflows").glob("*.json"))
SIDE = 128
LORA = "ark_tiny_lora.safetensors"
# how many pictures a workflow saves, where it is not one
SAVED = {"ark_batch_of_prompts": 3, "ark_compare_with_native": 2}


def picture() -> bytes:
    """A PNG with a circle, of which the left half is transparent: what LoadImage makes a mask of."""
    image = Image.new("RGBA", (SIDE, SIDE), "white")
    ImageDraw.Draw(image).ellipse((30, 30, 100, 100), fill=(220, 30, 35))
    alpha = np.full((SIDE, SIDE), 255, np.uint8)
    alpha[:, : SIDE // 2] = 0
    image.putalpha(Image.fromarray(alpha))
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return stream.getvalue()


@pytest.fixture(scope="module")
def furnished(server):
    """The server, with a picture in its input folder and a LoRA for the embedded model."""
    assert server.client.upload("example.png", picture()) == "example.png"
    folder = server.host.base / "models" / "loras"
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(6)
    name = "diffusion_model.double_blocks.0.img_attn.qkv"
    save_file(
        {
            f"{name}.lora_A.weight": torch.randn(4, 256, generator=generator),
            f"{name}.lora_B.weight": torch.randn(768, 4, generator=generator) * 0.1,
        },
        folder / LORA,
    )
    return server


def small_graph(server, path, seed: int) -> dict:
    """A workflow in API form, at a size that a CPU makes quickly."""
    graph = to_api(json.loads(path.read_text(encoding="utf-8")), server.client.object_info())
    for node in graph.values():
        if node["class_type"] in ("EmptyFlux2LatentImage", "Flux2Scheduler"):
            node["inputs"].update(width=SIDE, height=SIDE)
        if node["class_type"] == "ArkReport":
            node["inputs"]["size"] = "32x32"
        for name in ("seed", "noise_seed"):
            if name in node["inputs"]:
                node["inputs"][name] = seed
    return graph


def stock_graph(graph: dict) -> dict:
    """The same graph with the host's own nodes in place of Ark's, the loader apart."""
    graph, links = copy.deepcopy(graph), {}
    for number, node in list(graph.items()):
        wired, kind = node["inputs"], node["class_type"]
        if kind == "ArkSageCombustion":
            links[number, 0] = graph.pop(number)["inputs"]["model"]
        elif kind == "ArkReport":
            del graph[number]
        elif kind == "ArkReferenceImages":
            conditioning = wired["conditioning"]
            for slot in (name for name in ("image1", "image2") if name in wired):
                graph[f"{number}e{slot}"] = made("VAEEncode", pixels=wired[slot], vae=wired["vae"])
                graph[f"{number}{slot}"] = made("ReferenceLatent", conditioning=conditioning, latent=[f"{number}e{slot}", 0])  # fmt: skip
                conditioning = [f"{number}{slot}", 0]
            del graph[number]
            graph[f"{number}l"] = made(
                "EmptyFlux2LatentImage", width=SIDE, height=SIDE, batch_size=1
            )
            links[number, 0], links[number, 1] = conditioning, [f"{number}l", 0]
        elif kind == "ArkSampler4Step":
            graph |= stock_sampler(number, wired)
    for node in graph.values():
        for name, value in node["inputs"].items():
            while (
                isinstance(value, list) and tuple(value) in links and links[tuple(value)] != value
            ):
                value = links[tuple(value)]
            node["inputs"][name] = value
    return {number: node for number, node in graph.items() if node["class_type"] != "PreviewImage"}


def made(kind: str, **inputs) -> dict:
    return {"class_type": kind, "inputs": inputs}


def stock_sampler(number: str, wired: dict) -> dict:
    """SamplerCustomAdvanced and what it needs."""
    total = int(wired["steps"] / wired["denoise"])
    return {
        f"{number}g": made("BasicGuider", model=wired["model"], conditioning=wired["positive"]),
        f"{number}n": made("RandomNoise", noise_seed=wired["seed"]),
        f"{number}k": made("KSamplerSelect", sampler_name="euler"),
        f"{number}f": made("Flux2Scheduler", steps=total, width=SIDE, height=SIDE),
        f"{number}s": made("SplitSigmas", sigmas=[f"{number}f", 0], step=total - wired["steps"]),
        number: made(
            "SamplerCustomAdvanced",
            noise=[f"{number}n", 0],
            guider=[f"{number}g", 0],
            sampler=[f"{number}k", 0],
            sigmas=[f"{number}s", 1],
            latent_image=wired["latent_image"],
        ),
    }


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_workflow_makes_the_pictures_of_the_stock_graph(furnished, fresh_seed: int, path):
    graph = small_graph(furnished, path, fresh_seed)
    result = furnished.client.run(graph, timeout=200)
    assert result["status"] == "success"
    assert result["previews"] >= 1
    ours = [furnished.pixels(png) for png in result["images"]]
    assert len(ours) == SAVED.get(path.stem, 1)
    assert all(image.shape == (SIDE, SIDE, 3) and image.std() > 2 for image in ours)
    expected = stock_graph(graph)
    assert not any(
        node["class_type"].startswith("Ark") and node["class_type"] != "ArkFastLoader"
        for node in expected.values()
    )
    stock = furnished.client.run(expected, timeout=200)
    assert any(number in stock["node_seconds"] for number in expected if number in graph)
    for image, png in zip(ours, stock["images"], strict=True):
        np.testing.assert_array_equal(image, furnished.pixels(png))


def test_the_comparison_of_a_workflow_holds_pictures_that_are_alike(furnished, fresh_seed: int):
    graph = small_graph(furnished, WORKFLOW.with_name("ark_compare_with_native.json"), fresh_seed)
    result = furnished.client.run(graph, timeout=200)
    ark, native = map(furnished.pixels, result["images"])
    np.testing.assert_array_equal(ark, native)
    report = result["history"]["outputs"][furnished.node_of(graph, "ArkReport")]["text"][0]
    assert "without Ark" in report and "difference" in report


def test_the_lora_of_a_workflow_is_felt(furnished, fresh_seed: int):
    graph = small_graph(furnished, WORKFLOW.with_name("ark_lora.json"), fresh_seed)
    patched = furnished.render(graph)
    graph[furnished.node_of(graph, "LoraLoaderModelOnly")]["inputs"]["strength_model"] = 0
    assert (furnished.render(graph) != patched).any()


def test_inpainting_leaves_the_rest_of_the_picture(furnished, fresh_seed: int):
    graph = small_graph(furnished, WORKFLOW.with_name("ark_inpaint.json"), fresh_seed)
    # the picture is white
    graph[furnished.node_of(graph, "CLIPTextEncode")]["inputs"]["text"] = (
        "a large green star in the center on a black background"
    )
    painted = furnished.render(graph).astype(int)
    mask = furnished.node_of(graph, "SetLatentNoiseMask")
    sampler = furnished.node_of(graph, "ArkSampler4Step")
    graph[furnished.node_of(graph, "VAEDecode")]["inputs"]["samples"] = graph[mask]["inputs"][
        "samples"
    ]
    del graph[mask], graph[sampler]
    before = furnished.render(graph).astype(int)
    change = np.abs(painted - before).mean(axis=(0, 2))
    # the latent stays as it was (tests/host/test_sample.py); the decoder normalises over the whole picture
    assert change[-SIDE // 4 :].mean() < 0.5 * change[: SIDE // 4].mean()


def test_a_reference_changes_the_picture(furnished, fresh_seed: int):
    graph = small_graph(furnished, WORKFLOW.with_name("ark_edit_one_reference.json"), fresh_seed)
    edited = furnished.render(graph)
    references = furnished.node_of(graph, "ArkReferenceImages")
    graph[furnished.node_of(graph, "ArkSampler4Step")]["inputs"]["positive"] = graph[references][
        "inputs"
    ]["conditioning"]
    assert (furnished.render(graph) != edited).any()


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_workflow_is_a_template_with_a_thumbnail(server, path):
    assert path.stem in server.client.get("/api/workflow_templates")["ark"]
    picture = server.client.get(f"/api/workflow_templates/ark/{path.stem}.jpg", raw=True)
    assert picture.startswith(b"\xff\xd8\xff")


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_a_note_names_every_file_and_its_folder(server, path):
    nodes = json.loads(path.read_text(encoding="utf-8"))["nodes"]
    (note,) = (node["widgets_values"][0] for node in nodes if node["type"] == "MarkdownNote")
    needed = ["diffusion_models", "text_encoders", "vae"]
    needed += ["loras"] if any("Lora" in node["type"] for node in nodes) else []
    assert [folder for folder in needed if f"models/{folder}" not in note] == []
    assert ("| input," in note) == any(node["type"] == "LoadImage" for node in nodes)
    assert note.count(".safetensors") == 3 and "nothing to download" in note
