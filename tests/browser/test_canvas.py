"""The bundled workflow in a real browser: opens without missing nodes, runs, and shows its image."""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path

import pytest

from ark.bootstrap import WORKFLOW, Client, Host, to_api

pytestmark = [pytest.mark.host, pytest.mark.browser]

SCRIPT = Path(__file__).with_name("open_workflow.mjs")
OTHERS = sorted(set(WORKFLOW.parent.glob("*.json")) - {WORKFLOW})


@pytest.fixture(scope="module")
def canvas(comfyui: Path, chromium: str, tmp_path_factory: pytest.TempPathFactory) -> dict:
    """What the browser saw, and what the server says of the same workflow."""
    folder = Path(os.environ.get("ARK_ARTIFACTS") or tmp_path_factory.mktemp("canvas"))
    folder.mkdir(parents=True, exist_ok=True)
    screenshot = folder / f"canvas-{comfyui.name}.png"
    with Host.start(comfyui) as host:
        # the files that workflows name are there to be chosen, and need not be more than that
        for name in ("input/example.png", "models/loras/ark_tiny_lora.safetensors"):
            (host.base / name).parent.mkdir(parents=True, exist_ok=True)
            (host.base / name).touch()
        done = subprocess.run(
            ["node", SCRIPT, host.url, WORKFLOW, chromium, screenshot, *OTHERS],
            capture_output=True,
            text=True,
            encoding="utf-8",
            timeout=300,
        )
        assert done.returncode == 0, f"{done.stderr}\n{host.log_tail()}"
        info = Client(host.url).object_info()
        api = {path.stem: to_api(read(path), info) for path in [WORKFLOW, *OTHERS]}
    seen = json.loads(done.stdout.splitlines()[-1])
    opened = {WORKFLOW.stem: seen} | {
        Path(file).stem: what for file, what in seen["others"].items()
    }
    return {**seen, "opened": opened, "api": api, "screenshot": screenshot}


def read(path: Path) -> dict:
    """A workflow's file."""
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("path", [WORKFLOW, *OTHERS], ids=lambda path: path.stem)
def test_opens_without_missing_nodes(canvas: dict, path: Path):
    workflow, opened = read(path), canvas["opened"][path.stem]
    assert sorted(opened["nodes"]) == sorted(node["type"] for node in workflow["nodes"])
    assert opened["missing"] == []
    assert opened["links"] == len(workflow["links"])
    assert "issing" not in opened["dialog"]


@pytest.mark.parametrize("path", [WORKFLOW, *OTHERS], ids=lambda path: path.stem)
def test_canvas_queues_what_to_api_makes(canvas: dict, path: Path):
    def bare(graph: dict) -> dict:
        return {
            number: {key: node[key] for key in ("class_type", "inputs")}
            for number, node in graph.items()
        }

    assert bare(canvas["api"][path.stem]) == bare(canvas["opened"][path.stem]["prompt"])


def test_runs_and_shows_the_image(canvas: dict):
    assert canvas["run"]["kind"] == "execution_success", canvas["run"]
    assert [4, 4] in canvas["run"]["progress"]
    assert canvas["image"].get("width") == canvas["image"].get("height") == 256, canvas["image"]
    assert canvas["image"]["colours"] > 10, "the image is blank"
    assert canvas["screenshot"].stat().st_size > 10_000


def test_no_error_of_ark_in_the_console(canvas: dict):
    def of_ark(text: str) -> bool:
        # the canvas asks its registry who wrote each node, which a server without API nodes forbids it
        return "ark" in re.sub(r"dark|mark", "", text.lower()) and "api.comfy.org" not in text

    own = [text for text in canvas["errors"] + canvas["failedRequests"] if of_ark(text)]
    assert own == []
