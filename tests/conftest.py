"""Fixtures for tests of the trainer: the tiny pipeline, embedded prompts, and `train`, which calls the command line."""

import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before the hub's client is imported; nothing here asks a hub
# Compiled code is cached for all tests of this run and of later runs.
os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(Path(__file__).parents[1] / ".cache/torchinductor"))

import fastvideo.torchvision_repair  # noqa: F401  (before transformers)
from fastvideo import train_grpo_flux
from fastvideo.data_preprocess.preprocess_flux_embedding import embed_prompts
from fastvideo.io import messages
from fastvideo.models.flux import Flux1
from fastvideo.models.reward_model import utils as reward_utils
from fastvideo.models.reward_model.custom import FunctionReward

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from forked import run_together
from reward_checkpoints import all_narrow_files, narrow_geneval, narrow_hpsv3, narrow_rewards  # noqa: F401  (fixtures)
from reward_servers import chat_server, http_server  # noqa: F401  (fixtures)
from safetensors.torch import load_file
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "scripts"))
from make_tiny_flux import build_tiny_flux  # noqa: E402  (a script, in no package)

TINY = ROOT / "data/tiny_flux"
TRAINER = "fastvideo/train_grpo_flux.py"
PROMPTS = (  # training scenes with all words; red is in the first alone, circles in the first and the fourth
    "a red circle left of a blue square on a black background",
    "a green square above a yellow triangle on a black background",
    "a cyan triangle right of a purple square on a white background",
    "a yellow circle below a blue circle on a white background",
    "a purple square left of a green triangle on a black background",
)

# Allowed relative difference of float32 gradients, summed over a few optimizer steps. Rounding gives 6e-7. A wrong
# micro-batch weight gives 1e-1. A pixel rounded to another of its 256 values gives 1e-3 through the reward.
ROUNDING = 1e-5

# Seconds that a test waits for another process. On an idle machine every test needs less than a tenth.
TIME_LIMIT = 1200

# Trackers besides wandb whose package is installed.
TRACKERS_HERE = [name for name in ("tensorboard", "swanlab", "trackio") if importlib.util.find_spec(name)]

PASSED = pytest.StashKey[bool]()

torch.set_num_threads(1)
# A shell starts background jobs with SIGINT ignored, and nohup ignores SIGHUP. Processes that tests start inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Sorts the tests, longest first, so that no process runs a long test alone at the end."""

    def minutes(item: pytest.Item) -> float:
        marker = item.get_closest_marker("slow")
        return 0 if marker is None else marker.args[0] if marker.args else 0.5

    items.sort(key=minutes, reverse=True)


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo):
    """Deletes the tmp_path of a passed test. All tests together would leave 11 GB."""
    report = (yield).get_result()
    if report.when == "call" and report.passed:
        item.stash[PASSED] = True
    if report.when == "teardown" and item.stash.get(PASSED, False) and "tmp_path" in item.fixturenames:
        shutil.rmtree(item.funcargs["tmp_path"], ignore_errors=True)


