"""After a run no global of the host or of torch has changed, and no model file."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from ark.bootstrap import ROOT, Client, Host, clean_environment, host_overlay, host_requirements

pytestmark = pytest.mark.host

SCRIPT = Path(__file__).with_name("run_and_compare.py")


def test_a_run_leaves_every_global_as_it_was(comfyui: Path, tmp_path: Path):
    python = Path(sys.executable)
    overlay = host_overlay(python.parent.parent, host_requirements(comfyui)[1])
    done = subprocess.run(
        [str(python), str(SCRIPT), str(comfyui), str(ROOT)],
        cwd=comfyui,
        env=clean_environment(PYTHONPATH=str(overlay), HF_HUB_OFFLINE="1"),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert "unchanged" in done.stdout


def test_an_unwritable_cache_folder_costs_the_embedded_model_only(comfyui, tmp_path, monkeypatch):
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    monkeypatch.setenv("ARK_CACHE_DIR", str(blocked / "cache"))
    with Host.start(comfyui) as host:
        assert "ArkFastLoader" in Client(host.url).object_info()
        assert "Set ARK_CACHE_DIR" in host.log_tail(300)
