"""A real server for each ComfyUI, started once and shared by every test on that host."""

from __future__ import annotations

import copy
import io
import itertools
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from ark.bootstrap import (
    ROOT,
    WORKFLOW,
    Client,
    Host,
    clean_environment,
    host_overlay,
    host_requirements,
    to_api,
)


@dataclass
class Server:
    """A running host, its client, and the bundled workflow as this host takes it."""

    host: Host
    client: Client
    workflow: dict
    api_graph: dict

    def graph(self, **inputs: dict) -> dict:
        """The bundled workflow in API form with some inputs changed, `NodeClass={input: value}`."""
        graph = copy.deepcopy(self.api_graph)
        for node in graph.values():
            node["inputs"].update(inputs.get(node["class_type"], {}))
        return graph

    def render(self, graph: dict):
        """Run a graph that saves one image: its pixels, [H, W, 3] uint8."""
        (image,) = self.client.run(graph, timeout=120)["images"]
        return self.pixels(image)

    @staticmethod
    def pixels(png: bytes):
        """A PNG as an array [H, W, 3] uint8."""
        import numpy as np
        from PIL import Image

        return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))

    @staticmethod
    def node_of(graph: dict, class_type: str) -> str:
        """The id of the only node of a class in an API graph."""
        (found,) = (number for number, node in graph.items() if node["class_type"] == class_type)
        return found

    @property
    def on_cpu(self) -> bool:
        """Whether this server has no accelerator."""
        return self.client.get("/system_stats")["devices"][0]["type"] == "cpu"


@pytest.fixture(scope="session")
def server(comfyui: Path) -> Iterator[Server]:
    """A server of this host; it lives until the last test that wants this host has run."""
    with Host.start(comfyui) as host:
        client = Client(host.url)
        workflow = json.loads(WORKFLOW.read_text(encoding="utf-8"))
        yield Server(host, client, workflow, to_api(workflow, client.object_info()))


@pytest.fixture(scope="session")
def run_in_host(tmp_path_factory) -> Callable[..., str]:
    """Run one of the scripts beside this file as a program of a host, without its server.

    `run_in_host(comfyui, script, *arguments, **environ)` calls `script HOST PACK_PARENT *arguments`, where the pack is
    importable as `ark` from PACK_PARENT, with these environment variables, and returns what it printed. Embeddings of an
    earlier run are not used, unless ARK_EMBEDDINGS_GB is among them.
    """
    parent = tmp_path_factory.mktemp("pack")
    (parent / "ark").symlink_to(ROOT, target_is_directory=True)

    def run(comfyui: Path, script: str, *arguments: Path | str, **environ: str) -> str:
        overlay = host_overlay(Path(sys.prefix), host_requirements(comfyui)[1])
        command = [sys.executable, Path(__file__).with_name(script), comfyui, parent, *arguments]
        usual = {"HF_HUB_OFFLINE": "1", "ARK_EMBEDDINGS_GB": "0"}
        environment = clean_environment(**{"PYTHONPATH": str(overlay), **usual, **environ})
        ran = subprocess.run(
            [str(part) for part in command], cwd=comfyui, env=environment, capture_output=True, text=True, timeout=300
        )  # fmt: skip
        assert ran.returncode == 0, ran.stdout[-2000:] + ran.stderr[-4000:]
        return ran.stdout

    return run


_seeds = itertools.count(1000)


@pytest.fixture
def fresh_seed() -> int:
    """A seed that no earlier prompt had, so that the server's cache cannot answer."""
    return next(_seeds)
