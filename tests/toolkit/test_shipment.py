"""Weights sent ahead arrive under the names given, whatever the way."""

import threading

import pytest
import torch
from safetensors.torch import save_file

from ark.toolkit import ahead
from ark.toolkit.errors import TransferFailed
from ark.toolkit.igniter import open_model
from ark.toolkit.shipment import Shipment

CPU = torch.device("cpu")


@pytest.fixture(params=[0, None], ids=["mapped", "read"])
def opened(request, tmp_path):
    torch.manual_seed(0)
    weights = {f"w{i}": torch.randn(33 + i, 7).to(torch.bfloat16) for i in range(20)}
    save_file({**weights, "scale": torch.tensor(2.0)}, tmp_path / "m.safetensors")
    return open_model(tmp_path / "m.safetensors", request.param)


@pytest.fixture
def fast(monkeypatch):
    """Copies to the CPU travel as those to a GPU."""
    monkeypatch.setattr(Shipment, "fast_devices", ("cpu",))


def test_to_a_cpu_nothing_travels(opened):
    made = Shipment(opened, opened.tensors, CPU).arrive()
    assert all(made[name] is tensor for name, tensor in opened.tensors.items())


def test_some_tensors_under_other_names_in_one_buffer(opened, fast):
    wanted = {f"x.{name}": t for name, t in opened.tensors.items() if name not in ("w3", "w4")}
    wanted["computed"] = torch.ones(3)  # of no file
    sent, seen = Shipment(opened, wanted, CPU), []
    made = sent.arrive(seen.append)
    assert made.keys() == wanted.keys()
    assert all(torch.equal(made[name], tensor) for name, tensor in wanted.items())
    stores = {made[name].untyped_storage().data_ptr() for name in made if name != "computed"}
    assert len(stores) == 1 and made["x.w0"].data_ptr() != wanted["x.w0"].data_ptr()
    assert sent.reports[0].nbytes > 0 and seen[-1] >= sum(t.nbytes for t in wanted.values()) - 12


def test_torch_copies_what_no_path_could(opened, fast, monkeypatch, caplog):
    def fail(*args):
        raise TransferFailed("no way")

    monkeypatch.setattr("ark.toolkit.ahead.transfer", fail)
    made = Shipment(opened, opened.tensors, CPU).arrive()
    assert all(torch.equal(made[name], tensor) for name, tensor in opened.tensors.items())
    assert "no way" in caplog.text


def test_the_users_interrupt_ends_the_waiting(opened, fast):
    def stop(moved):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Shipment(opened, opened.tensors, CPU).arrive(stop)


def test_what_is_given_up_in_the_queue_never_leaves(opened, fast):
    begin = threading.Event()
    ahead._queue.submit(begin.wait)
    shipment = Shipment(opened, opened.tensors, CPU)
    shipment.cancel()
    begin.set()
    ahead.settle()
    assert shipment.moved == 0
