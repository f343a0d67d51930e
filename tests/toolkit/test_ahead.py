"""What is sent ahead arrives once, whole, in order, or not at all."""

import os
import sys

import pytest
import torch
from safetensors.torch import save_file

from ark.toolkit import ahead
from ark.toolkit.ahead import send_ahead, wait_for
from ark.toolkit.errors import ModelFileError, TransferFailed
from ark.toolkit.igniter import open_model
from ark.toolkit.shared import TURN

CPU = torch.device("cpu")


def take_ahead(opened, device):
    """The tensors that were sent ahead, when they have arrived."""
    sendings = ahead.take_ahead(opened, device)
    wait_for(sendings.values())
    return {identity: sending.arrived.result() for identity, sending in sendings.items()}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ARK_CACHE_DIR", str(tmp_path / "cache"))


@pytest.fixture
def opened(tmp_path):
    save_file({f"w{i}": torch.randn(10, i + 1) for i in range(4)}, tmp_path / "model.safetensors")
    return open_model(tmp_path / "model.safetensors", in_memory=0)


def test_wanted_tensors_arrive_once(opened):
    wanted = [opened.tensors["w1"], opened.tensors["w3"], torch.zeros(3)]  # the last is of no file
    assert send_ahead(opened, wanted, CPU) is None
    (arrived,) = take_ahead(opened, CPU).values()
    entries = opened.parts[0][0].entries
    assert arrived.keys() == {entries["w1"].start, entries["w3"].start}
    for name in ("w1", "w3"):
        assert torch.equal(arrived[entries[name].start], opened.tensors[name])
    assert take_ahead(opened, CPU) == {}


def test_a_file_that_was_read_whole_stays(tmp_path, opened):
    read = open_model(tmp_path / "model.safetensors", in_memory=1 << 30)
    send_ahead(read, read.tensors.values(), CPU)
    assert not read.ahead


def test_models_travel_in_the_order_of_opening(opened, monkeypatch):
    order = []
    real = ahead.transfer
    monkeypatch.setattr(
        ahead, "transfer", lambda *a, **k: (order.append(len(a[1].entries)), real(*a, **k))[1]
    )
    for count in (3, 1, 2):
        opened.ahead.clear()
        send_ahead(opened, list(opened.tensors.values())[:count], CPU)
    take_ahead(opened, CPU)
    assert order == [3, 1, 2]


@pytest.mark.parametrize("fails", [False, True])
def test_threads_take_short_turns_only_while_something_travels(opened, monkeypatch, fails):
    during, real, before = [], ahead.transfer, sys.getswitchinterval()

    def spy(*args):
        during.append(sys.getswitchinterval())
        if fails:
            raise TransferFailed("no path")
        return real(*args)

    monkeypatch.setattr(ahead, "transfer", spy)
    send_ahead(opened, opened.tensors.values(), CPU)
    wait_for(ahead.take_ahead(opened, CPU).values())
    assert during == [pytest.approx(TURN)]
    assert sys.getswitchinterval() == before


def test_what_nobody_takes_is_given_up(opened, monkeypatch):
    monkeypatch.setattr(ahead, "PATIENCE", 0.05)
    send_ahead(opened, opened.tensors.values(), CPU)
    for _ in range(100):
        if not opened.ahead:
            break
        ahead.threading.Event().wait(0.05)
    assert not opened.ahead


def test_a_changed_file_is_an_error(opened):
    file, _ = opened.parts[0]
    os.truncate(file.path, file.size // 2)
    send_ahead(opened, opened.tensors.values(), CPU)
    with pytest.raises(ModelFileError, match="was changed"):
        take_ahead(opened, CPU)


def test_a_failed_transfer_is_left_to_the_caller(opened, monkeypatch):
    def fail(*_, **__):
        raise TransferFailed("no path today")

    monkeypatch.setattr(ahead, "transfer", fail)
    send_ahead(opened, opened.tensors.values(), CPU)
    with pytest.raises(TransferFailed, match="no path today"):
        take_ahead(opened, CPU)


def test_who_waits_sees_the_bytes(opened):
    heard, seen = [], []
    opened.listeners.append(heard.append)
    send_ahead(opened, opened.tensors.values(), CPU)
    (sending,) = ahead.take_ahead(opened, CPU).values()
    wait_for([sending], seen.append)
    assert seen[-1] == sending.moved == sum(tensor.nbytes for tensor in opened.tensors.values())
    assert [report.file for report in heard] == ["model.safetensors"]
    assert opened.reports["model.safetensors"] is heard[0]


def test_who_waits_may_give_up(opened):
    class Interrupted(Exception):
        pass

    def stop(moved):
        raise Interrupted

    send_ahead(opened, opened.tensors.values(), CPU)
    with pytest.raises(Interrupted):
        wait_for(ahead.take_ahead(opened, CPU).values(), stop)


def test_no_room_no_sending(opened, monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1 << 30, 8 << 30))
    reason = send_ahead(opened, opened.tensors.values(), torch.device("cuda"))
    assert "1.1 GB that are free" in reason
    assert not opened.ahead
