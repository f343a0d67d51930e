"""The text encoder's layers as one function give what the host's own give."""

from __future__ import annotations

import json

import pytest

pytestmark = pytest.mark.host
LIMIT = 1e-5


@pytest.fixture(scope="module")
def found(comfyui, run_in_host, tmp_path_factory) -> dict:
    """What one host saw."""
    out = tmp_path_factory.mktemp("out") / "found.json"
    run_in_host(comfyui, "text_run.py", out)
    return json.loads(out.read_text())


def test_the_same_conditioning_in_fp32(found):
    assert found["host_ran"] and found["engine_ran"]
    assert len(found["errors"]) == 5 and max(found["errors"].values()) < LIMIT
    assert found["lora_matters"] > 100 * LIMIT
    for name in ("plain", "empty", "long"):
        engine, host = found[f"{name}_shape"]
        assert engine == host


def test_bf16_is_as_far_off_as_bf16_is(found):
    assert 0 < found["bf16_error"] < 0.02
