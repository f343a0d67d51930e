"""The button on Ark Doctor copies what the node found."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from ark.bootstrap import Host

pytestmark = [pytest.mark.host, pytest.mark.browser]

SCRIPT = Path(__file__).with_name("copy_report.mjs")


def test_the_button_copies_the_report(comfyui: Path, chromium: str, tmp_path: Path):
    folder = Path(os.environ.get("ARK_SCREENSHOTS") or tmp_path)
    folder.mkdir(parents=True, exist_ok=True)
    with Host.start(comfyui) as host:
        command = ["node", SCRIPT, host.url, chromium, folder / f"doctor-{comfyui.name}.png"]
        done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", timeout=300)  # fmt: skip
        assert done.returncode == 0, f"{done.stderr}\n{host.log_tail()}"
    seen = json.loads(done.stdout.splitlines()[-1])
    assert seen["before"] == "Queue it first"
    assert seen["report"].startswith("Ark doctor: date ")
    assert seen["after"] == seen["without"] == "Copied"
    assert seen["clipboard"] == seen["report"]
    # the button is no input: the graph holds the one widget's value
    assert [value for value in seen["saved"] if value is not None] == [False]
    assert [node["inputs"] for node in seen["prompt"].values()] == [{"measure": False}]
    assert seen["errors"] == []
