"""All command lines: the cost of their imports, and assumptions about imported packages."""

import ast
import subprocess
import sys

from fastvideo.__main__ import PROGRAMS as COMMANDS
from fastvideo.config import GRPOConfig

import pytest
import torch
from conftest import ROOT, TIME_LIMIT
from diffusers.optimization import SchedulerType, get_scheduler
from test_layers import imports, modules

PROGRAMS = [
    "train_grpo_flux", "train", "sample/sample_flux", "eval/eval_reward", "eval/report", "eval/run_benchmark",
    "models/merge_lora", "models/reward_model/server", "data_preprocess/preprocess_flux_embedding",
]  # fmt: skip
# Runs a program, and prints its exit status and the slow packages that it imported.
RUN = """
import runpy, sys
program, *sys.argv[1:] = sys.argv[1:]
sys.argv[0] = program
status = 0
try:
    runpy.run_path(program, run_name="__main__")
except SystemExit as stop:
    status = stop.code or 0
print("\\n", status, *sorted({"torch", "diffusers", "transformers", "accelerate", "peft"} & sys.modules.keys()))
"""


# Runs hier-grpo where only the standard library and the project's own dependencies can be imported.
ALONE = """
import importlib.abc, runpy, sys
from importlib.metadata import packages_distributions
allowed = {"fastvideo", "argparse_dataclass", "yaml", "_yaml", "attr"}
class Refuse(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in foreign:
            raise ModuleNotFoundError(f"No module named {name!r}")
foreign = packages_distributions().keys() - allowed
sys.meta_path.insert(0, Refuse())
runpy.run_module("fastvideo", run_name="__main__", alter_sys=True)
"""


def hier_grpo(*argv: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", ALONE, *argv]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=TIME_LIMIT)


@pytest.mark.parametrize("name", COMMANDS)
def test_one_name_runs_every_program_whose_help_needs_no_other_packages(name):
    done = hier_grpo(name, "--help")
    assert done.returncode == 0 and done.stdout.startswith("usage: "), done.stderr
    assert f"{COMMANDS[name].split('.')[-1]}.py" in done.stdout.splitlines()[0]


def test_an_unknown_name_is_refused_with_the_nearest_one():
    done = hier_grpo("evalute")
    assert done.returncode == 2 and done.stderr.endswith("did you mean evaluate?\n")
    assert all(name in hier_grpo("--help").stdout for name in COMMANDS)


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize(("argument", "status"), [("--help", 0), ("--no_such_flag=1", 2)])
def test_help_and_a_refused_flag_do_not_wait_for_slow_imports(program, argument, status):
    command = [sys.executable, "-c", RUN, str(ROOT / f"fastvideo/{program}.py"), argument]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=TIME_LIMIT)
    assert done.stdout.splitlines()[-1].split() == [str(status)], done.stderr
    if status:
        assert "no_such_flag" in done.stderr and len(done.stderr.splitlines()) == 1


def test_each_schedule_that_lr_scheduler_offers_works_with_the_flags_that_there_are():
    """config.py lists the names, as it can't import diffusers. piecewise_constant needs rules, which no flag has."""
    choices = GRPOConfig.__dataclass_fields__["lr_scheduler"].metadata["choices"]
    assert {*choices, "piecewise_constant"} == {schedule.value for schedule in SchedulerType}
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    for name in choices:
        get_scheduler(name, optimizer, num_warmup_steps=0, num_training_steps=2, num_cycles=1, power=1.0)


def test_torchvision_is_repaired_before_a_package_that_imports_it():
    """Our imports come first in every block, so it is enough if one of our modules imports the repair."""
    known = modules()

    def repaired(name: str) -> bool:
        found, new = set(), {name}
        while new:
            found |= new
            new = set().union(*(imports(known[module], known) for module in new)) - found
        return "torchvision_repair" in found

    for name, path in known.items():
        nodes = [node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if name != "torchvision_repair"]
        absolute = {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
        absolute |= {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
        packages = {module.partition(".")[0] for module in absolute}
        if packages & {"diffusers", "transformers", "peft", "open_clip", "timm", "torchvision", "ImageReward"}:
            assert repaired(name), f"{name} must import torchvision_repair"
