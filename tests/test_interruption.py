import os
import signal
import time

import pytest

from bimamba_lit import interruption as module
from bimamba_lit.interruption import Interrupted, interruption

NUMBERS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


@pytest.mark.parametrize("number", NUMBERS)
def test_while_nothing_waits_a_signal_stops_at_once(number):
    before = [signal.getsignal(one) for one in NUMBERS]
    with interruption.watched():
        with pytest.raises(Interrupted):
            signal.raise_signal(number)
        assert interruption.asked == number
    assert interruption.asked is None
    assert [signal.getsignal(one) for one in NUMBERS] == before


def test_where_training_looks_for_it_a_signal_only_asks(capfd):
    with interruption.watched():
        interruption.waits = True
        signal.raise_signal(signal.SIGTERM)
        assert interruption.asked == signal.SIGTERM
        signal.raise_signal(signal.SIGTERM)  # the same once more, as `timeout` does
    assert capfd.readouterr().err == "bimamba: SIGTERM: stopping after this step; once more stops at once\n"


def test_another_one_later_ends_the_process(monkeypatch):
    ended = []
    monkeypatch.setattr(module.os, "_exit", ended.append)
    monkeypatch.setattr(module, "_SAME", 0.01)
    with interruption.watched():
        interruption.waits = True
        signal.raise_signal(signal.SIGINT)
        time.sleep(0.02)
        signal.raise_signal(signal.SIGTERM)
    assert ended == [75]


@pytest.mark.parametrize("number", NUMBERS)
def test_once_the_run_has_stopped_a_signal_changes_nothing(number):
    before = [signal.getsignal(one) for one in NUMBERS]
    try:
        with pytest.raises(SystemExit) as exited, interruption.watched():
            interruption.end()
        signal.raise_signal(number)
        assert exited.value.code == 75
    finally:
        for one, handler in zip(NUMBERS, before, strict=True):
            signal.signal(one, handler)


@pytest.mark.filterwarnings("ignore:This process.*is multi-threaded:DeprecationWarning")
def test_a_process_forked_off_has_the_usual_handlers():
    with interruption.watched():
        pid = os.fork()
        if pid == 0:
            signal.raise_signal(signal.SIGTERM)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGTERM


def test_an_error_among_its_own_causes_is_looked_at_once():
    first, second = OSError("first"), OSError("second")
    first.__cause__, second.__context__ = second, first  # as where an error is kept and raised again
    assert interruption.stopped(first) is None
    second.__cause__ = stop = Interrupted(3)
    assert interruption.stopped(first) is stop
