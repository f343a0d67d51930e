"""ArkFastLoader's MODEL, CLIP and VAE are ordinary: the host's own nodes and controls work on them, and leave no trace."""

from __future__ import annotations

import json
import os
import shutil
import struct
import urllib.request
from pathlib import Path

import numpy as np
import pytest

from ark.bootstrap import ROOT, NodeError

pytestmark = pytest.mark.host
KLEIN = ROOT / "assets" / "diffusion_models" / "ark_tiny_klein.safetensors"
SMALL = {"EmptyFlux2LatentImage": {"width": 64, "height": 64}}


def through(server, seed: int, class_type: str, slot: int = 0, **inputs) -> dict:
    """The bundled graph with one more node on the model's way from the loader."""
    graph = server.graph(ArkSampler4Step={"seed": seed, "steps": 2}, **SMALL)
    combustion = graph[server.node_of(graph, "ArkSageCombustion")]["inputs"]
    link = combustion["model"]
    wired = {key: link if value == "MODEL" else value for key, value in inputs.items()}
    graph["extra"] = {"class_type": class_type, "inputs": wired}
    combustion["model"] = ["extra", slot]
    return graph


def plain(server, seed: int):
    return server.render(server.graph(ArkSampler4Step={"seed": seed, "steps": 2}, **SMALL))


@pytest.fixture
def lora(server) -> str:
    """A LoRA of two layers, in the names that trainers write."""
    import torch
    from safetensors.torch import load_file, save_file

    weights, tensors = load_file(KLEIN), {}
    torch.manual_seed(2)
    for layer in ("double_blocks.1.img_attn.qkv", "single_blocks.0.linear1"):
        rows, columns = weights[f"{layer}.weight"].shape
        tensors[f"diffusion_model.{layer}.lora_A.weight"] = torch.randn(4, columns) * 0.1
        tensors[f"diffusion_model.{layer}.lora_B.weight"] = torch.randn(rows, 4) * 0.1
    path = server.host.base / "models" / "loras" / "two_layers.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path)
    return path.name


def test_lora_takes_effect_by_strength_and_leaves_no_trace(server, fresh_seed: int, lora: str):
    before = plain(server, fresh_seed)
    images = {
        strength: server.render(
            through(
                server, fresh_seed, "LoraLoaderModelOnly", model="MODEL", lora_name=lora, strength_model=strength,
            )
        )
        for strength in (1.0, 0.3, 0.0)
    }  # fmt: skip
    assert (images[1.0] != before).any() and (images[0.3] != images[1.0]).any()
    np.testing.assert_array_equal(images[0.0], before)
    np.testing.assert_array_equal(
        server.render(server.graph(ArkSampler4Step={"seed": fresh_seed, "steps": 2}, **SMALL)),
        before,
    )


def test_merging_a_model_with_itself(server, fresh_seed: int):
    merged = through(
        server, fresh_seed, "ModelMergeSimple", model1="MODEL", model2="MODEL", ratio=0.5
    )
    difference = np.abs(server.render(merged).astype(int) - plain(server, fresh_seed))
    assert difference.mean() < 1  # bf16 weights, rounded once more


def test_stock_ksampler(server, fresh_seed: int):
    graph = server.graph(**SMALL)
    sampler = server.node_of(graph, "ArkSampler4Step")
    wired = graph[sampler]["inputs"]
    graph[sampler] = {
        "class_type": "KSampler",
        "inputs": {
            "model": wired["model"],
            "positive": wired["positive"],
            "negative": wired["positive"],
            "latent_image": wired["latent_image"],
            "seed": fresh_seed,
            "steps": 2,
            "cfg": 1.0,
            "sampler_name": "euler",
            "scheduler": "simple",
            "denoise": 1.0,
        },
    }
    assert server.render(graph).std() > 1


def test_torch_compile_model(server, fresh_seed: int):
    if not shutil.which("gcc") and not shutil.which("g++"):
        pytest.skip("torch.compile needs a C++ compiler on a CPU")
    info = server.client.object_info()["TorchCompileModel"]["input"]["required"]
    backend = {"backend": "inductor"} if "backend" in info else {}
    graph = through(server, fresh_seed, "TorchCompileModel", model="MODEL", **backend)
    compiled = server.client.run(graph, timeout=400)
    difference = np.abs(
        server.pixels(compiled["images"][0]).astype(int) - plain(server, fresh_seed)
    )
    assert difference.mean() < 2


@pytest.mark.parametrize(
    "free", [{"unload_models": True}, {"unload_models": True, "free_memory": True}]
)
def test_free_and_reload(server, fresh_seed: int, free: dict):
    before = plain(server, fresh_seed)
    request = urllib.request.Request(
        f"{server.host.url}/free", json.dumps(free).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=10) as reply:
        assert reply.status == 200
    graph = server.graph(ArkSampler4Step={"seed": fresh_seed, "steps": 2}, **SMALL)
    graph[server.node_of(graph, "SaveImage")]["inputs"]["filename_prefix"] = "again"
    graph[server.node_of(graph, "ArkSageCombustion")]["inputs"]["attention"] = "none"
    np.testing.assert_array_equal(server.render(graph), before)


@pytest.fixture
def mapped(server) -> Path:
    """The embedded transformer in a file too large to be read at once: a tensor that nobody needs, as a hole in the file."""
    raw, hole = KLEIN.read_bytes(), 80 << 20
    (size,) = struct.unpack("<Q", raw[:8])
    header, data = json.loads(raw[8 : 8 + size]), raw[8 + size :]
    header["not_needed"] = {
        "dtype": "BF16", "shape": [hole // 2], "data_offsets": [len(data), len(data) + hole]
    }  # fmt: skip
    text = json.dumps(header).encode()
    path = server.host.base / "models" / "diffusion_models" / "mapped.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text + data)
        file.truncate(8 + len(text) + len(data) + hole)
    return path


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 100)


def grow(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"more")


def replace(path: Path) -> None:
    other = path.with_suffix(".new")
    other.write_bytes(b"<html>")
    os.replace(other, path)


@pytest.mark.parametrize("change", [truncate, grow, replace])
def test_file_that_changes_while_mapped(server, fresh_seed: int, mapped: Path, change):
    def render(seed: int):
        return server.render(
            server.graph(
                ArkFastLoader={"diffusion_model": mapped.name},
                ArkSampler4Step={"seed": seed, "steps": 2},
                **SMALL,
            )
        )

    whole = mapped.with_suffix(".whole")
    shutil.copy(mapped, whole)
    before = render(fresh_seed)
    np.testing.assert_array_equal(before, plain(server, fresh_seed))
    change(mapped)
    with pytest.raises(NodeError, match="mapped.safetensors is not a whole safetensors file"):
        render(fresh_seed + 100_000)
    assert server.host.alive(), server.host.log_tail()
    os.replace(whole, mapped)
    np.testing.assert_array_equal(render(fresh_seed), before)
    mapped.unlink()
