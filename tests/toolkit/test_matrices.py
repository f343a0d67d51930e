"""Algorithms of cuBLASLt: the same numbers as torch's, chosen by measurement, remembered, and never needed."""

import pytest
import torch

from ark.toolkit import matrices
from ark.toolkit.fused import cublas
from ark.toolkit.fused.matrix import MANY, Plain
from ark.toolkit.fused.runner import Runner
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

    def fastest(device, shape):
        timed.append(shape)
        return bytes([len(timed)]) * 64 if shape[0] == 4096 else b""

    monkeypatch.setattr(matrices, "_fastest", fastest)
    return timed


def test_the_usual_shapes_are_kleins():
    assert matrices.usual_shapes(3072) == [
        (4096, 9216, 3072), (4096, 3072, 3072), (4096, 18432, 3072), (4096, 3072, 9216), (4608, 27648, 3072), (4608, 3072, 12288),
    ]  # fmt: skip


def test_without_a_gpu_there_is_nothing_to_choose():
    assert matrices.known_algorithms(torch.device("cpu")) == {}
    assert matrices.choose_algorithms(torch.device("cpu"), SHAPES) == 0


def test_what_was_chosen_is_remembered_and_not_timed_again(card):
    device = torch.device("cuda", 0)
    assert matrices.choose_algorithms(device, SHAPES[:1]) == 1
    assert matrices.choose_algorithms(device, SHAPES) == 1 and card == SHAPES
    assert matrices.known_algorithms(device) == {(384, 128): b"\1" * 64, (128, 512): b""}
    assert matrices.choose_algorithms(device, SHAPES) == 0 and card == SHAPES


def test_it_stops_when_the_device_is_wanted(card):
    device, calls = torch.device("cuda", 0), []
    assert matrices.choose_algorithms(device, SHAPES, lambda: calls.append(1) or len(calls) > 1) == 1  # fmt: skip
    assert list(matrices.known_algorithms(device)) == [(384, 128)]


def test_another_library_has_other_algorithms(card, monkeypatch):
    device = torch.device("cuda", 0)
    matrices.choose_algorithms(device, SHAPES)
    monkeypatch.setattr(Library, "version", 130200)
    assert matrices.known_algorithms(device) == {}


@pytest.mark.parametrize("damaged", ["[]", '{"key": 1}', "not JSON", '{"key": [[[1], "zz"]]}'])
def test_a_damaged_note_counts_for_nothing(card, tmp_path, damaged):
    key = matrices._key(CARD)
    (tmp_path / "matrices.json").write_text(damaged.replace("key", key))
    assert matrices.known_algorithms(torch.device("cuda", 0)) == {}


def test_few_rows_and_other_dtypes_are_torchs(monkeypatch):
    called = []
    monkeypatch.setattr("ark.toolkit.fused.matrix.multiply", lambda *given: called.append(given))
    matrix = Plain(torch.randn(8, 16), algorithm=b"any")
    x = torch.randn(MANY - 1, 16)
    assert torch.equal(matrix(x), x @ matrix.weight.t()) and not called
    matrix.part(2, 6)(torch.randn(MANY, 16))
    algorithm, _, weight, out = called[0]
    assert algorithm == b"any" and torch.equal(weight, matrix.weight[2:6]) and out is None
    runner = Runner(torch.device("cpu"), "bf16")
    runner._algorithms = {(8, 16): b"any"}
    weight = torch.randn(8, 16)
    assert runner.matrix(torch.empty(0), weight).algorithm == b""
    half = weight.bfloat16()
    assert runner.matrix(torch.empty(0, dtype=torch.bfloat16), half).algorithm == b"any"


def test_why_the_library_cannot_be_called_is_said():
    if torch.version.cuda is None:
        assert cublas.library() == "this torch has no CUDA"
        with pytest.raises(RuntimeError, match="no CUDA"):
            cublas.Product((1, 1, 1), (1, 1, 1), (1, 1, 1))


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(4096, 512, 256), (4608, 384, 1024), (777, 520, 264)])
@pytest.mark.parametrize("apart", [0, 64])
def test_every_algorithm_that_is_offered_multiplies(shape, apart, monkeypatch):
    count, outputs, inputs = shape

    def made(rows: int, columns: int) -> torch.Tensor:
        return torch.randn(rows, columns + apart, device="cuda").bfloat16()[:, :columns]

    x, weight, out = made(count, inputs), made(outputs, inputs), made(count, outputs)
    expected = x.double() @ weight.double().t()
    product = cublas.Product(*map(cublas.form_of, (x, weight, out)))
    offered = product.offered(x.device)
    assert offered
    # what falls back to torch's choice would fail
    monkeypatch.setattr(torch, "mm", None)
    for algorithm in offered:
        out.fill_(float("nan"))
        assert cublas.multiply(algorithm, x, weight, out) is out
        assert (out.double() - expected).norm() < 4e-3 * expected.norm()
        assert torch.equal(cublas.multiply(algorithm, x, weight), out)


@pytest.mark.gpu
def test_what_an_algorithm_cannot_do_is_torchs():
    x, weight = (torch.randn(4096, 256, device="cuda").bfloat16() for _ in "xw")
    product = cublas.Product(*map(cublas.form_of, (x, weight, x.new_empty(4096, 4096))))
    algorithm = product.offered(x.device)[0]
    odd, narrow = x[:, :250], weight[:, :250]  # lines that begin where no vector may
    odd, narrow = (m.contiguous()[:, 1:] for m in (odd, narrow))
    assert torch.equal(cublas.multiply(algorithm, odd, narrow), odd @ narrow.t())
    turned = x.t().contiguous().t()
    assert torch.equal(cublas.multiply(algorithm, turned, weight), turned @ weight.t())


@pytest.mark.gpu
def test_choosing_changes_no_number(monkeypatch, tmp_path):
    monkeypatch.setenv("ARK_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(matrices, "HEAT", 0.01)
    monkeypatch.setattr(matrices, "SLICE", 0.002)
    monkeypatch.setattr(matrices, "WORTH", 10.0)  # whatever is fastest, be it torch's own
    device = torch.device("cuda", 0)
    shapes = [(4096, 3072, 3072), (4096, 6144, 3072)]
    assert matrices.choose_algorithms(device, shapes) == 2
    for (outputs, inputs), algorithm in matrices.known_algorithms(device).items():
        weight = torch.randn(outputs, inputs, device=device).bfloat16()
        x = torch.randn(5000, inputs, device=device).bfloat16()
        close = torch.testing.assert_close
        close(Plain(weight, algorithm=algorithm)(x), Plain(weight)(x), rtol=0.01, atol=0.5)
