"""Waits that say what they wait for, and end."""

import os
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

Result = TypeVar("Result")

FIRST_NOTE = 120.0  # seconds after which a wait is reported; then again whenever it has lasted twice as long
EXIT_GRACE = 30.0  # seconds for exit handlers and threads when a program has ended; a sixth after an error
# How long a training process waits for the others: longer than a slow reward or a slow disk makes them wait.
PATIENCE = timedelta(hours=2)


class WaitedTooLong(TimeoutError):
    """Raised by a wait that has reached its limit. The message names what did not come."""


def _say(text: str) -> None:
    sys.stderr.write(f"rank {os.environ.get('RANK', '0')}: {text}\n")


@contextmanager
def waiting(what: str, first: float = FIRST_NOTE) -> Iterator[None]:
    """While the block lasts, another thread reports what this process waits for, and since when.

    what: completes the sentence "waiting for". first: seconds until the first report.
    """
    since, done = time.strftime("%H:%M:%S"), threading.Event()

    def report() -> None:
        pause = lasted = first
        while not done.wait(pause):
            _say(f"waiting for {what} since {since}, {lasted:.0f} seconds")
            pause, lasted = lasted, 2 * lasted

    threading.Thread(target=report, name="watchdog", daemon=True).start()
    try:
        yield
    finally:
        done.set()


def result_of(future: "Future[Result]", what: str, limit: float) -> Result:
    """The future's result; reports a long wait.

    Raises:
        WaitedTooLong: after `limit` seconds.
    """
    with waiting(what):
        try:
            return future.result(limit)
        except FutureTimeout:
            if future.done():  # just now, or the work itself raised this error
                return future.result()
            raise WaitedTooLong(f"{what} did not come within {limit:g} seconds") from None


def end_within(seconds: float, status: int) -> None:
    """Ends the process with `status` if it is still there after so many seconds.

    For threads that never come back and exit handlers that wait for a network. After an error the process ends sooner
    and silently, so that the error is the last thing that is printed.
    """
    seconds = seconds / 6 if status else seconds

    def end() -> None:
        time.sleep(seconds)
        if not status:
            _say(f"threads or exit handlers did not end within {seconds:g} seconds; this process ends without them")
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)

    threading.Thread(target=end, name="end", daemon=True).start()
