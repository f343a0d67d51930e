"""What was done with results is begun for the next ones, and only for those that it is done with."""

import gc
import weakref

import pytest
import torch

from ark.toolkit.foresight import KINDS, MISS, MOST, Foresight


class Taker:
    def __init__(self):
        self.asked = []

    def begin(self, result):
        self.asked.append(result)
        return f"of {result}"


@pytest.fixture
def run():
    """Make a result, and take it or not: what was begun."""
    foresight = Foresight()

    def run(taker, kind="a", number=0, taken=True, between=lambda made: None):
        foresight.begin(kind, number)
        made = foresight.made(torch.zeros(3))
        between(made)
        return foresight.take(taker, made) if taken else None

    return run


def test_from_the_second_on_it_is_begun(run):
    taker = Taker()
    assert [run(taker, number=n) for n in range(3)] == [None, "of 1", "of 2"] and taker.asked == [1, 2]  # fmt: skip
    assert run(taker, kind="b", number=3) is None and run(taker, kind="b", number=4) == "of 4"


def test_another_one_gets_nothing_of_it_and_is_asked_the_next_time(run):
    first, second = Taker(), Taker()
    assert [run(first), run(second, number=1), run(second, number=2)] == [None, None, "of 2"]


def test_a_result_that_was_written_to_is_another_one(run):
    taker = Taker()
    run(taker)
    assert run(taker, number=1, between=lambda made: made.add_(1)) is None


def test_what_is_taken_twice_is_given_once():
    foresight, taker = Foresight(), Taker()
    for number in range(2):
        foresight.begin("a", number)
        made = foresight.made(torch.zeros(3))
        found = [foresight.take(taker, made) for _ in range(2)]
    assert found == ["of 1", None]


def test_of_what_torch_does_not_count_the_writes_nothing_is_known(run):
    foresight, taker = Foresight(), Taker()
    with torch.inference_mode():
        for number in range(2):
            foresight.begin("a", number)
            made = foresight.made(torch.zeros(3))
            assert foresight.take(taker, made) is None
    assert not taker.asked


def test_results_of_which_every_other_one_is_wanted_are_left_alone(run):
    taker = Taker()
    for number in range(40):
        run(taker, number=number, taken=number % 2 == 0)
    assert len(taker.asked) < 3


def test_after_a_few_for_nothing_it_is_begun_again_when_they_are_wanted_again(run):
    taker = Taker()
    for number in range(2 * MOST):
        run(taker, number=number)
    run(taker, taken=False)
    assert run(taker, number="next") == "of next"  # one is forgiven
    for _ in range(5):
        run(taker, taken=False)
    assert run(taker) is None
    for number in range(MISS + MOST):
        found = run(taker, number=number)
    assert found == f"of {number}"


def test_nobody_is_kept_for_it(run):
    taker = Taker()
    run(taker), run(taker, taken=False)
    del taker
    gc.collect()
    assert run(Taker()) is None


def test_what_nobody_can_take_any_more_is_given_up():
    class Begun:
        pass

    class Maker:
        def begin(self, result):
            made.append(weakref.ref(begun := Begun()))
            return begun

    foresight, maker, made = Foresight(), Maker(), []
    for number in range(3):
        foresight.begin("a", number)
        result = foresight.made(torch.zeros(3))
        assert (foresight.take(maker, result) is None) == (number == 0)
    foresight.begin("a", 3)
    result = foresight.made(torch.zeros(3))
    assert made[-1]() is not None
    del result
    gc.collect()
    assert made[-1]() is None


def test_of_many_kinds_the_last_are_known(run):
    taker = Taker()
    for _ in range(2):
        run(taker, kind="first")
    for number in range(KINDS):
        run(taker, kind=number)
    assert run(taker, kind="first") is None and run(taker, kind=KINDS - 1, number=1) == "of 1"
