"""The button on Ark Doctor copies what the node found."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from ark.bootstrap import Host

pytestmark = [pytest.mark.host, pytest.mark.browser]


def test_the_button_copies_the_report(
    furnished: Host, chromium: str, screenshots: Path, walk: Callable, errors_of_ark: Callable
):
    seen = walk("copy_report.mjs", furnished, furnished.url, chromium, screenshots / "doctor.png")
    assert seen["before"] == "Queue it first"
    assert seen["report"].startswith("Ark doctor: date ")
    assert seen["after"] == seen["without"] == "Copied"
    assert seen["clipboard"] == seen["report"]
    # the button is no input: the graph holds the one widget's value
    assert [value for value in seen["saved"] if value is not None] == [False]
    assert [node["inputs"] for node in seen["prompt"].values()] == [{"measure": False}]
    assert errors_of_ark(seen) == []
