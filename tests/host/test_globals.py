"""After a run no global of the host or of torch has changed, and no model file."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from ark.bootstrap import ROOT, clean_environment, host_overlay, host_requirements

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
