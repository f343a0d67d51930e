"""The VAE's engine gives what the host's modules give, and leaves to the host what it does not know."""

from __future__ import annotations

import json

import pytest

pytestmark = pytest.mark.host
LIMIT = 1e-5


@pytest.fixture(scope="module")
def found(comfyui, run_in_host, tmp_path_factory) -> dict:
    """What one host saw."""
    out = tmp_path_factory.mktemp("out") / "found.json"
    run_in_host(comfyui, "vae_run.py", out)
    return json.loads(out.read_text())


def test_the_same_pictures_and_latents_in_fp32(found):
    errors = found["errors"]
    assert all(error < LIMIT for error in errors.values()), errors
    nodes = {"VAEEncode", "VAEEncodeTiled", "VAEEncodeForInpaint", "VAEDecode", "VAEDecodeTiled"}
    memory = {"one by one", "in bands", "in the host's tiles", "after an unload"}
    assert nodes | memory | {"references", "afterwards"} <= errors.keys() and len(errors) == 21
    assert found["forgotten"]


def test_bf16_is_no_further_off_than_the_host_in_bf16(found):
    for engine, host in found["bf16"].values():
        assert 0 < engine <= 1.1 * host


def test_on_a_cpu_the_host_runs_and_a_reason_is_kept(found):
    assert found["host_ran"] and found["reasons"] == ["it is float32 on cpu"]


def test_what_others_have_changed_is_the_hosts(found):
    for name, (reasons, error) in found["refused"].items():
        assert reasons == ["another node has changed the VAE"], name
        assert (error > 100 * LIMIT) if name == "hook" else (error == 0), name
    assert found["detached"] == [True, []]


def test_a_picture_of_other_colours_gets_the_hosts_error(found):
    for mine, theirs in found["colours"]:
        assert mine == theirs and "channels" in theirs


def test_memory_that_is_short_is_enough(found):
    ample, scarce, none, enormous = found["plans"]
    assert ample == [[4, False], [1, False], [1, True]]
    assert scarce == [[2, False], [1, False], [1, True]]
    assert none == enormous == [[1, True]]  # numbers of a tensor have to be counted, too


def test_what_a_sampler_made_is_decoded_before_it_is_asked_for(found):
    assert max(error for error, _, _ in found["ahead"]) < LIMIT
    counts = [counts for _, *counts in found["ahead"]]
    first, again, not_recorded, hooked_meanwhile = [0, 1], [1, 1], [0, 1], [1, 1]
    changed_meanwhile, after_a_miss, another_vae = [1, 2], [0, 1], [0, 0]
    assert counts == [first, again, not_recorded, hooked_meanwhile, changed_meanwhile, after_a_miss, another_vae]  # fmt: skip


@pytest.mark.gpu
def test_on_a_gpu_it_is_no_further_off_than_the_host(comfyui, run_in_host, tmp_path):
    out = tmp_path / "found.json"
    run_in_host(comfyui, "vae_gpu_run.py", out)
    found = json.loads(out.read_text())
    assert found["dtype"] == "torch.bfloat16" and found["reasons"] == []
    assert len(found["errors"]) == 27
    for name, (engine, host) in found["errors"].items():
        assert 0 < engine <= 1.2 * host, name
    assert found["why_not"] or found["recorded"] == 4  # of six shapes
    assert not found["pinned"] and found["forgotten"] == [True, 0]
    assert 0 < found["tiled"] < 0.5
