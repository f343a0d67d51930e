"""The fused operations: Triton against plain torch, interpreted on a CPU, compiled on a GPU."""

import dataclasses
import importlib.util
import os
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch

from ark.toolkit import step
from ark.toolkit.fused import reference
from ark.toolkit.fused.matrix import FP8, Fp8, Plain, quantise, to_fp8
from ark.toolkit.fused.runner import Runner, Unknown, choose_engine, operations_for
from ark.toolkit.step import Attend, denoise, rotary_table
from ark.toolkit.step_weights import SingleBlock, Stream, Weights

KERNELS = "fused_kernels.py", "pixel_kernels.py"


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="Triton is not installed")
def test_kernels_compute_what_plain_torch_does(device, kernels):
    env = {**os.environ, "TRITON_INTERPRET": "1" if device == "cpu" else "0"}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        str(Path(__file__).with_name(kernels)),
    ]
    run = subprocess.run(command, env=env, capture_output=True, text=True)
    assert run.returncode == 0 and " passed" in run.stdout, run.stdout[-3000:]
    assert "skipped" not in run.stdout


def test_what_is_made_of_weights_stays_where_it_is_while_they_are_the_same():
    runner, like = Runner(torch.device("cpu"), "bf16"), torch.empty(0)
    data, scale = torch.ones(16, 16).to(torch.float8_e4m3fn), torch.tensor(0.5)
    made = runner.matrix_of_file(like, data, scale)
    assert runner.matrix_of_file(like, data, scale).scale is made.scale  # recordings read it
    assert torch.equal(made.scale, torch.full((1, 16), 0.5)) and made.weight is data
    half = torch.ones(4, 4, dtype=torch.float16)
    wide = runner.plain(half, like)
    assert wide.dtype == torch.float32 and runner.plain(half, like) is wide
    assert runner.matrix_of_file(like, data, torch.tensor(0.25)).scale[0, 0] == 0.25
    gone = weakref.ref(wide)
    del half, wide
    runner.matrix_of_file(like, data, torch.tensor(0.125))
    assert gone() is None
    with pytest.raises(Unknown, match="quantised as torch.int8"):
        runner.matrix_of_file(like, data.to(torch.int8), scale)
    with pytest.raises(Unknown, match="weights are on cpu"):
        runner.matrix_of_file(torch.empty(0, device="meta"), data, scale)


def small_klein(precision):
    """Weights of two heads, one block of each kind, in fp32 or with fp8 matrices."""
    torch.manual_seed(0)
    width, mlp = 256, 768

    def plain(out, into):
        return Plain(torch.randn(out, into) / into**0.5)

    def matrix(out, into):
        found = plain(out, into)
        return Fp8.of(found.weight, quantise) if precision == "fp8" else found

    def norms():
        return [1 + 0.2 * torch.randn(128) for _ in "qk"]

    def stream():
        return Stream(matrix(3 * width, width), matrix(width, width), matrix(2 * mlp, width), matrix(width, mlp), *norms())  # fmt: skip

    single = SingleBlock(matrix(3 * width + 2 * mlp, width), matrix(width, width + mlp), *norms())
    return Weights(
        plain(width, 128), plain(width, 96), (plain(width, 256), plain(width, width)),
        plain(6 * width, width), plain(6 * width, width), plain(3 * width, width),
        [(stream(), stream())], [single], plain(2 * width, width), plain(128, width), 1e-6,
    )  # fmt: skip


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("precision", ["bf16", "fp8"])
def test_attention_in_fp8_stays_near(precision, batch):
    weights, (txt_len, img_len) = small_klein(precision), (5, 12)
    inputs = torch.randn(batch, img_len, 128), torch.randn(batch, txt_len, 96), torch.full((batch,), 0.7)  # fmt: skip
    table, seen = rotary_table(torch.randint(0, 9, (txt_len + img_len, 4))), []

    def attend_fp8(q, k, v):
        seen.extend((q, k, v))
        return to_fp8(torch.nn.functional.scaled_dot_product_attention(q.wide(), k.wide(), v.wide()))  # fmt: skip

    expected = denoise(weights, *inputs, table)
    found = denoise(weights, *inputs, table, Attend(attend_fp8, fp8=True, any_length=False))
    assert len(seen) == 6 and all(x.data.dtype == FP8 for x in seen)
    error = float((found - expected).norm() / expected.norm())
    assert 1e-4 < error < 0.06, error


