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


@pytest.fixture(scope="module")
def canvas(comfyui: Path, chromium: str, tmp_path_factory: pytest.TempPathFactory) -> dict:
    """What the browser saw, and what the server says of the same workflow."""
    folder = Path(os.environ.get("ARK_ARTIFACTS") or tmp_path_factory.mktemp("canvas"))
    folder.mkdir(parents=True, exist_ok=True)
    screenshot = folder / f"canvas-{comfyui.name}.png"
    with Host.start(comfyui) as host:
        done = subprocess.run(
            ["node", str(SCRIPT), host.url, str(WORKFLOW), chromium, str(screenshot)],
            capture_output=True,
            text=True,
            encoding="utf-8",
            timeout=300,
        )
        assert done.returncode == 0, f"{done.stderr}\n{host.log_tail()}"
        api = to_api(
            json.loads(WORKFLOW.read_text(encoding="utf-8")), Client(host.url).object_info()
        )
    return {**json.loads(done.stdout.splitlines()[-1]), "api": api, "screenshot": screenshot}


def test_opens_without_missing_nodes(canvas: dict):
    workflow = json.loads(WORKFLOW.read_text(encoding="utf-8"))
    assert sorted(canvas["nodes"]) == sorted(node["type"] for node in workflow["nodes"])
    assert canvas["missing"] == []
    assert canvas["links"] == len(workflow["links"])
    assert "issing" not in canvas["dialog"]


def test_canvas_queues_what_to_api_makes(canvas: dict):
    def bare(graph: dict) -> dict:
        return {
            number: {key: node[key] for key in ("class_type", "inputs")}
            for number, node in graph.items()
        }

    assert bare(canvas["api"]) == bare(canvas["prompt"])


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
