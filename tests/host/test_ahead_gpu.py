"""On a GPU: what is begun before it is asked for gives the same, and is begun as soon as it is recorded."""

import json

import pytest

pytestmark = [pytest.mark.host, pytest.mark.gpu]


@pytest.fixture(scope="module")
def found(comfyui, run_in_host, tmp_path_factory) -> dict:
    out = tmp_path_factory.mktemp("ahead") / "found.json"
    run_in_host(comfyui, "ahead_gpu_run.py", out)
    found = json.loads(out.read_text())
    if found["why_not"]:
        pytest.skip(f"nothing is recorded ({found['why_not']})")
    return found


def test_texts(found):
    assert found["text_recorded"] == 1
    assert all(same for _, _, same in found["texts"])
    # the first prompt loads, the second records
    assert [[known, source] for known, source, _ in found["texts"]] == [[False, "encoder"]] * 2 + [[True, "memory"]] * 3  # fmt: skip


def test_steps(found):
    assert found["reasons"] == [] and found["recorded"] == 1
    assert all(found["same"]) and found["near"] < 0.01
    assert not found["ready"][0] and all(found["ready"][3:])
    assert found["begun"] == {"begun": 3, "both": 3}


def test_pictures(found):
    assert all(same for _, _, same in found["pictures"])
    assert [counts for *counts, _ in found["pictures"]][-3:] == [[1, 1]] * 3
