"""One server for each host, with the files that the workflows name, and a browser that walks over its canvas."""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ark.bootstrap import Host


@pytest.fixture(scope="session")
def furnished(comfyui: Path) -> Iterator[Host]:
    """A server with a picture in its input folder and a LoRA for the embedded model."""
    import torch
    from PIL import Image, ImageDraw
    from safetensors.torch import save_file

    # a browser wants the processor as well: threads that wait for others must not spin
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    with Host.start(comfyui) as host:
        picture = Image.new("RGB", (128, 128), "white")
        ImageDraw.Draw(picture).ellipse((30, 30, 100, 100), fill=(220, 30, 35))
        picture.save(host.base / "input" / "example.png")
        loras = host.base / "models" / "loras"
        loras.mkdir(parents=True, exist_ok=True)
        name = "diffusion_model.double_blocks.0.img_attn.qkv"
        low = {f"{name}.lora_A.weight": torch.zeros(4, 256), f"{name}.lora_B.weight": torch.zeros(768, 4)}  # fmt: skip
        save_file(low, loras / "ark_tiny_lora.safetensors")
        yield host


@pytest.fixture(scope="session")
def screenshots(comfyui: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder for this host's pictures; ARK_SCREENSHOTS names one that lasts."""
    named = os.environ.get("ARK_SCREENSHOTS")
    folder = (Path(named) if named else tmp_path_factory.mktemp("canvas")) / comfyui.name
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def walk() -> Callable[..., dict]:
    """Run one of the scripts beside this file; what it saw."""

    def run(script: str, host: Host, *arguments: Path | str) -> dict:
        command = ["node", Path(__file__).with_name(script), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", timeout=900)  # fmt: skip
        assert done.returncode == 0, f"{done.stderr}\n{host.log_tail()}"
        return json.loads(done.stdout.splitlines()[-1])

    return run


@pytest.fixture(scope="session")
def errors_of_ark() -> Callable[[dict], list[str]]:
    """What of the console and of failed requests is Ark's."""
    not_ours = re.compile(
        # the canvas asks its registry who wrote each node, which a server without API nodes forbids it
        r"api\.comfy\.org"
        # and looks for a help page in each language before the one that is there
        r"|/extensions/ark/docs/\w+/[\w-]+\.md"
    )

    def of_ark(seen: dict) -> list[str]:
        texts = [t for t in seen["errors"] + seen["failedRequests"] if not not_ours.search(t)]
        return [text for text in texts if "ark" in re.sub(r"dark|mark", "", text.lower())]

    return of_ark
