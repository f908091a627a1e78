"""Trains like train_grpo_flux.py, once per list of flags in the JSON file that is argument 1. The first process writes
the number of calls of each collective, per run, to the file that is argument 2.
"""

import json
import os
import sys
from collections import Counter
from pathlib import Path

from fastvideo import train_grpo_flux

from conftest import forget_accelerator
from torch.utils._python_dispatch import TorchDispatchMode


class Collectives(TorchDispatchMode):
    """Counts the calls of torch.distributed."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace in ("c10d", "_c10d_functional"):
            self.counts[function.overloadpacket.__name__] += 1
        return function(*args, **(kwargs or {}))


found = []
for argv in json.loads(Path(sys.argv[1]).read_text()):
    forget_accelerator()
    with Collectives() as collectives:
        train_grpo_flux.main(argv)
    found.append(collectives.counts)
if os.environ["RANK"] == "0":
    Path(sys.argv[2]).write_text(json.dumps(found))
