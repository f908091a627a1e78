"""Samples and scores a published benchmark: one command per model.

    bash scripts/evaluate/benchmark.sh geneval --baseline
    bash scripts/evaluate/benchmark.sh geneval --model_path outputs/mixgrpo/checkpoint-300-0 \\
        --baseline_manifest outputs/benchmarks/geneval/base/manifest.json

    NPROC_PER_NODE=8 bash scripts/evaluate/benchmark.sh ...              (same flags)

The prompts lie in data/benchmarks/{name}/, where `download_checkpoints.sh prompts` puts them. Flags of sampling and of
rewards are those of sample_flux.py and eval_reward.py. Pictures, manifest.json and scores are written to --output_dir.
After a kill the same command goes on where it stopped. benchmark.json has the means over categories and, for a complete
set of prompts, the published row of the base model with its source.
"""

import gc
import re
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from fastvideo.cli import FlagError, FlagErrors, flag, flag_errors, parse_dataclass, parse_first, raised
from fastvideo.eval.prompt_sets import SETS, PromptSet
from fastvideo.eval.settings import EvalConfig
from fastvideo.models.reward_model.spec import RewardConfig
from fastvideo.sample.settings import SampleConfig

FETCH = "`bash scripts/huggingface/download_checkpoints.sh prompts` fetches it"


@dataclass
class BenchmarkConfig(SampleConfig, RewardConfig):
    """Settings of a benchmark: which one, and those of sampling and scoring."""

    benchmark: str | None = flag(None, "what to run", choices=list(SETS))
    benchmark_dir: str = flag("data/benchmarks", "folder with a folder of prompts per benchmark")
    images_per_prompt: int | None = flag(
        None, "pictures of each prompt (None: as the benchmark's authors)", at_least=1, at_most=10**4
    )
    output_dir: str | None = flag(None, "folder for everything (None: outputs/benchmarks/{benchmark}/{model or base})")
    reward_model_type: str | None = flag(None, "reward models, as in eval_reward.py (None: the benchmark's)")
    baseline_manifest: str | None = flag(None, "manifest of the base model's run, for paired differences")
    trained_rewards: str | None = flag(None, "--reward_model of the training; the other rewards count as held out")

    def __post_init__(self) -> None:
        if self.benchmark is None:
            raise FlagError("benchmark", None, f"not given; choose from {', '.join(SETS)}")
        for name in ("prompts_file", "prompt_column", "output_json"):
            if getattr(self, name) != getattr(SampleConfig, name):
                raise FlagError(name, getattr(self, name), "a benchmark has its own prompts and names of files")
        super().__post_init__()
        if self.is_sweep:
            raise FlagError("mix_fraction", self.mix_fraction, "give one share per benchmark")
        if self.images_per_prompt is None:
            self.images_per_prompt = self.set.images
        if self.reward_model_type is None:
            self.reward_model_type = self.set.rewards
        if self.output_dir is None:
            parts = ["base"] if self.baseline else Path(self.model_path).parts[-2:]
            self.output_dir = f"outputs/benchmarks/{self.benchmark}/{re.sub(r'[^A-Za-z0-9.-]+', '_', '_'.join(parts))}"
        self.scoring()

    @property
    def set(self) -> PromptSet:
        """The benchmark."""
        return SETS[self.benchmark]

    def _of(self, cls: type) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in fields(cls)}

    def sampling(self) -> SampleConfig:
        """The settings of sample_flux.py."""
        return SampleConfig(**self._of(SampleConfig) | {"prompts_file": f"{self.output_dir}/prompts.json"})

    def scoring(self) -> EvalConfig:
        """The settings of eval_reward.py."""
        names = ("reward_model_type", "baseline_manifest", "trained_rewards", "device")
        own = {name: getattr(self, name) for name in names} | {"manifest": f"{self.output_dir}/manifest.json"}
        return EvalConfig(**self._of(RewardConfig), **own)


if __name__ == "__main__":  # before the slow part: --help and a refused flag answer at once
    parse_first(BenchmarkConfig, doc=__doc__)

from fastvideo.eval.eval_reward import evaluate, read_manifest
from fastvideo.eval.summary import pair_up
from fastvideo.io.files import write_json, writing
from fastvideo.io.processes import barrier, processes
from fastvideo.models.reward_model.utils import reward_problems
from fastvideo.sample.sample_flux import check_models, resolve, sample

import numpy as np
import torch


