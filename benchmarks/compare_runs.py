"""A table of runs side by side: reward, loss and gradient norm of each iteration, seconds by phase, peak GPU memory.

python benchmarks/compare_runs.py RUN/metrics.jsonl ...
"""

import argparse
import json
from pathlib import Path

COLUMNS = ("reward", "grad_norm", "loss", "ratio_first_deviation", "seconds_rollout", "seconds_train", "gib_peak")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("metrics", nargs="+", type=Path, help="metrics.jsonl of a run")
    for path in parser.parse_args().metrics:
        try:
            lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        except (OSError, ValueError) as error:
            parser.error(f"{path}: {error}")
        print(path.parent.name)
        print("  step" + "".join(f"{name:>22}" for name in COLUMNS))
        for line in lines:
            values = (line.get(name) for name in COLUMNS)
            print(f"{line['step']:6d}" + "".join(f"{'':>22}" if v is None else f"{v:22.6g}" for v in values))


if __name__ == "__main__":
    main()
