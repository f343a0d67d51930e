"""The Triton kernels against plain torch; `test_fused.py` runs this in a process of its own, as Triton's interpreter wants."""

import os

import pytest
import torch

from ark.toolkit.fused import fast, gated, reference
from ark.toolkit.fused.matrix import Plain, Quantised
from ark.toolkit.fused.rows import Rows

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
CASES = [
    (1, 5, 7, 2),
    (2, 3, 4, 3),
    (3, 1, 3, 9),
    (1, 0, 6, 2),
]  # batch, text and image tokens, heads
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
DTYPES = [torch.float32, torch.float16]
if DEVICE == "cuda":  # the interpreter gets bf16 wrong
    DTYPES.append(torch.bfloat16)
    CASES += [(1, 512, 4096, 24), (2, 77, 1000, 32)]


@pytest.fixture
def random():
    torch.manual_seed(0)
    return lambda dtype, *shape: torch.randn(shape).to(DEVICE, dtype)


def check(found, expected):
    if isinstance(expected, Quantised):
        assert found.data.dtype == expected.data.dtype
        torch.testing.assert_close(found.scale, expected.scale, rtol=1e-2, atol=0)
        error, limit = (found.wide() - expected.wide()).norm(), 0.01 if DEVICE == "cuda" else 0.1
        assert error <= limit * expected.wide().norm()  # the interpreter rounds down
        return
    tolerance = TOLERANCE[expected.dtype]
    assert found.shape == expected.shape and found.dtype == expected.dtype
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=8 * tolerance)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize("fp8", [False, True])
def test_modulate(random, case, dtype, add, fp8):
    rows, width = Rows(*case[:3]), 128 * case[3]
    shift, scale, gate = random(dtype, 2, rows.batch, 6 * width).chunk(6, -1)[:3]
    same = random(dtype, rows.batch, width).expand(2, -1, -1)  # one table for text and image
    x, y = random(dtype, rows.count, width), random(dtype, rows.count, width)
    for tables in ((shift, scale, gate), (same, same, gate), (shift, scale, same)):
        residuals = x.clone(), x.clone()
        found, expected = (
            ops.modulate(mine, *tables[:2], rows, *((y, tables[2]) if add else ()), fp8=fp8)
            for ops, mine in zip((fast, reference), residuals, strict=True)
        )
        check(found, expected)
        check(*residuals)
        assert torch.equal(residuals[0], x) != add


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("apart", [0, 200])
def test_norm_rotate(random, case, dtype, apart):
    rows, width = Rows(*case[:3]), 128 * case[3]
    qkv = random(dtype, rows.count, 3 * width + apart)[:, : 3 * width]
    norms = random(dtype, 2, 128), random(dtype, 1, 128).expand(2, -1)
    angles = random(torch.float32, rows.seq_len, 64)
    arguments = (qkv, *norms, angles.cos(), angles.sin(), rows, 1e-6)
    found, expected = fast.norm_rotate(*arguments), reference.norm_rotate(*arguments)
    for mine, other in zip(found, expected, strict=True):
        check(mine, other)
    found, expected = (ops.norm_rotate(*arguments, fp8=True) for ops in (fast, reference))
    for mine, other in zip(found, expected, strict=True):
        assert mine.data.transpose(1, 2).is_contiguous()
        check(in_a_row(mine), in_a_row(other))


def in_a_row(x):
    """A tensor of one scale as one row."""
    return x.by_rows(x.data.transpose(1, 2).reshape(1, -1))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_attention", [False, True])
@pytest.mark.parametrize("fp8", [False, True])
def test_swiglu(random, case, dtype, with_attention, fp8):
    rows, width = Rows(*case[:3]), 700
    gate_up = random(dtype, rows.count, 128 + 2 * width)[:, 128:]
    attention = random(dtype, rows.batch, rows.seq_len, 128 * case[3]) if with_attention else None
    found, expected = (ops.swiglu(gate_up, rows, attention, fp8) for ops in (fast, reference))
    check(found, expected)
    if with_attention and fp8:
        scaled = reference.to_fp8(7 * attention)
        found, expected = (ops.swiglu(gate_up, rows, scaled, fp8) for ops in (fast, reference))
        exact = reference.swiglu(gate_up.float(), rows, scaled.wide())
        errors = [(x.wide() - exact).norm() for x in (found, expected)]
        # from fp8 to fp8 many numbers lie half way between two, either of which is as near
        assert errors[0] <= (1.02 * errors[1] if DEVICE == "cuda" else 0.1 * exact.norm())
        torch.testing.assert_close(found.scale, expected.scale, rtol=1e-2, atol=0)