def read_set(config: BenchmarkConfig) -> list[dict[str, Any]]:
    """The entries of the benchmark, see prompt_sets.py.

    Raises FlagError for a file that is missing or in another layout.
    """
    folder = Path(config.benchmark_dir) / config.benchmark
    for name in config.set.files:
        if not (folder / name).is_file():
            raise FlagError("benchmark", config.benchmark, f"{folder / name} is missing; {FETCH}")
    try:
        entries = config.set.read(folder)
        for entry in entries:
            entry["prompt"] = re.sub(r"\s*\n\s*", " ", entry["prompt"].strip())  # as in every prompt file
        if not all(entry["prompt"] for entry in entries) or not entries:
            raise ValueError("no prompts, or an empty one")
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:  # FlagError is a ValueError
        problem = f"{', '.join(config.set.files)} in {folder}: not in the published layout ({error}); {FETCH}"
        raise FlagError("benchmark", config.benchmark, problem) from error
    return entries


def checked_set(config: BenchmarkConfig) -> list[dict[str, Any]]:
    """The entries of `read_set`.

    Raises FlagErrors, before hours of sampling, for everything that is missing: models, prompts, files of rewards; or
    for a baseline of other prompts.
    """
    entries: list[dict[str, Any]] = []
    checks = (lambda: check_models(resolve(config.sampling())), lambda: entries.extend(read_set(config)))
    found = [*raised(checks), *reward_problems(config.scoring(), evaluation=True, field="reward_model_type")]
    if found:
        raise FlagErrors(found)
    if config.baseline_manifest is not None:
        each = config.images_per_prompt
        prompts = [(entry["prompt"], {k: v for k, v in entry.items() if k != "prompt"}) for entry in entries]
        pictures = [prompt for prompt in prompts for _ in range(each)]
        ours = [{"index": i, "prompt": p, "metadata": metadata} for i, (p, metadata) in enumerate(pictures)]
        pair_up(ours, read_manifest(Path(config.baseline_manifest), "baseline_manifest"))
    return entries


def means(summary: dict[str, Any]) -> dict[str, float]:
    """Model -> mean of its means over categories, each with equal weight. Empty without categories."""
    by_category = [part["models"] for part in summary["styles"].values()]
    found = {name: [part[name]["mean"] for part in by_category] for name in (by_category[0] if by_category else ())}
    return {name: float(np.mean(values)) for name, values in found.items() if None not in values}


def report(config: BenchmarkConfig, prompts: int, summary: dict[str, Any]) -> None:
    """Writes benchmark.json and prints its content below the table of the evaluation."""
    over_categories, complete = means(summary), prompts == config.set.count
    found = {
        "benchmark": config.benchmark,
        "prompts": prompts,
        "published_prompts": config.set.count,
        "images_per_prompt": config.images_per_prompt,
        "mean_over_categories": over_categories,
        "published": config.set.published if complete else "",
        "note": config.set.note,
    }
    write_json(Path(config.output_dir) / "benchmark.json", found)
    for name, value in over_categories.items():
        print(f"{name}, mean over {len(summary['styles'])} categories: {value:.4f}")
    if not complete:
        print(f"{prompts} of {config.set.count} prompts: not comparable with published numbers")
    elif config.set.published:
        print(f"published: {config.set.published}")
    else:
        print("published: no row of FLUX.1-dev with these scorers is known here")
    if config.set.note:
        print(f"note: {config.set.note}")


def run(config: BenchmarkConfig) -> dict[str, Any]:
    """Samples, scores and reports; returns the summary of the evaluation."""
    entries = checked_set(config)
    with processes(config.device) as here:
        sampling = config.sampling()
        if here.rank == 0:
            Path(config.output_dir).mkdir(parents=True, exist_ok=True)
            write_json(Path(sampling.prompts_file), entries)
        barrier()
        sample(sampling)
        barrier()  # the first process has written the manifest
        gc.collect()  # the pipeline's hooks refer to each other, and the rewards need its memory
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        summary = evaluate(config.scoring())
        if here.rank == 0:
            report(config, len(entries), summary)
    return summary


@flag_errors("run_benchmark.py")
def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status: 1 when a picture or a score is missing."""
    config = parse_dataclass(BenchmarkConfig, argv, __doc__)
    with writing("output_dir", config.output_dir):
        summary = run(config)
    return int(summary["successful"] < summary["images"] or bool(summary["skipped"]))


if __name__ == "__main__":
    raise SystemExit(main())
