"""Trains like train_grpo_flux.py and writes, on the first process, how often each collective ran, into argument 1."""

import json
import os
import sys
from collections import Counter

from fastvideo import train_grpo_flux

from torch.utils._python_dispatch import TorchDispatchMode


class Collectives(TorchDispatchMode):
    """Counts what is handed to torch.distributed."""

    counts: Counter = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace in ("c10d", "_c10d_functional"):
            self.counts[function.overloadpacket.__name__] += 1
        return function(*args, **(kwargs or {}))


with Collectives() as collectives:
    train_grpo_flux.main(sys.argv[2:])
if os.environ["RANK"] == "0":
    with open(sys.argv[1], "w") as file:
        json.dump(collectives.counts, file)
