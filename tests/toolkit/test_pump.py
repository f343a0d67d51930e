"""The pump: two ends of a file meet, whoever is faster, and an error ends it without a hang."""

import threading
import time

import pytest
import torch
from safetensors.torch import save_file

from ark.toolkit.errors import ModelFileError, TransferFailed
from ark.toolkit.header import read_header
from ark.toolkit.layout import Run, plan_layout
from ark.toolkit.paths import mmap_pin, pump

CUDA = pytest.param(torch.device("cuda"), id="cuda", marks=pytest.mark.gpu)
PIECE = 4096


@pytest.fixture
def file(tmp_path, monkeypatch):
    monkeypatch.setattr(pump, "PIECE", PIECE)
    tensors = {f"w{i}": torch.randint(0, 255, (5000 + i,), dtype=torch.uint8) for i in range(40)}
    save_file(tensors, tmp_path / "model.safetensors")
    return read_header(tmp_path / "model.safetensors"), tensors


class MappedOnCpu:
    """The file's bytes in two parts a run, as two windows would give them."""

    def __init__(self, file, pause: float):
        self.bytes = torch.frombuffer(bytearray(file.path.read_bytes()), dtype=torch.uint8)
        self.pause, self.taken = pause, 0

    def pinned_pieces(self, run: Run):
        time.sleep(self.pause)
        self.taken += run.nbytes
        half = run.nbytes // 2
        parts = [Run(run.source, run.target, half), Run(run.source + half, run.target + half, run.nbytes - half)]  # fmt: skip
        return [(self.bytes[part.source : part.source + part.nbytes], part) for part in parts]


@pytest.mark.parametrize("pause", [0, 0.02])
@pytest.mark.parametrize("threads", [0, 1, 3])
def test_both_ends_meet_and_nothing_is_lost_or_doubled(file, threads, pause, monkeypatch):
    monkeypatch.setattr(pump, "_take_first", lambda pieces, take=pump._take_first: take(pieces, 3 * PIECE))  # fmt: skip
    model, tensors = file
    layout = plan_layout(model.entries)
    target, moved = torch.zeros(layout.nbytes, dtype=torch.uint8), []
    mapping = MappedOnCpu(model, pause)
    pump.pump(model, layout, target, moved.append, threads=threads, mapping=mapping)
    for name, view in layout.views(target).items():
        assert torch.equal(view, tensors[name]), name
    assert sum(moved) == sum(run.nbytes for run in layout.runs)
    assert (mapping.taken == sum(moved)) == (threads == 0) or pause == 0


@pytest.mark.parametrize("error", [TransferFailed("no more"), MemoryError("none left")])
def test_an_error_on_the_way_ends_every_thread(file, error):
    model, _ = file
    layout = plan_layout(model.entries)

    class Broken(MappedOnCpu):
        def pinned_pieces(self, run):
            raise error

    before = threading.active_count()
    with pytest.raises(type(error)):
        pump.pump(model, layout, torch.zeros(layout.nbytes, dtype=torch.uint8), lambda n: None, threads=3, mapping=Broken(model, 0))  # fmt: skip
    assert threading.active_count() == before


