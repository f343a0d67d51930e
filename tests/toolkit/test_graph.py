"""Recordings hold under both of torch's allocators: ComfyUI's default is not torch's."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ark.toolkit.fused.graph import SHAPES


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["native", "cudaMallocAsync"])
def test_what_is_recorded_gives_what_runs(backend):
    env = {**os.environ, "PYTORCH_CUDA_ALLOC_CONF": f"backend:{backend}"}
    command = [sys.executable, str(Path(__file__).with_name("graph_run.py"))]
    run = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-3000:]
    found = json.loads(run.stdout.splitlines()[-1])
    assert found["backend"] == backend and found["why_not"] == []
    assert found["recorded"] == [SHAPES, SHAPES]
    assert found["worst"] < 1e-3
    assert found["failure"] == "it stops" and all(found["after_failure"])
    assert "uncaptured free" not in run.stderr
