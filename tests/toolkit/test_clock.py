"""The clock of a run's steps, and the arithmetic in one."""

import math

import torch

from ark.toolkit.clock import StepClock, step_flop


def test_step_flop_of_klein_4b_at_1024():
    # 5 double and 20 single blocks of 3072 over 4096 + 512 tokens: matrices 28.26e12 and attention 6.52e12
    assert math.isclose(step_flop(3072, 25, 4608), 28.26e12 + 6.52e12, rel_tol=1e-3)


def test_a_step_lasts_from_mark_to_mark():
    clock = StepClock(torch.device("cpu"))
    assert clock.step_ms() is None
    clock.mark(0, None, None, 4)
    assert clock.step_ms() is None
    clock.mark()
    assert clock.step_ms() >= 0
