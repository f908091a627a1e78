"""torchrun whose last lines are those of the program. It takes torchrun's flags:

    python -m fastvideo.torchrun --standalone --nproc_per_node 8 fastvideo/train_grpo_flux.py --parallel fsdp ...

Where a process has said in a line why it ends, nothing follows. If a process raised an error, the traceback of the
first one that did comes last. The exit status is that of the process that failed first, 128 + n after signal n.
"""

import logging
import signal
import sys
from typing import TYPE_CHECKING

from fastvideo.io.messages import shorten_interrupts

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

# Statuses with which the programs of this package end when they have said why.
EXPLAINED = (1, 2, 128 + signal.SIGINT, 128 + signal.SIGTERM)


def describe(rank: int, failure: "ProcessFailure") -> str:
    """Why a process failed, unless the process itself has said it: then empty."""
    if isinstance(failure.message, dict):  # written by torch's `record`, see fastvideo/io/processes.py
        return f"rank {rank} failed first:\n{failure.message['extraInfo']['py_callstack'].rstrip()}\n"
    if failure.exitcode < 0:
        memory = "; Linux does this when memory runs out" if failure.exitcode == -signal.SIGKILL else ""
        return f"rank {rank} was ended first, by {failure.signal_name()}{memory}\n"
    return "" if failure.exitcode in EXPLAINED else f"rank {rank} ended first, with status {failure.exitcode}\n"


def main() -> None:
    shorten_interrupts()
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import parse_args, run

    logging.disable()  # in this process; what matters is said here
    try:
        run(parse_args(sys.argv[1:]))
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        sys.stderr.write(describe(rank, failure))
        sys.exit(failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode)
    except SignalException as error:  # it was passed on to all processes, which have ended
        sys.exit(128 + error.sigval)


if __name__ == "__main__":
    main()
