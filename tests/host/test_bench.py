"""`python bootstrap.py bench` measures and writes one result that others can compare."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

from ark.bootstrap import ROOT

pytestmark = pytest.mark.host


def bench(comfyui, *arguments) -> subprocess.CompletedProcess:
    """Run it in this environment."""
    command = [sys.executable, ROOT / "bootstrap.py", "bench", "--comfyui", comfyui, "--venv", sys.prefix, *arguments]  # fmt: skip
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=600)  # fmt: skip


def test_a_result_and_its_table(comfyui, tmp_path):
    result, other = tmp_path / "mine.json", tmp_path / "other.json"
    record = {"gpu": "NVIDIA Other", "date": "2026-01-01", "versions": {"torch": "2.9"}, "rows": [{"case": "load_warm", "ark": 42.0}]}  # fmt: skip
    other.write_text(json.dumps(record))
    done = bench(comfyui, "--tiny", "--quick", "--out", result, "--against", other)
    assert done.returncode == 0, done.stdout + done.stderr
    record = json.loads(result.read_text())
    assert record["tiny"] and record["left_out"] == {}
    assert {"ark", "torch", "comfyui", "python"} <= record["versions"].keys()
    assert [row["case"] for row in record["rows"]] == ["load_warm", "attention_64", "t2i_128_bf16"]
    for row in record["rows"]:
        assert row["ark"] >= 0 and row["peers"] and row["n"] > 0 and row["unit"] in ("s", "ms")
    assert "NVIDIA Other" in done.stdout and "42.000" in done.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_without_a_gpu_it_says_so(comfyui, tmp_path):
    done = bench(comfyui, "--out", tmp_path / "no.json")
    assert done.returncode == 1 and "no NVIDIA GPU" in done.stderr and "--tiny" in done.stderr
    assert not (tmp_path / "no.json").exists()
