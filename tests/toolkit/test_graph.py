"""Recordings hold under both of torch's allocators, and nothing is recorded where that is not known: ComfyUI's default is not torch's."""

import json
import time
from types import SimpleNamespace

import pytest
import torch

from ark.toolkit.fused import allocator, graph
from ark.toolkit.fused.allocator import refusal
from ark.toolkit.probe import probe


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["native", "cudaMallocAsync"])
def test_what_is_recorded_gives_what_runs(backend, monkeypatch):
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", f"backend:{backend}")
    found = probe(("cuda_graph",))["cuda_graph"]
    assert found.problem is None and found.facts == {"backend": backend}


def test_what_can_no_longer_be_replayed_is_made_anew(monkeypatch):
    class Given:
        device, dtype, shape = torch.device("cuda", 0), torch.float32, (1,)

    class Fails:
        stream = SimpleNamespace(synchronize=lambda: None)

        def replay(self, inputs):
            raise RuntimeError("CUDA error: out of memory\nand more")

    monkeypatch.setattr(graph, "run_there", lambda function, *inputs, device: function(*inputs))
    monkeypatch.setattr(graph, "refusal", lambda: None)
    graphs, given = graph.Graphs(after=3), Given()
    graphs._recorded[graph._with_forms("step", (given,))] = Fails()
    assert graphs.settled("step", given) and graphs.recorded == 1
    assert graphs.run("step", lambda x: ("run", x), given) == ("run", given)
    assert graphs.recorded == 0 and graphs.why_not is None


@pytest.fixture
def default_allocator(monkeypatch, tmp_path):
    """ComfyUI's, on a machine that has none of the cards that it is for."""
    monkeypatch.setenv("ARK_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_allocator_backend", lambda: "cudaMallocAsync")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (1 << 40, 1 << 40))
    return tmp_path / "recordings.json"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there the attempt succeeds")
def test_where_the_attempt_fails_nothing_is_recorded(default_allocator):
    assert refusal() == allocator.WAIT
    end = time.monotonic() + 120
    while (found := refusal()) == allocator.WAIT and time.monotonic() < end:
        time.sleep(0.1)
    assert found.startswith("cudaMallocAsync does not allow it (") and "--disable-cuda-malloc" in found  # fmt: skip
    assert list(json.loads(default_allocator.read_text()).values()) == [found]


def test_what_was_found_out_is_remembered(default_allocator):
    for known in ("", "it does not"):
        default_allocator.write_text(json.dumps({allocator._key(): known}))
        allocator._answers.clear()
        assert refusal() == (known or None)


def test_with_little_memory_it_is_not_tried(default_allocator, monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (1 << 30, 1 << 40))
    end = time.monotonic() + 20
    while (found := refusal()) == allocator.WAIT and time.monotonic() < end:
        time.sleep(0.02)
    assert "out of memory for the attempt" in found and "--disable-cuda-malloc" in found
    assert not default_allocator.exists()  # another time there may be more


def test_what_was_begun_is_taken_once_and_by_its_own_key():
    def begun():
        return graph.Graphs().begin("step", torch.add, torch.ones(3), torch.ones(3))

    def ask(begun, key="step", first=1.0, second=1.0, shape=3):
        given = torch.full((shape,), first), torch.full((shape,), second)
        return graph.Graphs().run(key, torch.add, *given, begun=begun).tolist()

    right = begun()
    assert ask(right) == [2.0] * 3 and right.taken and right.right()
    assert ask(right, second=5.0) == [6.0] * 3 and right.right()  # not again
    for other in ({"key": "other"}, {"shape": 4}):
        left = begun()
        assert ask(left, **other) == [2.0] * other.get("shape", 3)
        assert not left.taken and left.right()
    for other in ({"first": 3.0}, {"second": 3.0}):
        wrong = begun()
        assert ask(wrong, **other) == [2.0] * 3 and wrong.taken and not wrong.right()
