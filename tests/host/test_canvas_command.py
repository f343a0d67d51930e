"""`python bootstrap.py canvas` opens a ComfyUI that keeps what is made in it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from ark.bootstrap import ROOT, WORKFLOW, Client, to_api

pytestmark = pytest.mark.host

MADE_BY_US = (Path(sys.prefix) / "ark-env.json").exists()


@pytest.mark.skipif(not MADE_BY_US, reason="needs the environment that bootstrap.py makes")
def test_an_image_made_on_the_canvas_is_kept(comfyui):
    command = [sys.executable, ROOT / "bootstrap.py", "canvas", "--comfyui", comfyui, "--venv", sys.prefix]  # fmt: skip
    with subprocess.Popen(
        [str(part) for part in command], stdout=subprocess.PIPE, text=True
    ) as server:
        try:
            client = Client(server.stdout.readline().removeprefix("canvas: ").strip())
            images = Path(server.stdout.readline().removeprefix("images: ").strip())
            before = set(images.glob("*.png"))
            workflow = json.loads(WORKFLOW.read_text(encoding="utf-8"))
            result = client.run(to_api(workflow, client.object_info()))
            image = client.object_info()["LoadImage"]["input"]["required"]["image"]
        finally:
            server.terminate()
    assert result["status"] == "success"
    assert "example.png" in json.dumps(image)  # which the templates that edit start from
    (made,) = set(images.glob("*.png")) - before
    assert made.read_bytes() == result["images"][0]
    made.unlink()
