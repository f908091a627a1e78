"""One name for all programs: `hier-grpo train …` is `python fastvideo/train_grpo_flux.py …`.

With several processes torchrun starts the program's file: torchrun --nproc_per_node 8 fastvideo/train_grpo_flux.py …
"""

import runpy
import sys

from fastvideo.cli import choose_from

PROGRAMS = {
    "embed": "data_preprocess.preprocess_flux_embedding",
    "train": "train_grpo_flux",
    "sample": "sample.sample_flux",
    "evaluate": "eval.eval_reward",
    "benchmark": "eval.run_benchmark",
    "report": "eval.report",
    "merge-lora": "models.merge_lora",
    "reward-server": "models.reward_model.server",
}


def main() -> None:
    """Runs the program that the first argument names, with the rest of the command line."""
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in ("-h", "--help"):
        print(
            f"usage: hier-grpo {{{','.join(PROGRAMS)}}} [flags]\n\n`hier-grpo train --help` lists the flags of train."
        )
    elif name in PROGRAMS:
        del sys.argv[1]
        runpy.run_module(f"fastvideo.{PROGRAMS[name]}", run_name="__main__", alter_sys=True)
    else:
        print(f"hier-grpo: error: {name}: {choose_from(PROGRAMS, name)}", file=sys.stderr)
        raise SystemExit(2)


if __name__ == "__main__":
    main()
