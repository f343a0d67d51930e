"""Layout and transfer: the bytes on the device are the bytes of the file, by every path that runs here."""

import json
import os
import re
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from ark.toolkit import storage
from ark.toolkit.errors import ModelFileError, TransferFailed
from ark.toolkit.header import TensorEntry, read_header
from ark.toolkit.layout import ALIGNMENT, KEEP, plan_layout
from ark.toolkit.paths import PATHS, mmap_pin, pump, stream
from ark.toolkit.rates import known_rates, remember_rate
from ark.toolkit.storage import Storage, probe_storage
from ark.toolkit.transfer import ranked_paths, transfer

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
    monkeypatch.setattr(pump, "PIECE", 4096)  # many pieces, so that threads and slots take turns
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
    storage = probe_storage(model)
    if reason := PATHS[name].unavailable(model, device, storage):
        assert len(reason) > 10
        return
    layout = plan_layout({key: model.entries[key] for key in ("half", "fp8")})
    for _ in range(2):  # the second time from what the first one left pinned
        flat = torch.zeros(layout.nbytes, dtype=torch.uint8, device=device)
        PATHS[name].copy(model, layout, flat, storage, lambda nbytes: None)
        for key, view in layout.views(flat).items():
            assert same(view, tensors[key])


def test_a_failed_path_is_named_in_the_report(file, monkeypatch):
    model, _ = file

    def fail(*_):
        raise TransferFailed("the moon is full")

    broken = replace(PATHS["stream"], name="broken", expected=1.0, copy=fail)
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

    monkeypatch.setattr(pump, "PIECE", 4096)
    if moment == "before":
        change()
    if moment == "after":
        copy = PATHS["stream"].copy
        path = replace(PATHS["stream"], copy=lambda *a: (copy(*a), change()))
        monkeypatch.setattr("ark.toolkit.transfer.PATHS", {"stream": path})
    advance = change if moment == "while" else lambda nbytes: None
    with pytest.raises(ModelFileError, match="model.safetensors (was changed|ended at byte)"):
        transfer(model, plan_layout(model.entries), CPU, advance)


WARM, COLD, NETWORK = (
    Storage("ext4", "8:1", False, 1.0),
    Storage("ext4", "8:1", False, 0.1),
    Storage("nfs4", "0:50", True, None),
)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ARK_CACHE_DIR", str(tmp_path / "cache"))


def test_paths_are_ranked_by_what_was_measured(file, monkeypatch):
    model, _ = file
    layout = plan_layout(model.entries)

    def order(storage):
        return [path.name for path, _ in ranked_paths(model, layout, CPU, storage, 50e9)]

    assert order(WARM) == ["mmap_pin", "stream"]
    remember_rate(
        CPU, WARM, "mmap_pin", 10**10, 1.0
    )  # 10 GB/s where 37 were promised: pinning is slow here
    assert order(WARM) == ["stream", "mmap_pin"]
    assert order(COLD) == ["mmap_pin", "stream"]  # another state of the file, another memory
    remember_rate(CPU, WARM, "stream", 10**10, 2.0)  # worse still
    assert order(WARM) == ["mmap_pin", "stream"]
    [(_, why), _] = ranked_paths(model, layout, CPU, WARM, None)
    assert "10.0 GB/s when last measured here" in why
    remember_rate(CPU, WARM, "stream", 1000, 1e-9)  # too small to say anything
    assert known_rates(CPU, WARM)["stream"] == 5e9
    remember_rate(CPU, WARM, "stream", 10**10, 0.1)
    assert known_rates(CPU, WARM)["stream"] == 52.5e9  # the mean with what was known
    assert order(WARM) == ["stream", "mmap_pin"]
    remember_rate(CPU, WARM, "mmap_pin", 10**11, 1.0)  # 55 GB/s in the mean
    remember_rate(CPU, WARM, "stream", 95 * 10**9, 1.0)  # 73.75: faster, but once only
    assert order(WARM) == ["mmap_pin", "stream"]
    remember_rate(CPU, WARM, "stream", 10**12, 1.0)
    assert order(WARM) == ["stream", "mmap_pin"]
    mapping = mmap_pin.PinnedMapping(model)
    mapping.windows.add(0)  # as if pinned
    monkeypatch.setitem(mmap_pin._pinned, model.identity, mapping)
    assert order(WARM) == [
        "mmap_pin",
        "stream",
    ]  # what is pinned already has only the link to wait for