def forget_accelerator() -> None:
    """Accelerate keeps the settings of the first Accelerator of a process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture(autouse=True)
def reset_accelerate():
    """Each test starts without an Accelerator, with no warning shown, and with one thread: two round differently."""
    forget_accelerator()
    torch.set_num_threads(1)
    messages._warned.clear()
    yield
    forget_accelerator()


@pytest.fixture(autouse=True)
def custom_rewards_are_only_imported(monkeypatch):
    """Runs in this process call custom rewards not once before training: some functions exist only in this process."""
    monkeypatch.setattr(reward_utils, "probe", lambda path, field, *_: FunctionReward(path, field))


@pytest.fixture(scope="session")
def tiny_flux() -> str:
    """The shipped pipeline. Its weights may change, so no test may depend on its pictures."""
    return str(TINY)


@pytest.fixture(scope="session")
def random_flux(tmp_path_factory) -> str:
    """An untrained pipeline with guidance embeds, whose weights depend on a seed alone."""
    folder = tmp_path_factory.mktemp("random_flux")
    build_tiny_flux(folder, seed=1)
    return str(folder)


@pytest.fixture(scope="session")
def schnell_flux(tmp_path_factory) -> str:
    """An untrained pipeline without guidance embeds, as FLUX.1-schnell."""
    folder = tmp_path_factory.mktemp("schnell_flux")
    build_tiny_flux(folder, guidance_embeds=False, seed=2)
    return str(folder)


@pytest.fixture(scope="session")
def prompts_file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    path.write_text("\n".join(PROMPTS) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def embedded_prompts(tmp_path_factory, tiny_flux, prompts_file) -> Path:
    """prompt.json of PROMPTS for the tiny pipeline."""
    return embed_prompts(tiny_flux, prompts_file, tmp_path_factory.mktemp("embeddings"))


@dataclass
class Run:
    """The files of a training run."""

    folder: Path

    @property
    def metrics(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.folder / "metrics.jsonl").read_text().splitlines()]

    def numbers(self) -> list[dict[str, Any]]:
        """The metrics that must be equal in a repeated run: all except seconds and rates."""
        timed = ("seconds_", "tflops_", "peak_share_")
        return [{k: v for k, v in line.items() if not k.startswith(timed)} for line in self.metrics]

    @property
    def checkpoints(self) -> list[Path]:
        """Checkpoint folders, sorted by iteration."""
        found = self.folder.glob("checkpoint-*")
        return sorted(found, key=lambda path: int(re.fullmatch(r"checkpoint-(\d+)-\d+", path.name)[1]))

    def weights(self, which: int = -1, part: str = ".") -> dict[str, torch.Tensor]:
        return load_file(self.checkpoints[which] / part / "diffusion_pytorch_model.safetensors")

    def gradient(self, which: int = -1) -> torch.Tensor:
        """AdamW's running mean of the gradients, flat. One vector that depends on all optimizer steps so far."""
        whole = self.checkpoints[which].with_suffix(".optimizer")
        dcp_to_torch_save(self.checkpoints[which] / "optimizer", whole)
        moments = torch.load(whole, weights_only=True)["optimizer"]
        whole.unlink()
        return torch.cat([moments[name]["exp_avg"].flatten() for name in sorted(moments)]).double()


def relative_difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """‖a − b‖ / ‖b‖."""
    return float((a - b).norm() / b.norm())


