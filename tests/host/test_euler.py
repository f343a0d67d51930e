"""Ark's Euler steps give the host's numbers bit for bit, and leave what they do not know to the host."""

import json

import pytest

pytestmark = pytest.mark.host


@pytest.fixture(scope="module")
def found(comfyui, run_in_host, tmp_path_factory) -> dict:
    out = tmp_path_factory.mktemp("euler") / "found.json"
    run_in_host(comfyui, "euler_run.py", out)
    return json.loads(out.read_text())


def test_one_conditioning_of_the_whole_picture_goes_the_short_way(found):
    assert len(found["short"]) == 11
    assert {name: result for name, result in found["short"].items() if result != [True, True]} == {}


def test_everything_else_goes_the_hosts_way(found):
    masked = found["hosts"].pop("mask")
    assert len(found["hosts"]) == 13 and masked == [True] and found["double"]
    assert {name: result for name, result in found["hosts"].items() if result != [True, False]} == {}  # fmt: skip
