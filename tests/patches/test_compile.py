"""Combinations that are known to fail are refused with a reason and a way out."""

import pytest
import torch

from ark.patches.compile import CompiledBlock, refusal
from ark.toolkit.compile import MODES, Compiler
from ark.toolkit.hardware import Hardware

HOPPER = Hardware("cuda", "H200", (9, 0), ())
AMPERE = Hardware("cuda", "RTX 3090", (8, 6), ())
CPU = Hardware("cpu", "CPU", (0, 0), ())


class Flux(torch.nn.Module):
    def __init__(self, dtype=torch.bfloat16):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(2, 2).to(dtype), requires_grad=False)


@pytest.mark.parametrize("mode", MODES)
def test_what_works_is_not_refused(mode, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_allocator_backend", lambda: "native")
    assert refusal(mode, HOPPER, Flux(), "sage") is None


def test_cuda_graphs_need_cuda_and_its_own_allocator(monkeypatch):
    assert "CUDA graphs, this is CPU" in refusal("reduce-overhead", CPU, Flux(), "host")[0]
    monkeypatch.setattr(torch.cuda, "get_allocator_backend", lambda: "cudaMallocAsync")
    reason, remedy = refusal("reduce-overhead", HOPPER, Flux(), "host")
    assert "cudaMallocAsync" in reason and "--disable-cuda-malloc" in remedy


def test_fp8_needs_ada(monkeypatch):
    assert "RTX 3090 cannot compile fp8" in refusal("default", AMPERE, Flux(torch.float8_e4m3fn), "host")[0]  # fmt: skip
    assert refusal("default", HOPPER, Flux(torch.float8_e4m3fn), "host") is None
    assert refusal("default", AMPERE, Flux(), "host") is None


def test_sage_with_fp16_accumulation_is_refused(monkeypatch):
    matmul = type("Matmul", (), {"allow_fp16_accumulation": True})
    monkeypatch.setattr(torch.backends.cuda, "matmul", matmul)
    assert "give noise" in refusal("default", HOPPER, Flux(), "sage_fp8")[0]
    assert refusal("default", HOPPER, Flux(), "cudnn") is None


def test_a_block_with_patches_of_others_runs_as_it_is():
    class Block(torch.nn.Module):
        img_attn = None

        def forward(self, *args, transformer_options):
            return args, transformer_options

    compiler = Compiler("default", None)
    block = CompiledBlock(Block(), compiler)
    options = {"patches": {"attn1_patch": [print]}, "block_index": 3}
    assert block(1, 2, transformer_options=options) == ((1, 2), options)
    assert compiler.graphs == 0


def test_a_cache_that_cannot_be_read_is_said_and_not_used(tmp_path, caplog):
    (tmp_path / "broken.bin").write_bytes(b"no artifacts")
    Compiler("default", tmp_path).wait()
    assert "broken.bin is damaged" in caplog.text