def same_weights(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def base_weights(model: str) -> dict[str, torch.Tensor]:
    stored = load_file(Path(model) / "transformer/diffusion_pytorch_model.safetensors")
    return {name: tensor.float() for name, tensor in stored.items()}


def assert_same_update(a: Run, b: Run, rounding: float = ROUNDING) -> None:
    """Asserts that samples, scores and updates of two runs are equal up to float32 rounding."""
    assert relative_difference(a.gradient(), b.gradient()) < rounding
    for one, other in zip(a.numbers(), b.numbers(), strict=True):
        for name in ("reward", "grad_norm", "nfe", "images", "optimizer_steps", "lr", "window", "zero_spread_groups"):
            assert one[name] == pytest.approx(other[name], rel=1e-3), name


def torchrun(
    argv: Sequence[object],
    environment: dict[str, str],
    script: str = TRAINER,
    processes: int = 2,
    file_limit: int | None = None,
) -> subprocess.CompletedProcess:
    """Does the same as `torchrun --nproc_per_node PROCESSES SCRIPT ARGUMENTS`, in forked processes (see forked.py).

    file_limit: size in bytes above which the operating system refuses to write a file.
    """
    return run_together(script, argv, environment, processes, TIME_LIMIT, file_limit)


@pytest.fixture(scope="session")
def small_flags(tiny_flux, embedded_prompts) -> Callable[..., list[str]]:
    """small_flags(output_dir=folder, name=value, ...) -> the command line of a small, fast run.

    True and False become `--name` and `--no_name`.
    """

    def make(**given: Any) -> list[str]:
        small = {
            "pretrained_model_name_or_path": tiny_flux,
            "data_json_path": None if "prompts_file" in given else embedded_prompts,
            "h": 32,
            "w": 32,
            "sampling_steps": 6,
            "group_size": 2,
            "num_generations": 4,
            "gradient_accumulation_steps": 2,
            "max_train_steps": 2,
            "mixed_precision": "no",
            "gradient_checkpointing": False,
            "use_wandb": False,
            "dataloader_num_workers": 0,
            "reward_model": "shapes",
            "image_log_steps": 0,
        }
        argv: list[str] = []
        for name, value in {**small, **given}.items():
            if isinstance(value, bool):
                argv.append(f"--{name}" if value else f"--no_{name}")
            elif isinstance(value, (list, tuple)):
                argv += [f"--{name}", *map(str, value)]
            else:
                argv += [f"--{name}", str(value)]
        return argv

    return make


@pytest.fixture
def flags(small_flags, tmp_path) -> Callable[..., list[str]]:
    """small_flags with an output_dir in tmp_path."""
    return lambda **given: small_flags(**{"output_dir": tmp_path / "run", **given})


@pytest.fixture
def train(flags, tmp_path) -> Callable[..., Run]:
    """train(name=value, ...) runs main() on a small fast configuration; `output_dir` names a folder under tmp_path."""
    count = 0

    def run(output_dir: str | None = None, **given: Any) -> Run:
        nonlocal count
        count += 1
        folder = tmp_path / (output_dir or f"run{count}")
        forget_accelerator()
        train_grpo_flux.main(flags(output_dir=folder, **given))
        return Run(folder)

    return run


@pytest.fixture
def velocity_calls(monkeypatch) -> Callable[[Callable], None]:
    """velocity_calls(change): replaces each predicted velocity by change(velocity, in_rollout)."""
    sampling, sample, predict = [], train_grpo_flux.rollout, Flux1.velocity

    def rollout(*args):
        sampling.append(True)
        try:
            return sample(*args)
        finally:
            sampling.pop()

    def install(change: Callable) -> None:
        monkeypatch.setattr(train_grpo_flux, "rollout", rollout)
        monkeypatch.setattr(Flux1, "velocity", lambda *args: change(predict(*args), bool(sampling)))

    return install


@pytest.fixture
def run_at(tmp_path) -> Callable[[str], Run]:
    """run_at(folder under tmp_path) -> the Run in the folder, which may have ended early."""
    return lambda name: Run(tmp_path / name)


@pytest.fixture
def subprocess_environment() -> dict[str, str]:
    """Environment of a child process that trains: one thread, no network, the tests' custom rewards importable."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    return {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": path}


@contextmanager
def parts_missing() -> Iterator[None]:
    """A dry run in this context prints the plan, then names what isn't here, such as FLUX.1, and ends with status 2."""
    with pytest.raises(SystemExit) as stop:
        yield
    assert stop.value.code == 2


@pytest.fixture
def warned(capsys):
    """warned(regex): the block in this context prints one line on stderr that is a warning and matches."""

    @contextmanager
    def expect(message: str) -> Iterator[None]:
        capsys.readouterr()
        yield
        told = capsys.readouterr().err
        assert len(re.findall(f"^warning: .*{message}.*$", told, re.MULTILINE)) == 1, told

    return expect


@pytest.fixture
def refused(capsys):
    """refused(regex): the command line in this context ends with status 2 and a last line on stderr that matches."""

    @contextmanager
    def expect(message: str) -> Iterator[None]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            yield
        last = capsys.readouterr().err.splitlines()[-1]
        assert stop.value.code == 2 and re.search(f"error: {message}", last), last

    return expect
