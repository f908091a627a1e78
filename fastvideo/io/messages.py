"""What a program says on stderr: once, in whole lines, without secrets, however many processes run it."""

import os
import sys
import time
import traceback
from pathlib import Path
from types import TracebackType
from typing import NoReturn

from fastvideo.io.secrets import redact

# Seconds in which the first process says why all end, before another one says it. Processes start at different speeds.
FIRST_SPEAKS = 10.0
PACKAGE = str(Path(__file__).parents[1])
_warned: set[str] = set()


def is_first() -> bool:
    """Whether this is the first process, or the only one."""
    return os.environ.get("RANK", "0") == "0"


def _write(text: str) -> None:
    """One write, because other processes may write to the same stream at this moment."""
    # In a terminal the text takes the place of the progress line, which the next iteration writes again.
    sys.stderr.write(("\r\x1b[K" if sys.stderr.isatty() else "") + redact(text))


def say(*lines: str) -> None:
    """Prints lines, on the first process only."""
    if is_first():
        _write("".join(f"{line}\n" for line in lines))


def warn(text: str) -> None:
    """Prints `warning: text` on any process, and says which one if it isn't the first. The same text only once."""
    if text not in _warned:
        _warned.add(text)
        _write(f"warning: {text}\n" if is_first() else f"rank {os.environ['RANK']}: warning: {text}\n")


def end(text: str, status: int, all_know: bool = False) -> NoReturn:
    """Ends the program with a status and its last lines.

    Of several processes the first one writes them. Then torchrun ends the others, which wait here. If the first process
    still runs, it does not know the reason: they write it. all_know: all processes end for this reason, so the others
    write nothing, and only let the first one write.
    """
    if not is_first():
        time.sleep(1 if all_know else FIRST_SPEAKS)
    if is_first() or not all_know:
        _write(text)
    raise SystemExit(status)


def shorten_interrupts() -> None:
    """Ctrl-C ends the program with one line, which says where it was, instead of a traceback."""
    sys.excepthook = _without_traceback_of_ctrl_c


def _without_traceback_of_ctrl_c(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if not issubclass(kind, KeyboardInterrupt):
        return sys.__excepthook__(kind, error, trace)
    own = [frame for frame in traceback.extract_tb(trace) if frame.filename.startswith(PACKAGE)]
    where = f", in {Path(own[-1].filename).name}, line {own[-1].lineno}" if own else ""
    say(f"{Path(sys.argv[0]).name}: stopped by Ctrl-C{where}")