def test_an_error_of_reading_lets_the_next_path_try(file, monkeypatch):
    def fail(*_):
        raise OSError(22, "Invalid argument")

    model, tensors = file
    broken = replace(PATHS["stream"], name="broken", copy=fail, expected=1.0)
    monkeypatch.setattr("ark.toolkit.transfer.PATHS", {"broken": broken, "stream": PATHS["stream"]})
    layout = plan_layout(model.entries)
    flat, report = transfer(model, layout, CPU)
    assert report.path == "stream" and "not broken: [Errno 22]" in report.why
    assert all(same(view, tensors[name]) for name, view in layout.views(flat).items())


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "3", '{"cpu from 8:1 warm": 4}', '{"cpu from 8:1 warm": {"stream": "x"}}'],
)
def test_a_damaged_memory_is_forgotten(tmp_path, text: str):
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "transfer_rates.json").write_text(text)
    assert known_rates(CPU, WARM) == {}
    remember_rate(CPU, WARM, "stream", 10**10, 10.0)
    assert known_rates(CPU, WARM) == {"stream": 1e9}
    assert json.loads((tmp_path / "cache" / "transfer_rates.json").read_text())


def test_a_memory_that_cannot_be_written_costs_nothing(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ARK_CACHE_DIR", str(tmp_path / "file"))
    remember_rate(CPU, WARM, "stream", 10**10, 10.0)
    assert known_rates(CPU, WARM) == {}


@pytest.mark.parametrize(
    ("storage", "reason"), [(NETWORK, "network drive .nfs4."), (COLD, "only 10%")]
)
def test_mapping_is_passed_over_where_it_is_slow(file, storage, reason, monkeypatch):
    model, _ = file
    monkeypatch.setattr(torch.version, "cuda", "13.0")  # the decision is the same on a CPU build
    assert re.search(reason, mmap_pin.unavailable(model, torch.device("cuda"), storage))


def test_what_is_forgotten_during_a_load_is_unpinned_after_it(monkeypatch):
    class Mapping:
        closed = False

        def close(self):
            self.closed = True

    first, second = Mapping(), Mapping()
    monkeypatch.setattr(mmap_pin, "_pinned", {(1,): first, (2,): second})
    for identity in ((1,), (1,), (2,)):
        mmap_pin.hold(identity)
    mmap_pin.forget((1,))
    assert not first.closed  # another model needs it
    mmap_pin.forget((1,))
    assert first.closed
    with mmap_pin._lock:  # as the loading thread holds it when the garbage collector comes by
        mmap_pin.forget((2,))
        assert not second.closed
        mmap_pin._settle()
    assert second.closed and not mmap_pin._news


def test_what_may_be_pinned_is_limited(monkeypatch, caplog):
    assert mmap_pin.pin_limit() > 1 << 30
    monkeypatch.setenv("ARK_PIN_LIMIT_GB", "1.5")
    assert mmap_pin.pin_limit() == 1_500_000_000
    for nonsense in ("much", "inf"):
        monkeypatch.setenv("ARK_PIN_LIMIT_GB", nonsense)
        assert mmap_pin.pin_limit() > 1 << 30
        assert f"ARK_PIN_LIMIT_GB={nonsense} is not a number" in caplog.text
    monkeypatch.setattr(mmap_pin, "_forbidden", True)
    assert mmap_pin.pin_limit() == 0


def test_a_container_has_less_memory_than_the_machine(monkeypatch):
    machine, real = storage.total_memory(), storage.Path.read_text
    assert machine > 1 << 30

    def read_text(path, **kwargs):
        if str(path) == "/sys/fs/cgroup/memory.max":
            return "1000000000\n"
        return real(path, **kwargs)

    monkeypatch.setattr(storage.Path, "read_text", read_text)
    assert storage.total_memory() == 1_000_000_000


@pytest.fixture
def own_ring(monkeypatch):
    """No slots of other loads; those of this one are unpinned, as CUDA must not keep what is unmapped next."""
    ring: list[torch.Tensor] = []
    monkeypatch.setattr(pump, "_ring", ring)
    yield
    for slot in ring:
        pump.unregister(slot.data_ptr())


@pytest.mark.usefixtures("own_ring")
@pytest.mark.parametrize("device", DEVICES)
def test_cold_file_past_the_page_cache(file, device, monkeypatch):
    model, tensors = file
    monkeypatch.setattr(pump, "PIECE", 40960)
    monkeypatch.setattr(stream, "available_memory", lambda: model.size)
    assert stream.past_the_cache(model, COLD)
    assert not stream.past_the_cache(model, WARM) and not stream.past_the_cache(model, NETWORK)
    layout = plan_layout(model.entries)
    flat = torch.zeros(layout.nbytes, dtype=torch.uint8, device=device)
    stream.copy(model, layout, flat, COLD, lambda nbytes: None)
    assert all(same(view, tensors[name]) for name, view in layout.views(flat).items())
    monkeypatch.setattr(stream, "available_memory", lambda: 10 * model.size)
    assert not stream.past_the_cache(model, COLD)
    stream.copy(model, layout, flat.zero_(), COLD, lambda nbytes: None)  # through the page cache
    assert all(same(view, tensors[name]) for name, view in layout.views(flat).items())


def test_storage_of_a_file_just_written(file):
    model, _ = file
    storage = probe_storage(model)
    assert storage.warm and not storage.network
    assert storage.device.count(":") == 1


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
