"""Numbers that a device draws are those that torch draws on a CPU."""

import pytest
import torch

from ark.toolkit.mersenne import DEGREE, CpuRandn, exponents


@pytest.mark.parametrize("distance", [0, 1, 623, DEGREE - 1])
def test_a_word_among_the_first_is_itself(distance):
    assert exponents(distance) == [distance]


@pytest.mark.parametrize("distance", [DEGREE, 131040, 500000])
def test_a_later_word_is_the_sum_of_some_of_the_first(distance):
    places = exponents(distance)
    assert places == sorted(set(places)) and 0 <= places[0] and places[-1] < DEGREE
    words = torch.empty(distance + 2, dtype=torch.int64)
    words.random_(0, 1 << 31, generator=torch.Generator().manual_seed(3))
    for late in (0, 1):
        for bit in (0, 17, 30):
            bits = words[late:] >> bit & 1
            assert bits[torch.tensor(places)].sum() % 2 == bits[distance]


@pytest.mark.parametrize(("count", "parts"), [(131072, 2), (524288, 16), (5120, 8), (624, 1)])
@pytest.mark.parametrize("seed", [0, 2**63 + 11, 2**64 - 1])
def test_the_numbers_are_torchs_own(count, parts, seed):
    drawing = CpuRandn(count, parts, torch.device("cpu"))
    for each in (seed, 1, seed):
        expected = torch.randn(count, generator=torch.Generator().manual_seed(each))
        with torch.inference_mode(each == 1):
            found = drawing.randn(each)
        if "AVX" in torch.backends.cpu.get_cpu_capability():
            assert torch.equal(found, expected)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("count", "parts"), [(16, 1), (608, 1), (1232, 2), (1001, 1), (2560, 5)])
def test_what_cannot_be_drawn_in_parts_is_refused(count, parts):
    with pytest.raises(ValueError, match="cannot be drawn"):
        CpuRandn(count, parts, torch.device("cpu"))
