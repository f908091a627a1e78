"""Waits say what they wait for, and end."""

import re
import time
from concurrent.futures import Future

from fastvideo.io.waiting import WaitedTooLong, result_of, waiting

import pytest


def test_a_long_wait_is_reported_ever_more_rarely_and_a_short_one_is_not(capsys):
    with waiting("nothing"):
        pass
    with waiting("the other processes", first=0.1):
        deadline = time.monotonic() + 20
        text = ""
        while text.count("\n") < 3 and time.monotonic() < deadline:
            time.sleep(0.05)
            text += capsys.readouterr().err
    pattern = r"rank 0: waiting for the other processes since \d\d:\d\d:\d\d, (\d+) seconds"
    assert re.findall(pattern, text)[:3] == ["0", "0", "0"] and "nothing" not in text


def test_a_result_that_does_not_come_is_an_error_that_names_it():
    with pytest.raises(WaitedTooLong, match="the moon did not come within 0.1 seconds"):
        result_of(Future(), "the moon", 0.1)


def test_the_error_of_the_work_itself_is_not_taken_for_a_wait():
    future = Future()
    future.set_exception(TimeoutError("the server's own"))
    with pytest.raises(TimeoutError, match="the server's own") as error:
        result_of(future, "the server", 5)
    assert not isinstance(error.value, WaitedTooLong)
