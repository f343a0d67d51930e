"""From a fresh clone to the first image on the canvas, in minutes and clicks: `python benchmarks/newcomer.py`.

clone: this repository, from the disk. first_command: the README's `bootstrap.py demo`, which makes the environment, with an
empty package cache and an empty cache folder. canvas: `bootstrap.py canvas`, until it names its address. image: Chromium opens
that, clicks Templates, ark, ark_text_to_image and Run, and sees the picture (`tests/browser/templates.mjs`).

Needs git, Chromium, Node.js and playwright-core (NODE_PATH), 3 GB of disk and a package registry; runs in a temporary folder.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from ark.benchmarks.record import row, write_record

ROOT = Path(__file__).resolve().parent.parent
PROMPT = "a small red circle to the left of a large blue star on a white background"  # the README's


def timed(command: list[str | Path], **options: object) -> tuple[float, str]:
    """Run a command: its seconds and what it printed."""
    start = time.monotonic()
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, **options)
    return time.monotonic() - start, done.stdout


def walk(clone: Path, environment: dict[str, str], screenshots: Path) -> tuple[float, dict]:
    """Start the canvas and make an image on it: seconds until the canvas answers, and what the browser saw."""
    start = time.monotonic()
    command = [sys.executable, "bootstrap.py", "canvas"]
    server = subprocess.Popen(command, cwd=clone, env=environment, stdout=subprocess.PIPE, text=True)  # fmt: skip
    try:
        url = server.stdout.readline().removeprefix("canvas: ").strip()
        seconds = time.monotonic() - start
        chromium = shutil.which("chromium") or shutil.which("google-chrome")
        script = clone / "tests" / "browser" / "templates.mjs"
        _, seen = timed(["node", script, url, chromium, screenshots, "ark_text_to_image"])
        return seconds, json.loads(seen.splitlines()[-1])
    finally:
        server.terminate()
        server.wait(30)


def main() -> None:
    """Take the path once, print it and record it."""
    with tempfile.TemporaryDirectory(prefix="ark-newcomer-") as scratch:
        folder = Path(scratch)
        clone = folder / "ark"
        environment = {**os.environ, "ARK_CACHE_DIR": str(folder / "cache"), "PIP_NO_CACHE_DIR": "1"}  # fmt: skip
        environment.pop("COMFYUI_PATH", None)
        spent = {"clone": timed(["git", "clone", "-q", ROOT, clone])[0]}
        demo = [sys.executable, "bootstrap.py", "demo", "--prompt", PROMPT]
        spent["first_command"] = timed(demo, cwd=clone, env=environment)[0]
        spent["canvas"], seen = walk(clone, environment, folder)
        spent["image"] = seen["first"]["seconds"]
        assert seen["image"].get("colours", 0) > 10, seen["image"]
    minutes, clicks = sum(spent.values()) / 60, seen["first"]["clicks"]
    for name, seconds in spent.items():
        print(f"{name:<14}{seconds:8.1f} s")
    print(f"all of it {minutes:.1f} minutes, {clicks} clicks")
    rows = [row(name, seconds, "s", 1) for name, seconds in spent.items()]
    rows.append(row("all", minutes, "min", 1, note=f"{clicks} clicks"))
    device = f"no GPU, {os.cpu_count()} CPU cores"
    print(write_record("newcomer", device, {"python": platform.python_version()}, rows))


if __name__ == "__main__":
    main()
