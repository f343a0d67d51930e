"""Layout and transfer: the bytes on the device are the bytes of the file, by every path that runs here."""

import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from ark.toolkit.errors import ModelFileError, TransferFailed
from ark.toolkit.header import TensorEntry, read_header
from ark.toolkit.layout import ALIGNMENT, KEEP, plan_layout
from ark.toolkit.paths import PATHS, stream
from ark.toolkit.transfer import transfer

CPU = torch.device("cpu")
DEVICES = [pytest.param(CPU, id="cpu"), pytest.param(torch.device("cuda"), id="cuda", marks=pytest.mark.gpu)]  # fmt: skip


@pytest.fixture
def file(tmp_path):
    tensors = {
        "big": torch.randn(700, 1000),
        "odd": torch.arange(7, dtype=torch.uint8),
        "half": torch.randn(300, 333).bfloat16(),
        "empty": torch.zeros(0, 4),
        "scalar": torch.tensor(2.5),
        "fp8": torch.randn(64, 3).to(torch.float8_e4m3fn),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    return read_header(tmp_path / "model.safetensors"), tensors


def same(found: torch.Tensor, expected: torch.Tensor) -> bool:
    return found.shape == expected.shape and torch.equal(
        found.cpu().view(-1).view(torch.uint8), expected.view(-1).view(torch.uint8)
    )


@pytest.mark.parametrize("device", DEVICES)
def test_every_tensor_arrives_bit_for_bit(file, device, monkeypatch):
    model, tensors = file
    monkeypatch.setattr(stream, "CHUNK", 4096)  # many pieces, so that threads and slots take turns
    moved = []
    layout = plan_layout(model.entries)
    flat, report = transfer(model, layout, device, moved.append)
    views = layout.views(flat)
    assert views.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert views[name].dtype == tensor.dtype
        assert same(views[name], tensor), name
    assert sum(moved) == sum(run.nbytes for run in layout.runs)
    assert report.path in str(report) and "GB/s" in str(report)


@pytest.mark.parametrize("name", PATHS)
@pytest.mark.parametrize("device", DEVICES)
def test_each_path_by_itself_or_its_reason(file, name, device):
    model, tensors = file
    if reason := PATHS[name].unavailable(model, device):
        assert len(reason) > 10
        return
    layout = plan_layout({key: model.entries[key] for key in ("half", "fp8")})
    for _ in range(2):  # the second time from what the first one left pinned
        flat = torch.zeros(layout.nbytes, dtype=torch.uint8, device=device)
        PATHS[name].copy(model, layout, flat, lambda nbytes: None)
        for key, view in layout.views(flat).items():
            assert same(view, tensors[key])


def test_a_failed_path_is_named_in_the_report(file, monkeypatch):
    model, _ = file

    def fail(*_):
        raise TransferFailed("the moon is full")

    broken = PATHS["stream"].__class__("broken", lambda *_: None, fail)
    monkeypatch.setattr("ark.toolkit.transfer.PATHS", {"broken": broken, **PATHS})
    _, report = transfer(model, plan_layout(model.entries), CPU)
    assert report.path == "stream" and "broken: the moon is full" in report.why
    monkeypatch.setattr("ark.toolkit.transfer.PATHS", {"broken": broken})
    with pytest.raises(TransferFailed, match="the moon is full"):
        transfer(model, plan_layout(model.entries), CPU)


@pytest.mark.parametrize("moment", ["before", "while", "after"])
@pytest.mark.parametrize("size", [0.5, 2.0], ids=["truncated", "grown"])
def test_file_that_changes_is_never_mixed(file, monkeypatch, moment: str, size: float):
    model, _ = file

    def change(*_):
        if model.path.stat().st_size == model.size:
            os.truncate(model.path, int(model.size * size))

    monkeypatch.setattr(stream, "CHUNK", 4096)
    if moment == "before":
        change()
    if moment == "after":
        copy = PATHS["stream"].copy
        path = PATHS["stream"].__class__(
            "stream", stream.unavailable, lambda *a: (copy(*a), change())
        )
        monkeypatch.setattr("ark.toolkit.transfer.PATHS", {"stream": path})
    advance = change if moment == "while" else lambda nbytes: None
    with pytest.raises(ModelFileError, match="model.safetensors (was changed|ended at byte)"):
        transfer(model, plan_layout(model.entries), CPU, advance)


lengths = st.lists(st.integers(0, 700), min_size=1, max_size=30)


@settings(max_examples=200, deadline=None)
@given(
    lengths=lengths,
    gaps=st.lists(st.booleans(), min_size=30, max_size=30),
    chunk=st.integers(1, 300),
)
def test_layout_covers_each_byte_once_and_aligned(lengths, gaps, chunk):
    position, entries = 64, {}
    for index, (length, gap) in enumerate(zip(lengths, gaps, strict=False)):
        position += 8 * gap  # a tensor in between that is not wanted
        entries[str(index)] = TensorEntry(torch.uint8, (length,), position, length)
        position += length
    layout = plan_layout(entries)
    source = torch.randint(0, 255, (position,), dtype=torch.uint8)
    flat = torch.zeros(layout.nbytes, dtype=torch.uint8)
    for run in layout.chunks(chunk):
        assert 0 < run.nbytes <= chunk
        flat[run.target : run.target + run.nbytes] = source[run.source : run.source + run.nbytes]
    for name, view in layout.views(flat).items():
        entry = entries[name]
        assert torch.equal(view, source[entry.start : entry.start + entry.nbytes])
        assert layout.offsets[name] % KEEP == 0
    assert layout.nbytes <= sum(lengths) + ALIGNMENT * len(lengths)


def test_neighbours_travel_together():
    entries = {str(i): TensorEntry(torch.bfloat16, (64,), 1000 + 128 * i, 128) for i in range(50)}
    assert len(plan_layout(entries).runs) == 1
