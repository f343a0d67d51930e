"""A signal to end is taken down and raised where it does no harm."""

import os
import signal

import pytest

from ark.toolkit.stop import Stop

pytestmark = pytest.mark.skipif(os.name != "posix", reason="sends signals")


@pytest.fixture(autouse=True)
def usual():
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_the_first_waits_for_the_next_step_and_the_second_does_not():
    said = []
    with Stop(lambda: said.append(1)) as stop:
        stop.check()
        os.kill(os.getpid(), signal.SIGINT)
        assert said == [1]
        with pytest.raises(KeyboardInterrupt):
            stop.check()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_request_to_terminate_has_its_own_code():
    with Stop() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(SystemExit) as ended:
            stop.check()
    assert ended.value.code == 128 + signal.SIGTERM


def test_what_was_ignored_stays_ignored():
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with Stop() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        stop.check()


def test_a_terminal_that_is_gone_does_no_harm():
    def say():
        raise OSError(5, "Input/output error")

    with Stop(say) as stop:
        os.kill(os.getpid(), signal.SIGHUP)
        with pytest.raises(SystemExit):
            stop.check()
