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
    names = {
        "plain",
        "empty",
        "long",
        "sections",
        "weights",
        "lora",
        "lora_removed",
        "hook_removed",
    }
    assert found["errors"].keys() == names
    assert all(error < LIMIT for error in found["errors"].values()), found["errors"]
    assert found["lora_matters"] > 100 * LIMIT
    engine_finite, host_finite = found["weights_finite"]
    assert engine_finite and found["sections_finite"][0]
    assert found["weights_matter"] > 100 * LIMIT or not host_finite
    assert found["sections_masks_equal"] and found["weights_masks_equal"]
    for name in ("plain", "empty", "long"):
        engine, host = found[f"{name}_shape"]
        assert engine == host


def test_where_it_does_not_fit_the_host_runs_and_a_reason_is_kept(found):
    assert found["reasons"] == ["its weights are on cpu"]
    assert found["hook_matters"] > 100 * LIMIT
    assert "somebody has hooks on the text encoder" in found["all_reasons"]


def test_tokens_are_read_as_the_host_reads_them(found):
    assert found["embedded"] == [True] * 10


def test_bf16_is_no_further_off_than_the_host_in_bf16(found):
    assert found["bf16_layers"] == 27 and len(found["bf16"]) == 3
    for engine, host in found["bf16"]:
        assert 0 < engine <= 1.1 * host
