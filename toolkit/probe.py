"""Tries what may be broken in a process of its own: an import that crashes, or a compiler that hangs, harms nobody.

Importing this needs nothing but Python. What that process does is in `attempts.py`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

CHILD = "ark.toolkit.attempts"
SECONDS = 180.0  # for all of them: torch's import and a compilation may take long on a cold disk


@dataclass(frozen=True)
class Probed:
    """What became of one attempt.

    Attributes:
        problem: why it does not work, None if it does.
        facts: what was found.
    """

    problem: str | None = None
    facts: dict[str, Any] = field(default_factory=dict)


def probe(names: tuple[str, ...], seconds: float = SECONDS) -> dict[str, Probed]:
    """Try packages in a process of its own, which is started again after one that kills it.

    Args:
        names: "torch", "cuda_graph" (recordings under the allocator that the environment asks for), or of `packages.PACKAGES`.
        seconds: until a process counts as hung.

    Returns:
        What became of each.
    """
    found: dict[str, Probed] = {}
    while left := [name for name in names if name not in found]:
        problem = _run(left, seconds, found)
        if left := [name for name in left if name not in found]:
            found[left[0]] = Probed(problem)
    return found


def _run(names: list[str], seconds: float, found: dict[str, Probed]) -> str:
    """Run the child and take down what it says; how it ended, for the one that it did not come to the end of."""
    launch = str(Path(__file__).with_name("launch.py"))
    command = [sys.executable, launch, CHILD, *names]
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    try:
        done = subprocess.run(command, env=variables, stdin=subprocess.DEVNULL, capture_output=True, timeout=seconds)  # fmt: skip
        output, end = done.stdout, f"its process ended with code {done.returncode}"
        if done.returncode < 0:
            end = f"its process was killed by signal {-done.returncode}"
        elif lines := done.stderr.decode(errors="replace").strip().splitlines():
            end = f"{end} ({lines[-1]})"
    except subprocess.TimeoutExpired as error:
        output, end = error.stdout or b"", f"it did not end within {seconds:.0f} seconds"
    for line in output.decode(errors="replace").splitlines():
        if line.startswith("ark-probe "):
            name, problem, facts = json.loads(line.removeprefix("ark-probe "))
            found[name] = Probed(problem, facts)
    return end
