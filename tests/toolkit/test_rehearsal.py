"""A rehearsal runs what the real thing runs, in its sizes, and fails for nobody."""

import pytest
import torch

from ark.toolkit import rehearsal
from ark.toolkit.architecture import TextEncoderDims, TransformerDims, VaeDims
from ark.toolkit.rehearsal import Rehearsal, rehearse_decode, rehearse_step, rehearse_text

CPU = torch.device("cpu")
KLEIN, QWEN3 = TransformerDims(256, 2, 1, 1, 192), TextEncoderDims(64, 128, 28, 2, 1, 1000)
VAE = VaeDims(32, 32, (1, 2, 4, 4), 2, 32, 32)


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(rehearsal, "SIDE", 8)
    monkeypatch.setattr(rehearsal, "TXT_LEN", 16)


@pytest.mark.parametrize("precision", ["bf16", "fp8"])
def test_a_step(small, precision):
    found = rehearse_step(KLEIN.hidden_size, KLEIN.context_dim, CPU, torch.float32, precision, None)
    assert found.shape == (1, 64, 128) and found.dtype == torch.float32


def test_a_prompt(small):
    assert rehearse_text(QWEN3, CPU, torch.bfloat16).shape == (1, 16, 1, 64)


@pytest.mark.parametrize(
    "widths", [(32, 32), (32, 64)]
)  # the second as of a VAE with a wide decoder
def test_a_picture(small, widths):
    dims = VaeDims(*widths, (1, 2, 4, 4), 2, 32, 32)
    assert rehearse_decode(dims, CPU, torch.bfloat16).shape == (1, 128, 128, 3)


@pytest.mark.parametrize("free", [1 << 50, 1 << 20])
def test_all_of_it_runs_where_there_is_room_and_what_fails_is_only_said(small, monkeypatch, caplog, free):  # fmt: skip
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, free))
    ran = []
    for name in ("rehearse_text", "rehearse_step", "rehearse_decode"):
        real = getattr(rehearsal, name)
        monkeypatch.setattr(rehearsal, name, lambda *how, name=name, real=real: (ran.append(name), real(*how)))  # fmt: skip
    Rehearsal("fp4", "none").run(KLEIN, QWEN3, VAE, CPU, torch.float32)
    if free < rehearsal.ROOM:
        assert ran == [] and not caplog.text
        return
    assert ran == ["rehearse_text", "rehearse_step", "rehearse_decode"]
    assert "the transformer could not be rehearsed (precision: fp4 is not one of" in caplog.text


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["bf16", "fp8"])
def test_on_a_gpu_it_is_klein_4b(caplog, precision):
    klein, qwen3 = TransformerDims(3072, 24, 5, 20, 7680), TextEncoderDims(2560, 9728, 36, 32, 8, 151936)  # fmt: skip
    vae = VaeDims(128, 128, (1, 2, 4, 4), 2, 32, 32)
    Rehearsal(precision).run(klein, qwen3, vae, torch.device("cuda"), torch.bfloat16)
    torch.cuda.synchronize()
    assert not caplog.text
