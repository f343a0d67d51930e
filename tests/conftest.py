"""Markers: what a test needs beyond Python, and the reason that a skip prints.

- `gpu`: an NVIDIA GPU that torch can use.
- `host`: a ComfyUI. `python bootstrap.py test` sets ARK_COMFYUI (one folder) and ARK_HOSTS (all of them). A test that
  takes the fixture `comfyui` runs once for each.
- `browser`: Chromium, Node.js and the npm package playwright-core, found through NODE_PATH.
"""

import functools
import importlib.util
import os
import shutil
import subprocess
from pathlib import Path

import pytest

CHROMIUMS = ("chromium", "chromium-browser", "google-chrome", "chrome")


def hosts() -> list[Path]:
    """The ComfyUI folders to test with."""
    listed = os.environ.get("ARK_HOSTS") or os.environ.get("ARK_COMFYUI") or ""
    return [Path(folder) for folder in listed.split(os.pathsep) if folder]


@functools.cache
def missing_gpu() -> str | None:
    if importlib.util.find_spec("torch") is None:
        return "torch is not installed"
    import torch

    return None if torch.cuda.is_available() else "no NVIDIA GPU that torch can use"


@functools.cache
def missing_host() -> str | None:
    if not hosts():
        return "no ComfyUI: run `python bootstrap.py test`, or set ARK_HOSTS"
    absent = [str(folder) for folder in hosts() if not (folder / "main.py").is_file()]
    return f"no ComfyUI in {', '.join(absent)}" if absent else None


@functools.cache
def missing_browser() -> str | None:
    if not any(map(shutil.which, CHROMIUMS)):
        return "no Chromium is installed"
    if not shutil.which("node"):
        return "Node.js is not installed"
    found = subprocess.run(
        ["node", "-e", "require.resolve('playwright-core')"], capture_output=True
    )
    return "the npm package playwright-core is not on NODE_PATH" if found.returncode else None


MISSING = {"gpu": missing_gpu, "host": missing_host, "browser": missing_browser}


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what this machine cannot run, and say why."""
    for marker, missing in MISSING.items():
        reason = missing() if item.get_closest_marker(marker) else None
        if reason:
            pytest.skip(reason)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run a test that takes `comfyui` once for each host, named by its folder."""
    if "comfyui" in metafunc.fixturenames:
        folders = hosts() or [Path("none")]
        metafunc.parametrize("comfyui", folders, ids=lambda folder: folder.name, scope="session")


@pytest.fixture(scope="session")
def chromium() -> str:
    """The path of the browser."""
    return next(filter(None, map(shutil.which, CHROMIUMS)))
