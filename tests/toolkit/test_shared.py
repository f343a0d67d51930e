"""What several want lasts as long as any of them does."""

import contextlib
import sys

import pytest

from ark.toolkit.shared import TURN, short_turns


@pytest.mark.parametrize("first_leaves_first", [True, False])
def test_until_the_last_one_leaves(first_leaves_first):
    before = sys.getswitchinterval()
    asked = [contextlib.ExitStack() for _ in range(2)]
    for stack in asked:
        stack.enter_context(short_turns)
    one, other = asked if first_leaves_first else reversed(asked)
    one.close()
    assert sys.getswitchinterval() == pytest.approx(TURN)
    other.close()
    assert sys.getswitchinterval() == before
