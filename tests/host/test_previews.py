"""Previews at the host's setting: its small decoder (taef2) where there is a file of it, else the colours of the latents."""

from __future__ import annotations

import io

import pytest
from PIL import Image

from ark import bootstrap

pytestmark = pytest.mark.host
DECODER = "taef2_decoder.safetensors"
RED = (255, 0, 0)


@pytest.fixture
def seen(monkeypatch) -> list[Image.Image]:
    """The previews that arrive."""
    pictures, receive = [], bootstrap.WebSocket.receive

    def spy(self, timeout):
        message = receive(self, timeout)
        if isinstance(message, bytes) and (start := message.find(b"\xff\xd8\xff")) > 0:  # a JPEG
            pictures.append(Image.open(io.BytesIO(message[start:])).convert("RGB"))
        return message

    monkeypatch.setattr(bootstrap.WebSocket, "receive", spy)
    return pictures


@pytest.mark.parametrize("with_decoder", [True, False])
def test_taesd(comfyui, run_in_host, server, fresh_seed, tmp_path, seen, with_decoder):
    known = run_in_host(comfyui, "taef2_run.py", tmp_path / DECODER) if with_decoder else ""
    flags, folders = ["--preview-method", "taesd"], {"vae_approx": [tmp_path]}
    graph = server.graph(ArkSampler4Step={"seed": fresh_seed})
    with bootstrap.Host.start(comfyui, extra_args=flags, model_folders=folders) as host:
        bootstrap.Client(host.url).run(graph, timeout=120)
    red = [max(abs(a - b) for a, b in zip(picture.resize((1, 1)).getpixel((0, 0)), RED, strict=True)) < 4 for picture in seen]  # fmt: skip
    assert red and all(red) == any(red) == (known.strip() == "known")
