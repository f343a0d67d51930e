"""Ark's templates in ComfyUI's own template browser: listed with their thumbnails, opened by a click, the first one run."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from ark.bootstrap import WORKFLOW, Host

pytestmark = [pytest.mark.host, pytest.mark.browser]

FILES = sorted(WORKFLOW.parent.glob("*.json"), key=lambda path: path != WORKFLOW)  # that one first


@pytest.fixture(scope="module")
def browsed(furnished: Host, chromium: str, screenshots: Path, walk: Callable) -> dict:
    """What somebody saw who clicked through the templates."""
    names = [path.stem for path in FILES]
    return walk("templates.mjs", furnished, furnished.url, chromium, screenshots, *names)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_template_is_listed_with_its_thumbnail_and_opens(browsed: dict, path: Path):
    assert browsed["listed"][path.stem] > 0  # px
    nodes = json.loads(path.read_text(encoding="utf-8"))["nodes"]
    opened = browsed["opened"][path.stem]
    assert sorted(opened["nodes"]) == sorted(node["type"] for node in nodes)
    assert opened["missing"] == 0


def test_the_first_image_takes_few_clicks(browsed: dict):
    assert browsed["image"].get("width") == browsed["image"].get("height") == 256, browsed["image"]
    assert browsed["image"]["colours"] > 10, "the image is blank"
    assert browsed["first"]["clicks"] == 4  # Templates, ark, the template, Run: as the README says


def test_no_error_of_ark_in_the_console(browsed: dict, errors_of_ark: Callable):
    assert errors_of_ark(browsed) == []
