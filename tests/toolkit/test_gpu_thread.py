"""What is done in the GPU's thread is done as if it were done by who asked."""

import gc
import threading
import time
import weakref

import pytest
import torch

from ark.toolkit import gpu_thread
from ark.toolkit.gpu_thread import run_there, submit

CPU = torch.device("cpu")


@pytest.fixture
def there(monkeypatch):
    """The way of a GPU on a machine that may have none: what is called runs in the other thread."""
    stream = torch.cuda.current_stream if torch.cuda.is_available() else lambda device: None
    monkeypatch.setattr(torch.cuda, "current_stream", stream)
    return torch.device("cuda")


def test_on_a_cpu_nothing_changes_its_thread():
    assert run_there(threading.get_ident, device=CPU) == threading.get_ident()


def test_it_is_one_thread_that_calls_itself_directly(there):
    first = submit(threading.get_ident).result()
    assert first == run_there(threading.get_ident, device=there) != threading.get_ident()
    assert submit(lambda: run_there(threading.get_ident, device=there)).result() == first


@pytest.mark.parametrize("inference", [True, False])
@pytest.mark.parametrize("grad", [True, False])
def test_modes_come_along_and_do_not_stay(there, inference, grad):
    def modes():
        return torch.is_inference_mode_enabled(), torch.is_grad_enabled()

    with torch.set_grad_enabled(grad), torch.inference_mode(inference):
        assert run_there(modes, device=there) == modes()
    assert submit(modes).result() == (False, True)


def test_who_waits_for_it_comes_before_what_was_only_submitted(there):
    order, running, begin = [], threading.Event(), threading.Event()
    submit(lambda: running.set() or begin.wait())
    running.wait()
    last = submit(lambda: order.append("submitted"))
    caller = threading.Thread(target=run_there, args=(order.append, "called"), kwargs={"device": there})  # fmt: skip
    caller.start()
    while len(gpu_thread._waiting) < 2:
        time.sleep(0.001)
    begin.set()
    caller.join()
    last.result()
    assert order == ["called", "submitted"]


def test_an_error_comes_back_and_nothing_of_it_stays(there):
    class Thing:
        pass

    kept = []

    def fails(thing):
        kept.append(weakref.ref(thing))
        raise torch.cuda.OutOfMemoryError("no more")

    gc.disable()
    try:
        with pytest.raises(torch.cuda.OutOfMemoryError, match="no more"):
            run_there(fails, Thing(), device=there)
        assert run_there(lambda: 1, device=there) == 1
        assert kept[0]() is None  # without a collection: it may hold gigabytes
    finally:
        gc.enable()


@pytest.mark.gpu
def test_the_stream_comes_along():
    device = torch.device("cuda")
    with torch.cuda.stream(torch.cuda.Stream()) as _:
        wanted = torch.cuda.current_stream()
        assert run_there(torch.cuda.current_stream, device=device) == wanted
    assert run_there(torch.cuda.current_stream, device=device) != wanted
