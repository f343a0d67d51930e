"""The clock of a run's steps, and the arithmetic in one."""

import math

import pytest
import torch

from ark.toolkit.clock import Pace, StepClock, step_flop


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


class Event:
    """A CUDA event that notes what is done with it."""

    log: list = []  # noqa: RUF012 (one for all, as a device has)

    def __init__(self, **options):
        self.number = len([kind for kind, _ in self.log if kind == "made"])
        self.log.append(("made", self.number))

    def record(self, stream):
        self.log.append(("recorded", self.number))

    def synchronize(self):
        self.log.append(("waited", self.number))


def test_no_more_than_one_step_is_asked_for_ahead(monkeypatch):
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    monkeypatch.setattr(Event, "log", [])
    pace = Pace(torch.device("cuda", 0))
    for _ in range(3):
        pace.step()
    waits = [number for kind, number in Event.log if kind == "waited"]
    assert waits == [0, 1]
    # the end of a step is noted before the one before it is waited for
    assert Event.log.index(("recorded", 1)) < Event.log.index(("waited", 0))


@pytest.mark.gpu
def test_an_interrupt_does_not_come_too_late():
    device = torch.device("cuda", 0)
    x, pace = torch.randn(4096, 4096, device=device), Pace(device)
    stream = torch.cuda.current_stream(device)
    asked = []
    for _ in range(4):
        for _ in range(20):
            x = (x @ x).clamp(-1, 1)
        asked.append(torch.cuda.Event())
        asked[-1].record(stream)
        pace.step()
        assert all(event.query() for event in asked[:-1])