def test_a_reader_that_fails_is_heard(file):
    model, _ = file
    layout = plan_layout(model.entries)
    with model.path.open("r+b") as handle:
        handle.truncate(model.size // 3)
    with pytest.raises(ModelFileError, match="ended at byte"):
        pump.pump(model, layout, torch.zeros(layout.nbytes, dtype=torch.uint8), lambda n: None, threads=3)  # fmt: skip


def test_a_short_file_needs_few_threads(tmp_path):
    save_file({"w": torch.arange(9)}, tmp_path / "small.safetensors")
    model = read_header(tmp_path / "small.safetensors")
    layout = plan_layout(model.entries)
    target = torch.zeros(layout.nbytes, dtype=torch.uint8)
    pump.pump(model, layout, target, lambda n: None, threads=16)
    assert torch.equal(layout.views(target)["w"], torch.arange(9))


class Pins:
    """CUDA's registrations, kept as a set of address ranges, refused where two would overlap."""

    def __init__(self, monkeypatch):
        self.ranges: dict[int, int] = {}
        monkeypatch.setattr(mmap_pin, "register", self.register)
        monkeypatch.setattr(mmap_pin, "unregister", self.ranges.pop)
        monkeypatch.setattr(mmap_pin, "unavailable", lambda *_: None)
        monkeypatch.setattr(mmap_pin, "_pinned", type(mmap_pin._pinned)())
        monkeypatch.setattr(mmap_pin, "WINDOW", 1 << 16)

    def register(self, address: int, nbytes: int, flags: int) -> None:
        assert flags == mmap_pin.READ_ONLY  # anything else hangs or fails on a read-only mapping
        for start, size in self.ranges.items():
            if start < address + nbytes and address < start + size:
                raise TransferFailed("already registered")
        self.ranges[address] = nbytes


def test_windows_and_the_whole_take_turns(file, monkeypatch):
    model, tensors = file
    pins = Pins(monkeypatch)
    layout = plan_layout(model.entries)
    mapping = mmap_pin._mapping(model)
    pieces = [piece for run in layout.runs for piece in mapping.pinned_pieces(run)]
    assert len(pins.ranges) == len(mapping.windows) > 2
    assert sum(part.nbytes for _, part in pieces) == sum(run.nbytes for run in layout.runs)
    assert mmap_pin.is_pinned(model, layout) and mmap_pin.pinned() == model.size
    flat = mmap_pin.pinned_bytes(model, torch.device("cuda"))
    assert list(pins.ranges.values()) == [-(-model.size // 4096) * 4096]  # in one piece now
    assert mmap_pin.is_pinned(model, layout)
    entry = model.entries["w7"]
    assert torch.equal(flat[entry.start : entry.start + entry.nbytes], tensors["w7"])
    mapping.pinned_pieces(layout.runs[0])  # nothing is pinned twice
    mmap_pin.forget(model.identity)
    assert not pins.ranges and mmap_pin.pinned() == 0


@pytest.mark.parametrize("needed", [True, False])
def test_what_came_another_way_is_pinned_at_leisure(file, monkeypatch, needed):
    model, _ = file
    pins = Pins(monkeypatch)
    monkeypatch.setattr(mmap_pin, "LEISURE", 0.01)
    monkeypatch.setattr(mmap_pin, "PAUSE", 0.001)
    layout = plan_layout(model.entries)
    before = threading.active_count()
    mmap_pin.pin_at_leisure(model, layout, torch.device("cuda"), lambda: needed or None)
    while threading.active_count() > before:
        time.sleep(0.01)
    assert mmap_pin.is_pinned(model, layout) == needed == bool(pins.ranges)


def test_two_files_that_do_not_fit_together_do_not_push_each_other_out(file, monkeypatch, tmp_path):
    model, tensors = file
    save_file(tensors, tmp_path / "other.safetensors")
    other = read_header(tmp_path / "other.safetensors")
    pins = Pins(monkeypatch)
    monkeypatch.setattr(mmap_pin, "LEISURE", 0.0)
    monkeypatch.setattr(mmap_pin, "PAUSE", 0.001)
    monkeypatch.setattr(mmap_pin, "pin_limit", lambda: int(1.5 * model.size))
    before = threading.active_count()
    for one in (model, other):
        mmap_pin.pin_at_leisure(one, plan_layout(one.entries), torch.device("cuda"), lambda: 1)
        while threading.active_count() > before:
            time.sleep(0.01)
    assert mmap_pin.is_pinned(model, plan_layout(model.entries))
    assert other.identity not in mmap_pin._pinned
    assert sum(pins.ranges.values()) >= model.size


@pytest.mark.parametrize("device", [CUDA])
def test_pinned_for_good(file, device):
    model, tensors = file
    layout = plan_layout(model.entries)
    target = torch.zeros(layout.nbytes, dtype=torch.uint8, device=device)
    mmap_pin.copy(model, layout, target, None, lambda n: None)
    flat = mmap_pin.pinned_bytes(model, device)
    assert flat is not None and flat.is_pinned()
    entry = model.entries["w3"]
    assert torch.equal(flat[entry.start : entry.start + entry.nbytes].to(device, non_blocking=True).cpu(), tensors["w3"])  # fmt: skip
    mmap_pin.copy(model, layout, target.zero_(), None, lambda n: None)
    assert all(torch.equal(view.cpu(), tensors[name]) for name, view in layout.views(target).items())  # fmt: skip
    mmap_pin.forget(model.identity)
    assert not flat.is_pinned()


@pytest.mark.gpu
def test_what_cuda_refuses_is_not_raised_by_a_later_kernel(caplog):
    memory, x = torch.zeros(1 << 20, dtype=torch.uint8), torch.ones(4, device="cuda")
    pump.unregister(memory.data_ptr())  # it was never pinned
    assert "would not unpin" in caplog.text and x.add_(1).sum() == 8
    pump.register(memory.data_ptr(), memory.nbytes)
    with pytest.raises(TransferFailed, match="would not pin 1 MB"):
        pump.register(memory.data_ptr(), memory.nbytes)
    assert x.add_(1).sum() == 12
    pump.unregister(memory.data_ptr())
    assert not memory.is_pinned()
