"""Algorithms of cuBLASLt: the same numbers as torch's, chosen by measurement, remembered, and never needed."""

import dataclasses

import pytest
import torch

from ark.toolkit import matrices
from ark.toolkit.fused import cublas
from ark.toolkit.fused.matrix import MANY, Fp8, Plain, algorithm_for, quantise
from ark.toolkit.fused.runner import PRECISIONS, Runner
from ark.toolkit.hardware import Hardware

CARD = Hardware("cuda", "H200", (9, 0), ())
SHAPES = [(4096, 384, 128), (4608, 128, 512)]


class Library:
    version = 130100


@pytest.fixture
def card(monkeypatch, tmp_path):
    """A machine with one, as far as what is remembered goes."""
    monkeypatch.setenv("ARK_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(matrices, "probe_hardware", lambda device: CARD)
    monkeypatch.setattr(matrices, "library", Library)
    monkeypatch.setattr(torch.cuda, "device", lambda device: torch.no_grad())
    timed = []

    def fastest(device, shape, precision):
        timed.append(shape)
        return bytes([len(timed)]) * 64 if shape[0] == 4096 else b""

    monkeypatch.setattr(matrices, "_fastest", fastest)
    return timed


def test_the_usual_shapes_are_kleins():
    assert matrices.usual_shapes(3072, (0,)) == [
        (4096, 9216, 3072), (4096, 3072, 3072), (4096, 18432, 3072), (4096, 3072, 9216),
        (4608, 27648, 3072), (4608, 9216, 3072), (4608, 3072, 12288),
    ]  # fmt: skip
    rows = [shape[0] for shape in matrices.usual_shapes(3072)]
    assert rows == [4096] * 4 + [4608] * 3 + [8192] * 4 + [8704] * 3


@pytest.mark.parametrize("precision", PRECISIONS)
def test_without_a_gpu_there_is_nothing_to_choose(precision):
    assert matrices.known_algorithms(torch.device("cpu"), precision) == {}
    assert matrices.choose_algorithms(torch.device("cpu"), SHAPES, precision) == 0


def test_a_card_without_scales_for_rows_chooses_in_bf16_only(card, monkeypatch):
    monkeypatch.setattr(matrices, "probe_hardware", lambda device: Hardware("cuda", "RTX 4090", (8, 9), ()))  # fmt: skip
    device = torch.device("cuda", 0)
    assert [matrices.choose_algorithms(device, SHAPES, p) for p in PRECISIONS] == [2, 0]


def test_what_was_chosen_is_remembered_and_not_timed_again(card):
    device = torch.device("cuda", 0)
    assert matrices.choose_algorithms(device, SHAPES[:1], "bf16") == 1
    assert matrices.choose_algorithms(device, SHAPES, "bf16") == 1 and card == SHAPES
    assert matrices.known_algorithms(device, "bf16") == {
        (384, 128): ((4096, b"\1" * 64),),
        (128, 512): ((4608, b""),),
    }
    assert matrices.choose_algorithms(device, SHAPES, "bf16") == 0 and card == SHAPES
    assert matrices.choose_algorithms(device, [(8192, 384, 128)], "bf16") == 1
    more = {(384, 128): ((4096, b"\1" * 64), (8192, b"")), (128, 512): ((4608, b""),)}
    assert matrices.known_algorithms(device, "bf16") == more
    assert matrices.known_algorithms(device, "fp8") == {}
    assert matrices.choose_algorithms(device, SHAPES, "fp8") == 2


def test_it_stops_when_the_device_is_wanted(card):
    device, calls = torch.device("cuda", 0), []
    assert matrices.choose_algorithms(device, SHAPES, "bf16", lambda: calls.append(1) or len(calls) > 1) == 1  # fmt: skip
    assert list(matrices.known_algorithms(device, "bf16")) == [(384, 128)]


def test_what_cannot_be_timed_is_said_and_tried_again(card, monkeypatch, caplog):
    def fails(device, shape, precision):
        if shape == SHAPES[1]:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory.")
        return b"\1" * 64

    monkeypatch.setattr(matrices, "_fastest", fails)
    device = torch.device("cuda", 0)
    assert matrices.choose_algorithms(device, SHAPES, "bf16") == 1
    assert "could not be timed (CUDA out of memory.)" in caplog.text
    assert list(matrices.known_algorithms(device, "bf16")) == [(384, 128)]


def test_another_library_has_other_algorithms(card, monkeypatch):
    device = torch.device("cuda", 0)
    matrices.choose_algorithms(device, SHAPES, "bf16")
    monkeypatch.setattr(Library, "version", 130200)
    assert matrices.known_algorithms(device, "bf16") == {}


@pytest.mark.parametrize(
    "damaged",
    [
        "[]",
        '{"key": 1}',
        "not JSON",
        '{"key": [[[1], "zz"]]}',
        '{"key": [[[384, 128], ""]]}',
        '{"key": [[[4096, 384, 128], "0102"]]}',
        '{"key": [[[4096, 384, "x"], ""]]}',
        '{"key": [[[0, 384, 128], ""]]}',
    ],  # fmt: skip
)
def test_a_damaged_note_counts_for_nothing(card, tmp_path, damaged):
    key = matrices._key(CARD, "bf16")
    (tmp_path / "matrices.json").write_text(damaged.replace("key", key))
    assert matrices.known_algorithms(torch.device("cuda", 0), "bf16") == {}


def test_few_rows_and_other_dtypes_are_torchs(monkeypatch):
    called = []
    monkeypatch.setattr("ark.toolkit.fused.matrix.multiply", lambda *given: called.append(given))
    known = (MANY, b"any"), (4 * MANY, b"other")
    matrix = Plain(torch.randn(8, 16), known={(8, 16): known[::-1], (4, 16): known})
    x = torch.randn(MANY - 1, 16)
    assert torch.equal(matrix(x), x @ matrix.weight.t()) and not called
    x = torch.randn(MANY, 16)
    part = matrix.part(2, 6)
    assert torch.equal(part(x), x @ part.weight.t())  # the algorithm could not
    algorithm, given, weight, out = called[0]
    assert algorithm == b"any" and given is x and weight is part.weight and out is None
    found = [
        algorithm_for(rows, part.weight, matrix.known)
        for rows in (0, MANY - 1, MANY, 2 * MANY - 1, 2 * MANY + 1, 100 * MANY)
    ]
    assert (
        found == [b"", b"", b"any", b"any", b"other", b"other"]
        and algorithm_for(MANY, matrix.weight.t(), matrix.known) == b""
    )
    runner = Runner(torch.device("cpu"), "bf16")
    runner._algorithms = every = {(8, 16): known}
    weight = torch.randn(8, 16)
    assert runner.matrix(torch.empty(0), weight).known == {}
    half, like = weight.bfloat16(), torch.empty(0, dtype=torch.bfloat16)
    assert runner.matrix(like, half).known == every
    low = Runner(torch.device("cpu"), "fp8")
    low._algorithms = every
    made = low.matrix(like, half)
    assert made.known == made.part(0, 4).known == every
    assert low.matrix_of_file(like, made.weight, torch.ones(())).known == every
    assert low.matrix(torch.empty(0), weight).known == {}


def test_why_the_library_cannot_be_called_is_said(caplog):
    if torch.version.cuda is None:
        assert cublas.library() == "this torch has no CUDA"
        caplog.set_level("INFO", "ark")
        assert cublas.multiply(b"any", torch.ones(2, 2), torch.ones(2, 2)) is None
        assert "by itself (this torch has no CUDA)" in caplog.text


def operands(shape, fp8: bool, apart: int = 0):  # noqa: ANN201
    """x and weight, lines apart, in fp8 with their scales; and their product in fp64."""
    count, outputs, inputs = shape

    def made(rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        data = torch.randn(rows, inputs, device="cuda") * torch.rand(rows, 1, device="cuda")
        whole = quantise(data)
        data = whole.data if fp8 else data.bfloat16()
        lines = torch.empty(rows, inputs + apart, dtype=data.dtype, device="cuda")[:, :inputs]
        lines.copy_(data)
        return lines, whole.scale

    (x, x_scale), (weight, weight_scale) = made(count), made(outputs)
    expected = x.double() @ weight.double().t()
    if not fp8:
        return x, weight, (), expected
    return x, weight, (x_scale, weight_scale), expected * x_scale.double() * weight_scale.double().t()  # fmt: skip


@pytest.mark.gpu
@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("shape", [(4096, 512, 256), (4608, 384, 1024), (777, 528, 272)])
@pytest.mark.parametrize("apart", [0, 64])
def test_every_algorithm_that_is_offered_multiplies(shape, apart, fp8, monkeypatch):
    if fp8 and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("no scales for rows on this card")
    x, weight, scales, expected = operands(shape, fp8, apart)
    out = torch.empty(shape[0], shape[1] + apart, device="cuda", dtype=torch.bfloat16)[:, : shape[1]]  # fmt: skip
    product = cublas.Product(*map(cublas.form_of, (x, weight, out)), fp8=fp8)
    offered = product.offered(x.device)
    assert offered
    offered += product.variants(offered[0], x.device) if fp8 else []
    for algorithm in offered:
        out.fill_(float("nan"))
        assert cublas.multiply(algorithm, x, weight, out, scales) is out
        assert (out.double() - expected).norm() < 4e-3 * expected.norm()
        assert torch.equal(cublas.multiply(algorithm, x, weight, None, scales), out)


@pytest.mark.gpu
def test_what_an_algorithm_cannot_do_is_left_and_said(caplog):
    caplog.set_level("INFO", "ark")
    x, weight = (torch.randn(4096, 256, device="cuda").bfloat16() for _ in "xw")
    product = cublas.Product(*map(cublas.form_of, (x, weight, x.new_empty(4096, 4096))))
    algorithm = product.offered(x.device)[0]
    turned = x.t().contiguous().t()
    assert cublas.multiply(algorithm, turned, weight) is None and "columns lie apart" in caplog.text
    assert torch.equal(
        Plain(weight, known={tuple(weight.shape): ((4096, algorithm),)})(turned),
        turned @ weight.t(),
    )
    with pytest.raises(RuntimeError):
        product.workspace(b"\1" * 64, x.device)
    assert cublas.multiply(b"\1" * 64, x, weight) is None


@pytest.mark.gpu
@pytest.mark.parametrize("precision", PRECISIONS)
def test_choosing_changes_no_number(precision, monkeypatch, tmp_path):
    device = torch.device("cuda", 0)
    if matrices._key(matrices.probe_hardware(device), precision) is None:
        pytest.skip("nothing to choose from on this card")
    monkeypatch.setenv("ARK_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(matrices, "HEAT", 0.01)
    monkeypatch.setattr(matrices, "SLICE", 0.002)
    monkeypatch.setattr(matrices, "WORTH", 10.0)  # whatever is fastest, be it torch's own
    assert matrices.choose_algorithms(device, [(4096, 3072, 3072), (4096, 6144, 3072)], precision) == 2  # fmt: skip
    known = matrices.known_algorithms(device, precision)
    for outputs, inputs in known:
        weight = torch.randn(outputs, inputs, device=device).bfloat16()
        own = Fp8.of(weight, quantise) if precision == "fp8" else Plain(weight)
        by_it = dataclasses.replace(own, known=known)
        for count in (4096, 5000):
            x = torch.randn(count, inputs, device=device).bfloat16()
            given = quantise(x) if precision == "fp8" else x
            found, expected = by_it(given), own(given)
            torch.testing.assert_close(found, expected, rtol=0.01, atol=0.5)
            assert count != 4096 or torch.equal(found, expected)
