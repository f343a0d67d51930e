"""The bundled workflow in a real browser: opens without missing nodes, runs, and shows its image."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from ark.bootstrap import WORKFLOW, Client, Host, to_api

pytestmark = [pytest.mark.host, pytest.mark.browser]

OTHERS = sorted(set(WORKFLOW.parent.glob("*.json")) - {WORKFLOW})


@pytest.fixture(scope="module")
def canvas(furnished: Host, chromium: str, screenshots: Path, walk: Callable) -> dict:
    """What the browser saw, and what the server says of the same workflow."""
    screenshot = screenshots / "canvas.png"
    seen = walk("open_workflow.mjs", furnished, furnished.url, WORKFLOW, chromium, screenshot, *OTHERS)  # fmt: skip
    info = Client(furnished.url).object_info()
    api = {path.stem: to_api(read(path), info) for path in [WORKFLOW, *OTHERS]}
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


@pytest.mark.parametrize("path", [WORKFLOW, *OTHERS], ids=lambda path: path.stem)
def test_runs_and_its_nodes_show_what_they_did(canvas: dict, path: Path):
    run = canvas["opened"][path.stem]["run"]
    assert run["kind"] == "execution_success", run
    assert run["badges"] and [badge for badge in run["badges"] if badge[1] != "yes"] == []
    sampler = next(text for label, _, text in run["badges"] if label.startswith("Ark Sampler"))
    assert "a step" in sampler and "4 steps" in sampler
    assert path != WORKFLOW or "in all, floor" in sampler  # that one is not the server's first run


@pytest.mark.parametrize("path", [WORKFLOW, *OTHERS], ids=lambda path: path.stem)
def test_no_node_covers_another_in_either_design(canvas: dict, path: Path):
    assert canvas["covered"][str(path)] == []


def test_no_error_of_ark_in_the_console(canvas: dict, errors_of_ark: Callable):
    assert errors_of_ark(canvas) == []
