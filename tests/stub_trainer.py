"""Replaces the trainer in tests that start, stop and kill processes. Imports no torch, so it starts quickly.

    stub_trainer.py --output_dir FOLDER [--fails] [--never_saves] [--ends] [--dry_run]

The process of rank 0 writes lines into metrics.jsonl. After SIGTERM or SIGINT rank 0 saves `checkpoint-{lines}-0`, and
all processes end with 128 + the signal's number, like the trainer.
    --fails        the process of rank 1 raises an error
    --never_saves  after a signal, only SIGKILL ends a process
    --ends         ends by itself after one line
    --dry_run      ends at once
"""

import os
import signal
import sys
import time
from pathlib import Path

if "--dry_run" in sys.argv:
    sys.exit()
folder, rank = Path(sys.argv[sys.argv.index("--output_dir") + 1]), int(os.environ["RANK"])
asked: list[int] = []
for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, lambda number, _: asked.append(number))
sys.stdout.write(f"rank {rank} of {os.environ['WORLD_SIZE']}\n")  # atomically, like the trainer
sys.stdout.flush()
if rank == 1 and "--fails" in sys.argv:
    raise RuntimeError("on purpose")
lines = 0
while not asked and not (lines and "--ends" in sys.argv):
    lines += 1
    if rank == 0:
        folder.mkdir(exist_ok=True)
        with open(folder / "metrics.jsonl", "a") as file:
            file.write("{}\n")
    time.sleep(0.05)
while "--never_saves" in sys.argv:
    time.sleep(1)
if rank == 0:
    (folder / f"checkpoint-{lines}-0").mkdir()
sys.exit(128 + asked[0] if asked else 0)
