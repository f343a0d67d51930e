"""Klein 9B: everything about it is read from the weights."""

from __future__ import annotations

import json
import sys

import pytest

pytestmark = pytest.mark.host


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs sparse files")
def test_klein_9b_opens_by_its_dimensions_without_taking_memory(comfyui, run_in_host, tmp_path):
    run_in_host(comfyui, "large_run.py", tmp_path / "found.json")
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["gigabytes"] > 33
    assert found["anonymous_gigabytes"] < 0.2
    assert found["transformer"] == [4096, 8, 24] and found["heads"] == 32
    assert found["conditioning"] == 12288
    assert found["text_encoder"] == [4096, 27]
    assert all(count > 200 for count in found["mapped"])
