"""Numbers that several threads draw are those that torch draws."""

import pytest
import torch

from ark.toolkit.mersenne import DEGREE, JumpAhead, exponents


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


@pytest.mark.parametrize(("count", "parts"), [(131072, 2), (524288, 8), (2560, 8), (640, 2)])
@pytest.mark.parametrize("seed", [0, 2**63 + 11, 2**64 - 1])
def test_the_numbers_are_torchs_own(count, parts, seed):
    given = torch.empty(1, 16, count // 16)
    generator = JumpAhead(count, parts, torch.device("cpu")).randn(seed, given)
    one = torch.Generator().manual_seed(seed)
    assert torch.equal(given, torch.randn(given.shape, generator=one))
    # and so is what comes after them
    assert torch.equal(generator.get_state(), one.get_state())
    assert torch.equal(torch.randn(99, generator=generator), torch.randn(99, generator=one))


def test_it_draws_again_and_into_what_is_of_inference_mode():
    drawing = JumpAhead(131072, 3, torch.device("cpu"))
    with torch.inference_mode():
        given = [torch.empty(131072) for _ in range(2)]
        for seed, out in enumerate(given):
            drawing.randn(seed, out)
    for seed, out in enumerate(given):
        assert torch.equal(out, torch.randn(131072, generator=torch.Generator().manual_seed(seed)))


@pytest.mark.parametrize(("count", "parts"), [(16, 2), (624, 2), (1256, 3), (1001, 2), (2560, 1)])
def test_what_cannot_be_drawn_in_parts_is_refused(count, parts):
    with pytest.raises(ValueError, match="cannot be drawn"):
        JumpAhead(count, parts, torch.device("cpu"))