HALF = torch.bfloat16 if DEVICE == "cuda" else torch.float16
HOPPER = DEVICE == "cuda" and torch.cuda.get_device_capability() == (9, 0)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("way", ["two", "one", "attention"])
def test_gated(random, case, way):
    rows, width, inputs = Rows(*case[:3]), 72 * case[3], 48 * case[3]
    matrices = [Plain(weight) for weight in random(HALF, 2, 2 * width, inputs) / inputs**0.5]
    x = random(HALF, rows.count, inputs)
    parts = [(x, matrices[0])]
    if way == "two":
        parts = [(x[: rows.txt], matrices[0]), (x[rows.txt :], matrices[1])]
    attention = (
        random(HALF, rows.batch, rows.seq_len, 128 * case[3]) if way == "attention" else None
    )
    found = gated.gated_product(parts, rows, attention)
    exact = torch.cat([part.float() @ matrix.weight.float().t() for part, matrix in parts])
    check(found, reference.swiglu(exact, rows, attention).to(HALF))
    if HOPPER:
        assert fast.within(matrices[0])
        assert torch.equal(fast.gated(parts, rows, attention), found)
    check(fast.gated(parts, rows, attention, fp8=True), reference.gated(parts, rows, attention, fp8=True))  # fmt: skip


if gated.TensorDescriptor is None or (DEVICE == "cuda" and not HOPPER):
    del test_gated  # the kernel is for Hopper, and for a Triton that knows the copy engine


def test_a_product_that_cannot_have_swiglu_in_it_is_made_without(random, monkeypatch, caplog):
    error: Exception = RuntimeError("no such descriptor\nand a long trace")
    tried = []

    def fails(*given):
        tried.append(given)
        raise error

    rows, parts = Rows(1, 0, 6), [(random(HALF, 6, 96), Plain(random(HALF, 256, 96)))]
    monkeypatch.setattr(gated, "_refusals", [])
    monkeypatch.setattr(gated, "within", lambda matrix: not gated._refusals)
    monkeypatch.setattr(gated, "gated_product", fails)
    for _ in range(2):
        check(fast.gated(parts, rows), reference.gated(parts, rows))
    assert len(tried) == 1 and caplog.text.count("(no such descriptor).") == 1
    assert not fast.within(parts[0][1])
    gated._refusals.clear()
    error = torch.cuda.OutOfMemoryError("CUDA out of memory.")
    with pytest.raises(
        torch.cuda.OutOfMemoryError
    ):  # which the engine knows better what to do about
        fast.gated(parts, rows)
    assert not gated._refusals


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("count", "width"), [(1, 128), (5, 300), (3, 4096)])
def test_quantise(random, dtype, count, width):
    x = random(dtype, count, width + 7)[:, :width]
    x[0] = 0
    check(fast.quantise(x), reference.quantise(x))


@pytest.mark.parametrize(("count", "width"), [(1, 64), (5, 300), (7, 2560)])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("add", [False, True])
def test_add_norm(random, count, width, dtype, add):
    x, weight = random(torch.float32, count, width), random(torch.float32, width)
    y = random(dtype, count, width) if add else None
    residuals = x.clone(), x.clone()
    found, expected = (
        ops.add_norm(mine, y, weight, 1e-6, dtype)
        for ops, mine in zip((fast, reference), residuals, strict=True)
    )
    check(found, expected)
    check(*residuals)
    assert torch.equal(residuals[0], x) != add


