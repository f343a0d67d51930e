"""What the device's matrices can do, measured once and never before the first image."""

import pytest
import torch

from ark.toolkit import floor


@pytest.fixture(autouse=True)
def a_fresh_process(monkeypatch):
    monkeypatch.setattr(floor, "_asked", set())
    floor._measured.cache_clear()


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "fp8"])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_it_is_measured_once_and_not_at_the_first_call(device, precision):
    device = torch.device(device)
    if device.type == "cuda" and precision == "fp8" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("this GPU has no fp8")
    state = torch.random.get_rng_state()
    assert floor.matrix_rate(device, precision) is None
    rate = floor.matrix_rate(device, precision)
    assert rate > 1e6
    assert floor.matrix_rate(device, precision) == rate
    assert torch.equal(torch.random.get_rng_state(), state)


def test_a_device_that_nothing_is_known_of_has_none():
    assert [floor.matrix_rate(torch.device("meta"), "float32") for _ in range(2)] == [None, None]
