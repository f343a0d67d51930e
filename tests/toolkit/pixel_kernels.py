"""The Triton kernels of the autoencoder against plain torch; `test_fused.py` runs this in a process of its own, see there."""

import os

import pytest
import torch

from ark.toolkit.fused import fast, reference

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
SIZES = [(2, 3, 4, 32), (1, 1, 1, 128), (2, 6, 5, 96), (1, 37, 30, 64)]
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
DTYPES = [torch.float32, torch.float16]
if DEVICE == "cuda":  # the interpreter gets bf16 wrong
    DTYPES.append(torch.bfloat16)
    SIZES += [(2, 129, 130, 512), (1, 1000, 1024, 256), (4, 64, 65, 384)]


@pytest.fixture
def random(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    torch.manual_seed(0)
    return lambda dtype, *shape: torch.randn(shape).to(DEVICE, dtype)


def check(found, expected):
    tolerance = TOLERANCE[expected.dtype]
    assert found.shape == expected.shape and found.dtype == expected.dtype
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=8 * tolerance)


def norm(random, channels):
    return 1 + 0.3 * random(torch.float32, channels), random(torch.float32, channels)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shifted", [False, True])
def test_group_norm(random, size, dtype, shifted):
    # a mean far from zero, whose square would swallow the variance
    x = random(dtype, *size) + 20 * random(dtype, size[-1])
    shift = random(torch.float32, size[-1]) if shifted else None
    arguments = norm(random, size[-1])
    mine, expected = (ops.factors(ops.moments(x), *arguments, shift) for ops in (fast, reference))
    torch.testing.assert_close(mine, expected, rtol=1e-3, atol=1e-3)
    moved = x.float() if shift is None else x.float() + shift
    exact = torch.nn.functional.group_norm(moved.movedim(-1, 1), 32, *arguments, 1e-6).movedim(1, -1)  # fmt: skip
    for ops in (fast, reference):
        found = ops.normed(x.float(), ops.factors(ops.moments(x), *arguments, shift), False)
        torch.testing.assert_close(found, exact, rtol=1e-3, atol=2e-3)


@pytest.mark.parametrize("shift", [30.0, 3000.0])
def test_what_is_added_may_be_far_from_zero(random, shift):
    x, arguments = 0.1 + 0.1 * random(torch.float32, 2, 6, 5, 96), norm(random, 96)
    moments, shift = reference.moments(x), torch.full((96,), shift, device=DEVICE)
    mine, expected = (ops.factors(moments, *arguments, shift) for ops in (fast, reference))
    torch.testing.assert_close(mine[:, 0], expected[:, 0], rtol=2e-2, atol=0)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("silu", [False, True])
def test_normed(random, size, dtype, silu):
    x, factors = random(dtype, *size), random(torch.float32, size[0], 2, size[-1])
    expected = reference.normed(x, factors, silu)
    before = x.clone()
    check(fast.normed(x, factors, silu), expected)
    assert torch.equal(x, before)
    for ops in (fast, reference):
        x = before.clone()
        found = ops.normed(x, factors, silu, in_place=True)
        assert found.data_ptr() == x.data_ptr()
        check(x, expected)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_add(random, size, dtype):
    x, y, shift = random(dtype, *size), random(dtype, *size), random(torch.float32, size[-1])
    results = x.clone(), x.clone()
    found, expected = (
        ops.add(mine, y, shift) for ops, mine in zip((fast, reference), results, strict=True)
    )
    check(*results)
    arguments = norm(random, size[-1])
    mine, theirs = (reference.factors(m, *arguments) for m in (found, expected))
    torch.testing.assert_close(mine, theirs, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_interleave(random, size, dtype):
    batch, height, width, channels = size
    x = random(dtype, batch, height + 1, width + 1, 4 * channels)
    (found, moments), (expected, others) = (ops.interleave(x) for ops in (fast, reference))
    assert torch.equal(found, expected)
    arguments = norm(random, channels)
    mine, theirs = (reference.factors(m, *arguments) for m in (moments, others))
    torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-3)


def ordered(weight):
    return weight.contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("colours", [3, 1])
def test_from_colours(random, size, dtype, colours):
    x = random(torch.float32, *size[:3], colours)
    weight = ordered(random(dtype, size[3], colours, 3, 3) / 5)
    check(*(ops.from_colours(x, weight) for ops in (fast, reference)))


@pytest.mark.parametrize("colours", [1, 4])
def test_colours_that_the_weight_does_not_know_are_refused(random, colours):
    x, weight = random(torch.float32, 1, 4, 4, colours), random(torch.float32, 32, 3, 3, 3)
    for ops in (fast, reference):
        with pytest.raises((ValueError, RuntimeError), match="colours|channels"):
            ops.from_colours(x, weight)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("colours", [3, 1])
def test_to_colours(random, size, dtype, colours):
    x, factors = random(dtype, *size), random(torch.float32, size[0], 2, size[3])
    weight, bias = ordered(random(dtype, colours, size[3], 3, 3) / (3 * size[3] ** 0.5)), random(torch.float32, colours)  # fmt: skip
    before = x.clone()
    found, expected = (ops.to_colours(x, factors, weight, bias) for ops in (fast, reference))
    assert torch.equal(x, before) and found.dtype == expected.dtype == torch.float32
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=8 * tolerance)


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (5, 300), (3, 4097), (2, 16385), (2, 40000)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_softmax(random, rows, columns, dtype):
    scores = 30 * random(torch.float32, rows, columns + 3)[:, :columns]
    check(fast.softmax(scores, 0.1, dtype), reference.softmax(scores, 0.1, dtype))
    half = scores.to(dtype)
    check(fast.softmax(half, 0.1, dtype), reference.softmax(half, 0.1, dtype))


def test_pixels_that_do_not_lie_as_they_should_are_refused(random):
    x = random(torch.float32, 1, 4, 4, 64)
    for wrong in (x[:, :, ::2], x.permute(0, 3, 1, 2), x[0]):
        for work in (fast.moments, fast.interleave, lambda t: fast.normed(t, t), lambda t: fast.add(x, t, t), lambda t: fast.from_colours(t, t), lambda t: fast.to_colours(t, t, t, t)):  # fmt: skip
            with pytest.raises(ValueError, match="contiguous"):
                work(wrong)
    with pytest.raises(ValueError, match="contiguous"):
        fast.softmax(x[0, :, :, 0], 1.0, torch.float32)
