"""What NVIDIA's driver says of itself; importing this needs nothing but Python."""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import dataclass

from .finding import numbers


@dataclass(frozen=True)
class Driver:
    """What NVIDIA's driver says.

    Attributes:
        problem: why it says nothing.
        broken: whether it should say something.
        version: its own.
        cuda: the newest CUDA that it runs, (0,) where it does not say.
        cards: their names.
    """

    problem: str | None = None
    broken: bool = False
    version: str = ""
    cuda: tuple[int, ...] = (0,)
    cards: tuple[str, ...] = ()


def ask_driver() -> Driver:
    """Call nvidia-smi."""
    command = shutil.which("nvidia-smi")
    if command is None:
        return Driver("nvidia-smi is not there: no NVIDIA driver is installed")

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([command, *arguments], capture_output=True, text=True, timeout=20)

    try:
        done = run("--query-gpu=driver_version,name", "--format=csv,noheader")
        said = (done.stdout + done.stderr).strip() or f"code {done.returncode}"
        if done.returncode:
            none = "no devices" in said.lower()
            return Driver(f"nvidia-smi: {said.splitlines()[0]}", broken=not none)
        cards = [line.partition(", ") for line in done.stdout.strip().splitlines()]
        if not cards:
            return Driver("nvidia-smi names no card")
        cuda = re.search(r"CUDA Version: *([\d.]+)", run().stdout)
    except (OSError, subprocess.TimeoutExpired) as error:
        return Driver(f"nvidia-smi failed ({error})", broken=True)
    known = numbers(cuda[1]) if cuda else (0,)
    return Driver(None, False, cards[0][0], known, tuple(name for _, _, name in cards))