@pytest.mark.parametrize("wanted_len", [None, 8, 12])
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("any_length", [True, False])
@pytest.mark.parametrize("fp8", [True, False])
def test_what_is_not_read_changes_nothing(batch, wanted_len, any_length, fp8):
    weights, (txt_len, img_len) = small_klein("fp8" if fp8 else "bf16"), (5, 12)
    inputs = torch.randn(batch, img_len, 128), torch.randn(batch, txt_len, 96), torch.full((batch,), 0.7)  # fmt: skip
    table, lengths = rotary_table(torch.randint(0, 9, (txt_len + img_len, 4))), []

    def attend(q, k, v):
        lengths.append((q.data if fp8 else q).shape[2])
        if fp8:
            return to_fp8(torch.nn.functional.scaled_dot_product_attention(q.wide(), k.wide(), v.wide()), 4.0)  # fmt: skip
        return torch.nn.functional.scaled_dot_product_attention(q, k, v)

    everything = denoise(weights, *inputs, table, Attend(attend, fp8, False))
    found = denoise(weights, *inputs, table, Attend(attend, fp8, any_length), wanted_len=wanted_len)
    kept = wanted_len if wanted_len and batch == 1 else img_len
    torch.testing.assert_close(found, everything[:, :kept], rtol=1e-4, atol=1e-5)
    assert found.shape == (batch, kept, 128)
    assert lengths == [17] * 3 + [kept if any_length else 17]


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("precision", ["bf16", "fp8"])
def test_a_large_product_in_two_parts_changes_nothing(precision, batch, monkeypatch):
    weights = small_klein(precision)
    weights = dataclasses.replace(weights, single=weights.single * 3)
    inputs = torch.randn(batch, 12, 128), torch.randn(batch, 5, 96), torch.full((batch,), 0.7)
    table, parts, own = rotary_table(torch.randint(0, 9, (17, 4))), [], reference.gated
    monkeypatch.setattr(reference, "gated", lambda *given, **named: parts.append(1) or own(*given, **named))  # fmt: skip
    whole = denoise(weights, *inputs, table)
    assert len(parts) == 2  # of the double block, and of the last one
    monkeypatch.setattr(step, "APART", 17 * batch)
    torch.testing.assert_close(denoise(weights, *inputs, table), whole, rtol=1e-4, atol=1e-5)
    assert len(parts) == 2 + 4


def test_what_attention_needed_is_gone_before_what_needs_most(monkeypatch):
    weights, before, found = small_klein("fp8"), [], []
    inputs = torch.randn(1, 12, 128), torch.randn(1, 5, 96), torch.full((1,), 0.7)
    own_norm, own_gated = reference.norm_rotate, reference.gated

    def norm_rotate(qkv, *given, **named):
        q, k, v = own_norm(qkv, *given, **named)
        before[:] = map(weakref.ref, (qkv, q, k, v))
        return q, k, v

    def gated(*given, **named):
        found.append([there() for there in before])
        return own_gated(*given, **named)

    monkeypatch.setattr(reference, "norm_rotate", norm_rotate)
    monkeypatch.setattr(reference, "gated", gated)
    denoise(weights, *inputs, rotary_table(torch.randint(0, 9, (17, 4))))
    assert found == [[None] * 4] * 2  # of the double block, and of the last one


def test_kernels_that_do_not_run_are_not_used():
    device = torch.device("cuda", 99)  # whatever is there, this one is not
    operations, how = operations_for(device)
    assert operations is reference and "in plain torch, which is slower (" in how
    engine, why = choose_engine(device)
    assert engine == "host" and how in why
    assert choose_engine(torch.device("cpu"))[0] == "host"


@pytest.mark.gpu
def test_kernels_that_run_are_used():
    device = torch.device("cuda", torch.cuda.current_device())
    assert operations_for(device)[1] == "operations in Triton"
    assert choose_engine(device)[0] == "fused"