@pytest.mark.parametrize(("batch", "length", "heads"), [(1, 5, 1), (2, 3, 8), (3, 4, 9)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_norm_turn(random, batch, length, heads, dtype):
    x, weight = random(dtype, batch * length, (heads + 3) * 128), random(torch.float32, 128)
    x = x[:, 2 * 128 : -128]  # of a row that holds more
    angles = random(torch.float32, length, 64)
    arguments = x, weight, angles.cos(), angles.sin(), 1e-6
    check(fast.norm_turn(*arguments), reference.norm_turn(*arguments))


@pytest.mark.parametrize(("length", "texts"), [(5, (5,)), (70, (3, 70, 64)), (200, (130, 1))])
@pytest.mark.parametrize("repeat", [1, 4])
@pytest.mark.parametrize("dtype", DTYPES)
def test_attend_causal(random, length, texts, repeat, dtype):
    count, heads = len(texts) * length, 2 * repeat
    q = random(dtype, len(texts), length, heads, 128)
    k = random(dtype, count, 3 * 256)[:, 256:512].unflatten(1, (2, 128)).unflatten(0, q.shape[:2])
    v = random(dtype, len(texts), length, 2, 128)
    present = torch.arange(length, device=DEVICE) < torch.tensor(texts, device=DEVICE)[:, None]
    check(fast.attend_causal(q, k, v, present), reference.attend_causal(q, k, v, present))
    present[0, 1] = False  # a gap
    found, expected = (ops.attend_causal(q, k, v, present) for ops in (fast, reference))
    check(found, expected)
    present[:] = False
    assert bool(fast.attend_causal(q, k, v, present).isfinite().all())


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["NHD", "HND", "part"])
def test_to_fp8(random, case, dtype, layout):
    batch, length, heads = case[0], case[1] + case[2], case[3]
    x = random(dtype, batch, length, heads, 128).transpose(1, 2)
    if layout == "HND":
        x = x.contiguous()
    elif layout == "part":  # of a row that holds more
        x = random(dtype, batch, length, 3 * heads * 128)[..., heads * 128 : 2 * heads * 128]
        x = x.unflatten(2, (heads, 128)).transpose(1, 2)
    found, expected = fast.to_fp8(x), reference.to_fp8(x)
    assert found.data.shape == x.shape and found.data.transpose(1, 2).is_contiguous()
    check(in_a_row(found), in_a_row(expected))


@pytest.mark.parametrize("dtype", DTYPES)
def test_widen(random, dtype):
    x = fast.to_fp8(random(torch.float32, 2, 3, 70, 64))
    found = fast.widen(x, dtype)
    assert found.stride() == x.data.stride() and float(x.scale.prod()) == pytest.approx(1)
    check(found, reference.widen(x, dtype))


@pytest.mark.parametrize(("most", "each"), [(1, 624), (128, 851), (300, 2000)])
def test_jump(most, each):
    numbers = torch.Generator().manual_seed(most)
    state = torch.randint(-(1 << 31), 1 << 31, (624,), generator=numbers).int()
    places = torch.randint(-1, 19937, (3, most), generator=numbers).int()
    places[:, 0] = torch.tensor([0, 5, 19936])
    found = fast.jump(state, places.to(DEVICE), each)
    assert torch.equal(found, reference.jump(state, places.to(DEVICE), each))
    assert found.unique().numel() > 700


def words_that_give(numbers):
    """What a generator keeps for the words that it gives: what it does to each of them, undone."""
    y = numbers ^ (numbers >> 18)
    y = y ^ ((y << 15) & 0xEFC60000)
    z = y
    for _ in range(4):  # 7 bits more are right each time
        z = y ^ ((z << 7) & 0x9D2C5680)
    return (z ^ ((z ^ (z >> 11)) >> 11)).int()


@pytest.mark.parametrize("step", [1 if DEVICE == "cuda" else 2048])
def test_normal(step):
    uniform = torch.arange(0, 1 << 24, step)  # all that torch makes of a word, or some of them
    other = uniform * 0x9E3779 & 0xFFFFFF
    pairs = torch.stack((uniform.view(-1, 8), other.view(-1, 8)), 1)
    words = words_that_give(torch.cat((pairs, pairs.flip(1))).flatten()).to(DEVICE)
    found, expected = fast.normal(words), reference.normal(words)
    assert found[0] == 0 and found.abs().max() > 4
    if DEVICE == "cuda":
        assert torch.equal(found, expected)
    else:  # the interpreter rounds products
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
