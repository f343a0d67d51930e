"""ArkDoctor looks at the machine from inside a real ComfyUI."""

from __future__ import annotations

import re

import pytest

from ark.toolkit.doctor import host_version

pytestmark = pytest.mark.host


def test_the_report_of_a_server(server, comfyui):
    graph = {"doctor": {"class_type": "ArkDoctor", "inputs": {"measure": True}}}
    result = server.client.run(graph, timeout=300)
    (text,) = result["history"]["outputs"]["doctor"]["text"]
    lines = {line.split()[1]: line for line in text.splitlines() if re.match("(OK|NOTE|BAD) ", line)}  # fmt: skip
    assert lines["ComfyUI"].split() == ["OK", "ComfyUI", host_version(comfyui)]
    assert lines["torch"].startswith("OK")
    assert "ark_tiny" in lines["disk"] and "GB/s" in text
    plan = text[text.index("What Ark would do here") :]
    for what in ("loader", "attention", "engine", "precision", "compile"):
        assert re.search(rf"^{what} +\w", plan, re.MULTILINE), plan
    assert "could not be" not in text
