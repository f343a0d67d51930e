"""Whatever follows in a stream comes after what another thread makes."""

import threading

import pytest
import torch

from ark.toolkit import late
from ark.toolkit.late import Late

CPU = torch.device("cpu")


def test_without_a_stream_who_asks_waits_and_hears_of_errors():
    jobs, go, made = Late("test"), threading.Event(), []
    coming = jobs.begin(lambda: go.wait(20) and made.append(1))
    threading.Timer(0.1, go.set).start()
    coming.precede(CPU)
    assert made == [1]
    failing = jobs.begin(lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        failing.precede(CPU)
    jobs.begin(lambda: made.append(2))
    jobs.settle()
    assert made == [1, 2]


@pytest.mark.gpu
@pytest.mark.parametrize("driver", [True, False])
def test_on_a_gpu_the_stream_waits(monkeypatch, driver):
    if not driver:
        monkeypatch.setattr(late, "_wait", lambda: None)
    jobs, device = Late("test"), torch.device("cuda")
    torch.cuda.init()
    there = torch.zeros(4, pin_memory=True)
    jobs.begin(lambda: None).result()
    jobs._begun = late.TURNS - 3  # the largest number is passed on the way
    jobs._done.fill_(-3)
    for turn in range(6):
        go = threading.Event()

        def make(go=go, value=turn + 1.0):
            assert go.wait(20)  # else it was waited for before all that follows was asked for
            there.fill_(value)

        if not driver:
            threading.Timer(0.1, go.set).start()
        coming = jobs.begin(make)
        coming.precede(device)
        found = there.to(device, non_blocking=True)
        go.set()  # all that follows has been asked for
        assert found.tolist() == [turn + 1.0] * 4
        coming.result()
    with pytest.raises(ZeroDivisionError):  # and it does not wait for ever
        failing = jobs.begin(lambda: 1 / 0)
        failing.precede(device)
        torch.cuda.synchronize()
        failing.result()
