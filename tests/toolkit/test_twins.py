"""Pairs of tensors on both sides: found while they are the same, and no longer."""

import gc

import pytest
import torch

from ark.toolkit.twins import LEAST, MOST, Twins

THERE = torch.device("meta")  # has a place and no numbers, as far as this goes a GPU


def pair(nbytes: int = LEAST) -> tuple[torch.Tensor, torch.Tensor]:
    here = torch.zeros(nbytes // 4)
    return here, torch.empty_like(here, device=THERE)


def test_a_twin_is_found_on_its_device_only():
    twins = Twins()
    here, there = pair()
    twins.remember(here, there)
    assert twins.find(here, THERE) is there
    assert twins.find(here, torch.device("cpu")) is None
    assert twins.find(here.clone(), THERE) is None and twins.find(here[:], THERE) is None


@pytest.mark.parametrize("inference", [False, True])
def test_who_was_written_to_has_none(inference):
    twins = Twins()
    here, there = pair()
    twins.remember(here, there)
    with torch.inference_mode(inference):
        here.view(2, -1)[0, 0] = 1.0
        assert twins.find(here, THERE) is None
        twins.remember(here, there)
        assert twins.find(here, THERE) is there


def test_what_nobody_counts_writes_of_is_not_kept():
    twins = Twins()
    with torch.inference_mode():
        here, there = pair()
        twins.remember(here, there)
        assert twins.find(here, THERE) is None and not twins._known


def test_it_goes_with_the_one_on_the_cpu():
    twins = Twins()
    here, there = pair()
    twins.remember(here, there)
    twins.remember(here, there)  # a second time, and it is still one
    assert len(twins._known) == 1
    del here
    gc.collect()
    assert not twins._known


def test_what_is_kept_is_bounded_the_oldest_go_first():
    twins = Twins()
    pairs = [pair(MOST // 4) for _ in range(5)] + [pair(LEAST - 4), pair(MOST + 4)]
    for here, there in pairs:
        twins.remember(here, there)
    kept = [twins.find(here, THERE) is not None for here, _ in pairs]
    assert kept == [False, True, True, True, True, False, False]
