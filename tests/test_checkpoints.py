"""Checkpoints through the command line: what is refused, what goes on, and what a kill or a full disk leaves behind."""

import errno
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

from fastvideo.io.processes import ONE_REQUEST
from fastvideo.runtime import resume
from fastvideo.runtime.checkpoint import CheckpointWriter, write_base
from fastvideo.runtime.log import Log
from fastvideo.train_grpo_flux import Trainer, main

import pytest
import torch
from conftest import ROOT, TIME_LIMIT, TRAINER, Run, forget_accelerator, relative_difference, same_weights, torchrun
from forked import Script
from safetensors.torch import load_file
from torch.distributed.checkpoint.filesystem import FileSystem

SETTINGS = {"max_train_steps": 4, "checkpointing_steps": 2, "learning_rate": 1e-4}


@pytest.fixture
def refuse(train, capsys) -> Callable[..., str]:
    """refuse(flag=value, ...) -> the one line with which a run is refused."""

    def run(*args, **given) -> str:
        with pytest.raises(SystemExit) as stop:
            train(*args, **{**SETTINGS, **given})
        assert stop.value.code == 2
        return capsys.readouterr().err.splitlines()[-1]

    return run


@pytest.fixture(scope="module")
def saved(small_flags, tmp_path_factory) -> Path:
    """The folder of a run of SETTINGS; `out` is a copy of it."""
    folder = tmp_path_factory.mktemp("saved") / "run"
    forget_accelerator()
    main(small_flags(output_dir=folder, **SETTINGS))
    return folder


@pytest.fixture
def out(saved, tmp_path) -> Run:
    """A finished run of SETTINGS, in the folder that train("out") and refuse("out") mean."""
    return Run(shutil.copytree(saved, tmp_path / "out", symlinks=True))


# --- which checkpoint -------------------------------------------------------------------------------------------------


def latest(folder: Path) -> Path:
    """The checkpoint that the link `latest` points to."""
    return folder / os.readlink(folder / "latest")


def test_older_checkpoints_are_deleted_beyond_the_limit(train):
    run = train(max_train_steps=6, checkpointing_steps=1, checkpoints_total_limit=2)
    assert [path.name.split("-")[1] for path in run.checkpoints] == ["5", "6"]
    assert not list(run.folder.glob(".*")) and latest(run.folder) == run.checkpoints[-1]
    train(run.folder.name, max_train_steps=7, checkpointing_steps=1, checkpoints_total_limit=2,
          resume_from_checkpoint="latest")  # fmt: skip
    assert [path.name.split("-")[1] for path in run.checkpoints] == ["6", "7"]


def test_a_run_resumed_with_other_numbers_of_prompts_leaves_none_of_the_epoch_out(train, monkeypatch):
    taken, conditioning = [], Trainer.conditioning
    monkeypatch.setattr(
        Trainer, "conditioning", lambda self, batch: taken.extend(batch["index"].tolist()) or conditioning(self, batch)
    )
    train("out", train_batch_size=2, max_train_steps=1)
    for steps, size in ((2, 1), (3, 2)):
        train("out", train_batch_size=size, max_train_steps=steps, resume_from_checkpoint="latest")
    assert sorted(taken) == list(range(5))  # the fixture's prompts, 2 + 1 + 2


def test_resuming_from_an_earlier_checkpoint_sets_later_ones_aside(train, capsys):
    settings = {"max_train_steps": 6, "checkpointing_steps": 2, "learning_rate": 1e-4}
    run = train("out", **settings)
    later = run.weights(1)
    train("out", **{**settings, "max_train_steps": 3}, seed=5, resume_from_checkpoint=run.checkpoints[0])
    assert [path.name.split("-")[1] for path in run.checkpoints] == ["2", "3"]
    assert [line["step"] for line in run.metrics] == [1, 2, 3]
    moved = sorted((run.folder / "superseded").iterdir())
    assert [path.name for path in moved] == ["checkpoint-4-0.0", "checkpoint-6-1.0", "metrics.jsonl.0"]
    assert [json.loads(line)["step"] for line in moved[-1].read_text().splitlines()] == [3, 4, 5, 6]
    assert same_weights(later, load_file(moved[0] / "diffusion_pytorch_model.safetensors"))
    assert latest(run.folder) == run.checkpoints[-1]
    assert "was moved to" in capsys.readouterr().err
    train("out", **settings, resume_from_checkpoint="latest")  # goes on from 3, not from 6
    assert [line["step"] for line in run.metrics] == [1, 2, 3, 4, 5, 6]


def test_leftovers_that_fill_the_disk_are_removed_before_anything_is_written(out, train, monkeypatch):
    before, leftover, write_bytes = out.numbers(), out.folder / ".checkpoint-6-0.part", resume.write_bytes
    leftover.mkdir()

    def write(path, data):
        if leftover.exists():
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write_bytes(path, data)

    monkeypatch.setattr(resume, "write_bytes", write)
    train("out", **SETTINGS, resume_from_checkpoint=out.checkpoints[0])
    assert out.numbers() == before and not leftover.exists()


DAMAGE = {
    "cut off": (lambda p: p.write_bytes(p.read_bytes()[:-100]), "bytes"),
    "gone": (Path.unlink, "is missing"),
    "a flipped bit": (lambda p: p.write_bytes(p.read_bytes()[:-1] + bytes([p.read_bytes()[-1] ^ 1])), "has changed"),
}


@pytest.mark.parametrize("how", DAMAGE)
@pytest.mark.parametrize("name", ["diffusion_pytorch_model.safetensors", "optimizer/__0_0.distcp", "config.json"])
def test_a_damaged_checkpoint_is_refused_with_what_is_wrong(out, train, refuse, how, name):
    before, lines = out.metrics, out.numbers()
    damage, message = DAMAGE[how]
    damage(out.checkpoints[-1] / name)
    error = refuse("out", resume_from_checkpoint="latest")
    assert str(out.checkpoints[-1]) in error and name in error and message in error
    assert out.metrics == before
    train("out", **SETTINGS, resume_from_checkpoint=out.checkpoints[0])
    assert out.numbers() == lines


def test_a_record_that_is_cut_off_edited_or_of_another_format_is_refused(out, train, refuse):
    record = out.checkpoints[-1] / "checkpoint.json"
    whole = json.loads(record.read_text())
    for text, message in (
        (record.read_text()[:-100], "can't be read"),
        ("[]", "can't be read"),
        (json.dumps(whole | {"format": 99}), "format 99"),
        (json.dumps(whole | {"optimizer_steps": 1}), "checkpoint.json has changed since it was written"),
    ):
        record.write_text(text)
        error = refuse("out", resume_from_checkpoint="latest")
        assert message in error and f"the newest sound one is {out.checkpoints[0]}" in error


def test_a_model_that_was_made_from_a_checkpoint_is_no_damaged_checkpoint(out, refuse, tiny_flux, tmp_path):
    shutil.copytree(Path(tiny_flux) / "transformer", tmp_path / "merged")
    write_base(tmp_path / "merged", tiny_flux)
    error = refuse(resume_from_checkpoint=tmp_path / "merged")
    assert (
        "merged: no checkpoint of a training run; give a folder checkpoint-ITERATION-EPOCH of an --output_dir" in error
    )


def edit(record: Path, **given) -> None:
    """Changes entries of a record, and leaves it without a hash of itself, as older versions wrote it."""
    entries = json.loads(record.read_text()) | given
    record.write_text(json.dumps({name: value for name, value in entries.items() if name != "record_sha256"}))


def test_a_record_that_lacks_something_is_refused_with_what_it_lacks(out, train, refuse):
    record = out.checkpoints[-1] / "checkpoint.json"
    whole = json.loads(record.read_text())
    record.write_text('{"format": 1, "files": {}}')
    error = refuse("out", resume_from_checkpoint="latest")
    assert str(record.parent) in error and "checkpoint.json lacks iteration, " in error and "settings" in error
    del whole["settings"]["zero_stage"]
    record.write_text(json.dumps(whole))
    edit(record)
    assert "checkpoint.json lacks settings.zero_stage" in refuse("out", resume_from_checkpoint="latest")


@pytest.mark.parametrize(
    "given,message",
    [({"iteration": "x"}, "iteration in checkpoint.json is 'x'"), ({"iteration": 2}, "belongs to checkpoint-2-0")],
)
def test_a_record_of_another_checkpoint_is_refused_before_anything_is_moved(out, train, refuse, given, message):
    before = out.checkpoints
    record = before[-1] / "checkpoint.json"
    edit(record, **given)
    assert message in refuse("out", resume_from_checkpoint="latest")
    assert out.checkpoints == before and latest(out.folder) == before[-1]


def test_a_checkpoint_of_another_base_model_or_kind_is_refused(out, train, refuse, random_flux):
    path = out.checkpoints[0]
    assert "another base model" in refuse(pretrained_model_name_or_path=random_flux, resume_from_checkpoint=path)
    refusal = refuse(use_lora=True, resume_from_checkpoint=path)
    assert "--use_lora: " in refusal and "was trained with --no_use_lora" in refusal


# --- what goes on -----------------------------------------------------------------------------------------------------


def test_changed_versions_are_listed_and_a_finished_run_says_so(out, train, capsys):
    record = out.checkpoints[-1] / "checkpoint.json"
    edit(record, versions=json.loads(record.read_text())["versions"] | {"torch": "1.0"})
    capsys.readouterr()
    settings = (out.folder / "args.json").read_bytes()
    train("out", **SETTINGS | {"eta": 0.5}, resume_from_checkpoint="latest")
    assert (out.folder / "args.json").read_bytes() == settings  # of the iterations that were trained
    told = capsys.readouterr().out
    assert f"with other versions, numbers may differ in rounding: torch 1.0 -> {torch.__version__}\n" in told
    assert "nothing to do: 4 of --max_train_steps 4 iterations are done" in told


def test_changed_settings_are_listed_and_count(out, train, capsys):
    capsys.readouterr()
    changed = {"learning_rate": 5e-4, "weight_decay": 0.5, "eta": 0.5}
    rest = train("rest", **{**SETTINGS, **changed}, resume_from_checkpoint=out.checkpoints[0])
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("resuming"))
    for text in ("learning_rate: 0.0001 -> 0.0005", "weight_decay: 0.0001 -> 0.5", "eta: 0.7 -> 0.5"):
        assert text in line
    assert "output_dir" not in line and "seed" not in line
    assert [line["lr"] for line in rest.metrics] == [5e-4, 5e-4]
    assert not same_weights(rest.weights(), out.weights())
    saved = json.loads((rest.checkpoints[-1] / "checkpoint.json").read_text())
    assert saved["settings"]["learning_rate"] == 5e-4 and saved["versions"]["torch"] == torch.__version__


def test_a_run_saved_before_its_first_optimizer_step_goes_on_as_if_never_stopped(train):
    settings = {**SETTINGS, "checkpointing_steps": 1, "reward_model": "custom_rewards:red_prompts_fail"}
    whole = train("whole", **settings, sampler_seed=next_red_first())
    assert whole.metrics[0]["optimizer_steps"] == 0
    rest = train("rest", **settings, sampler_seed=next_red_first(), resume_from_checkpoint=whole.checkpoints[0])
    assert rest.numbers() == whole.numbers()[1:]
    assert same_weights(rest.weights(), whole.weights())


def next_red_first() -> int:
    """A sampler_seed with which the one red prompt comes first."""
    from fastvideo.dataset.latent_flux_rl_datasets import PromptSampler

    return next(seed for seed in range(100) if PromptSampler(5, 1, seed=seed).draws(1)[0].index == 0)


@pytest.mark.slow
def test_processes_that_see_a_folder_at_different_times_resume_alike(train, flags, tmp_path, subprocess_environment):
    """The case of a network disk: the second process doesn't see yet the files that the first process sees."""
    settings = {**SETTINGS, "prompts_per_iteration": 2, "ema_decay": 0.5, "reward_model": "jpeg_compressibility"}
    run = train("out", **settings)
    late = [str(run.checkpoints[0] / name) for name in ("ema", "optimizer")] + [str(tmp_path / "rest/best")]
    script = tmp_path / "train.py"
    script.write_text(
        "import os\nfrom pathlib import Path\nfrom fastvideo.train_grpo_flux import main\n"
        f"is_dir, exists, late = Path.is_dir, Path.exists, {late}\n"
        "if os.environ['RANK'] == '1':\n"
        "    Path.is_dir = lambda path: str(path) not in late and is_dir(path)\n"
        "    Path.exists = lambda path: str(path) not in late and exists(path)\n"
        "main()\n"
    )
    argv = flags(output_dir=tmp_path / "rest", parallel="fsdp", **settings, resume_from_checkpoint=run.checkpoints[0])
    done = torchrun(argv, subprocess_environment, script=str(script))
    assert done.returncode == 0, done.stderr[-4000:]
    rest = Run(tmp_path / "rest")
    assert [line["grad_norm"] for line in rest.metrics] == pytest.approx(
        [line["grad_norm"] for line in run.metrics[2:]], rel=1e-3
    )
    assert relative_difference(rest.gradient(), run.gradient()) < 1e-4


@pytest.mark.slow
def test_a_resumed_run_keeps_its_wandb_run(train, monkeypatch, tmp_path):
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    monkeypatch.setenv("WANDB_SILENT", "true")
    run = train("out", **SETTINGS, use_wandb=True)
    train("rest", **SETTINGS, use_wandb=True, resume_from_checkpoint=run.checkpoints[0])
    ids = {path.name.rsplit("-", 1)[1] for path in tmp_path.glob("*/wandb/offline-run-*")}
    assert len(list(tmp_path.glob("*/wandb/offline-run-*"))) == 2 and len(ids) == 1


def test_a_checkpoint_holds_its_iteration_although_training_went_on(train, monkeypatch):
    """The writing of iteration 3 waits until iteration 5 has changed the weights and their average."""
    settings = {**SETTINGS, "max_train_steps": 3, "checkpointing_steps": 3, "ema_decay": 0.5}
    settings |= {"reward_model": "jpeg_compressibility"}  # its weights don't depend on the length of the run
    whole = train("whole", **settings)
    went_on, open_file, iteration = threading.Event(), FileSystem.create_stream, Trainer.iteration

    def open_late(self, path, mode):
        assert mode != "wb" or went_on.wait(TIME_LIMIT), "training waited for the disk"
        return open_file(self, path, mode)

    def iterate(self, *args):
        result = iteration(self, *args)
        if self.progress.iteration == 5:
            went_on.set()
        return result

    monkeypatch.setattr(FileSystem, "create_stream", open_late)
    monkeypatch.setattr(Trainer, "iteration", iterate)
    run = train("out", **{**settings, "max_train_steps": 6})
    saved, later, expected = (files(path) for path in (*run.checkpoints, *whole.checkpoints))
    for name in ("diffusion_pytorch_model", "ema/diffusion_pytorch_model", "optimizer/__0_0"):
        (name,) = (file for file in expected if file.startswith(name))
        assert saved[name] == expected[name] != later[name], name


def files(folder: Path) -> dict[str, dict]:
    """Size and hash of its files."""
    return json.loads((folder / "checkpoint.json").read_text())["files"]


# --- signals, kills, full disks ---------------------------------------------------------------------------------------


@pytest.fixture
def start(flags, tmp_path, subprocess_environment):
    """start(name, processes, flag=value, ...) -> a training run in the background, in a new session.

    The real torchrun starts several processes.
    """
    running = []

    def run(name: str, processes: int = 1, **given) -> Script | subprocess.Popen:
        argv, log = flags(output_dir=tmp_path / name, **given), tmp_path / f"{name}.log"
        if processes == 1:
            process = Script(TRAINER, argv, subprocess_environment, log, log)
        else:
            torchrun = ["-m", "fastvideo.torchrun", "--standalone", "--nproc_per_node", str(processes)]
            with open(log, "a") as file:
                process = subprocess.Popen(
                    [sys.executable, *torchrun, TRAINER, *argv],
                    cwd=ROOT, env=subprocess_environment, stdout=file, stderr=file, start_new_session=True,
                )  # fmt: skip
        running.append(process)
        return process

    yield run
    for process in running:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def wait_for(condition: Callable[[], bool], process: Script | subprocess.Popen, log: Path) -> None:
    """Waits for the condition. Fails with the end of the log if the run ends first."""
    deadline = time.monotonic() + TIME_LIMIT
    while not condition():
        assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-3000:]
        time.sleep(0.005)


def lines(folder: Path) -> int:
    path = folder / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


@pytest.mark.slow
@pytest.mark.parametrize("number,saves", [(signal.SIGTERM, 50), (signal.SIGINT, 1)])
def test_a_signal_ends_the_run_after_saving(start, train, run_at, tmp_path, number, saves):
    settings = {**SETTINGS, "max_train_steps": 12, "checkpointing_steps": saves}
    process, log = start("cut", **settings), tmp_path / "cut.log"
    wait_for(lambda: lines(tmp_path / "cut") >= 2, process, tmp_path / "cut.log")
    process.send_signal(number)
    assert process.wait(TIME_LIMIT) == 128 + number
    assert "Traceback" not in log.read_text() and "--resume_from_checkpoint latest" in log.read_text()
    done = len(run_at("cut").metrics)
    expected = [str(step) for step in range(1, done + 1) if step % saves == 0 or step == done]
    assert [path.name.split("-")[1] for path in run_at("cut").checkpoints] == expected and done < 12
    train("cut", **settings, resume_from_checkpoint="latest")
    whole = train("whole", **settings)
    assert run_at("cut").numbers() == whole.numbers()
    assert same_weights(run_at("cut").weights(), whole.weights())


@pytest.mark.slow
@pytest.mark.parametrize("whom", ["torchrun", "everybody"])  # everybody: Slurm, and torchrun signals again
def test_a_signal_to_torchrun_ends_all_processes_after_saving(start, run_at, tmp_path, whom):
    given = {"max_train_steps": 500, "checkpointing_steps": 500}
    process, log = start("cut", 2, parallel="fsdp", **given), tmp_path / "cut.log"
    wait_for(lambda: lines(tmp_path / "cut") >= 2, process, log)
    trainers = children(process.pid)
    assert len(trainers) == 2
    for victim in [process.pid, *trainers] if whom == "everybody" else [process.pid]:
        os.kill(victim, signal.SIGTERM)
    assert process.wait(TIME_LIMIT) == 128 + signal.SIGTERM
    (saved,) = run_at("cut").checkpoints
    assert saved.name.split("-")[1] == str(len(run_at("cut").metrics))
    assert log.read_text().count("stopped: by a signal") == 1  # the first process says it for all


@pytest.mark.slow
def test_a_second_signal_ends_a_run_at_once_unless_it_comes_with_the_first(start, run_at, tiny_flux, tmp_path):
    """The run can't end by itself, because its checkpoint writer waits for data from a pipe."""
    base, cut, log = tmp_path / "base", tmp_path / "cut", tmp_path / "cut.log"
    shutil.copytree(tiny_flux, base)
    os.mkfifo(base / "transformer/pipe.json")
    process = start("cut", **{**SETTINGS, "max_train_steps": 500}, pretrained_model_name_or_path=base)
    wait_for(lambda: lines(cut) >= 1, process, log)
    process.terminate()
    wait_for(lambda: "SIGTERM: this iteration ends" in log.read_text(), process, log)
    process.terminate()
    wait_for(lambda: bool(list(cut.glob(".checkpoint-*.part"))), process, log)  # counts as one signal
    time.sleep(ONE_REQUEST)
    process.terminate()
    assert process.wait(TIME_LIMIT) == -signal.SIGTERM
    assert not run_at("cut").checkpoints


def kill_at_random_moments(start, train, run_at, tmp_path, kills: int, processes: int) -> None:
    """A run that saves all the time and is killed many times ends like an uninterrupted run."""
    settings = {**SETTINGS, "max_train_steps": 6 * kills, "checkpointing_steps": 1, "prompts_per_iteration": 2}
    settings |= {"resume_from_checkpoint": "auto"}  # one command line for every start
    moments, cut, begun = random.Random(0), run_at("cut"), tmp_path / "cut/args.json"
    for kill in range(kills):
        begun.unlink(missing_ok=True)
        process = start("cut", processes, **settings)
        wait_for(begun.exists, process, tmp_path / "cut.log")
        time.sleep(moments.random() * 1.5)
        victims = [process.pid] if processes == 1 else children(process.pid)
        for victim in victims if kill % 2 else victims[-1:]:  # all, or the last alone
            os.kill(victim, signal.SIGKILL)
        assert process.wait(TIME_LIMIT) != 0, "the run was too fast to be killed"
    train("cut", **settings)
    whole = train("whole", **settings)
    assert [line["step"] for line in cut.metrics] == list(range(1, 6 * kills + 1))
    assert not list(cut.folder.glob(".*")) and not (cut.folder / "run.lock").exists()
    if processes == 1:
        assert cut.numbers() == whole.numbers()
        assert same_weights(cut.weights(), whole.weights())


def children(pid: int) -> list[int]:
    found = subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True).stdout.split()
    return [int(child) for child in found]


@pytest.mark.slow
def test_a_run_killed_at_random_moments_ends_alike(start, train, run_at, tmp_path):
    kill_at_random_moments(start, train, run_at, tmp_path, kills=2, processes=1)


@pytest.mark.long
@pytest.mark.parametrize("processes", [1, 2])
def test_a_run_killed_at_twenty_random_moments_ends_alike(start, train, run_at, tmp_path, processes):
    kill_at_random_moments(start, train, run_at, tmp_path, kills=20, processes=processes)


@pytest.mark.slow
@pytest.mark.parametrize(
    "place,ranks,engine",
    [
        ("rollout", "1", "ddp"),
        ("training", "0,1", "fsdp"),
        pytest.param("rollout", "0,1", "fsdp", marks=pytest.mark.long),
        pytest.param("training", "0", "ddp", marks=pytest.mark.long),
    ],
)
def test_a_run_goes_on_after_a_kill_of_one_or_all_processes_in_rollout_and_training(
    flags, run_at, tmp_path, subprocess_environment, place, ranks, engine
):
    settings = {**SETTINGS, "prompts_per_iteration": 2, "train_micro_batch_size": 100, "parallel": engine}
    settings |= {"reward_model": "deadly_rewards:rough_brightness", "checkpointing_steps": 1}

    def train_on_two(name: str, environment: dict[str, str], **given) -> int:
        return torchrun(flags(output_dir=tmp_path / name, **settings, **given), environment).returncode

    assert train_on_two("whole", subprocess_environment) == 0
    assert train_on_two("cut", {**subprocess_environment, "DIE_IN": place, "DIE_RANKS": ranks}) != 0
    assert [line["step"] for line in run_at("cut").metrics] == [1, 2]
    assert train_on_two("cut", subprocess_environment, resume_from_checkpoint="latest") == 0
    assert run_at("cut").numbers() == run_at("whole").numbers()
    assert same_weights(run_at("cut").weights(), run_at("whole").weights())


@pytest.mark.slow
def test_a_process_that_raises_ends_all_within_a_minute_with_its_traceback_last(start, run_at, tmp_path):
    given = {**SETTINGS, "prompts_per_iteration": 2}
    given["reward_model"] = "failing_rewards:raises_on_rank_1"
    process, log = start("out", 2, **given), tmp_path / "out.log"
    wait_for(lambda: "on purpose" in log.read_text(), process, log)
    assert process.wait(TIME_LIMIT) != 0
    summary = log.read_text().rpartition(" failed first:\n")[2]
    assert summary.startswith("Traceback")
    assert "raised RuntimeError: on purpose (rank 1); no iteration was done" in summary.splitlines()[-1]


def test_a_disk_that_metrics_fill_stops_the_run_with_one_line(train, run_at, monkeypatch, capsys):
    real = Log.write

    def write(log, metrics):
        if metrics["step"] == 4:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "metrics.jsonl")
        real(log, metrics)

    whole = train("whole", **SETTINGS).numbers()
    with monkeypatch.context() as patched:
        patched.setattr(Log, "write", write)
        with pytest.raises(SystemExit) as stop:
            train("out", **SETTINGS)
    assert stop.value.code == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert "stopped: " in last and "No space left on device: 'metrics.jsonl'" in last and "resume_from" in last
    train("out", **SETTINGS, resume_from_checkpoint="latest")
    assert run_at("out").numbers() == whole


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_a_kill_in_the_middle_of_a_save_leaves_whole_checkpoints(start, train, run_at, tiny_flux, tmp_path, processes):
    """A killed process loses its unfinished checkpoint. If only the second process is killed, the first one finishes.

    A checkpoint is complete only after the base model's files are hashed. One of these files is replaced by a pipe, so
    that the writer waits until somebody writes to the pipe.
    """
    base, cut, log = tmp_path / "base", run_at("cut"), tmp_path / "cut.log"
    pipe = base / "transformer/pipe.json"
    shutil.copytree(tiny_flux, base)
    settings = {**SETTINGS, "max_train_steps": 60, "prompts_per_iteration": 2}
    process = start("cut", processes, **settings, pretrained_model_name_or_path=base)
    wait_for(lambda: bool(cut.checkpoints), process, log)
    os.mkfifo(pipe)
    wait_for(lambda: lines(cut.folder) >= 5, process, log)  # training goes on
    assert [path.name.split("-")[1] for path in cut.checkpoints] == ["2"]
    assert len(list(cut.folder.glob(".checkpoint-4-*.part"))) == 1
    if processes == 1:
        process.kill()
        pipe.unlink()
    else:
        os.kill(children(process.pid)[-1], signal.SIGKILL)
        with open(pipe, "wb"):
            pipe.unlink()
            pipe.touch()
    assert process.wait(TIME_LIMIT) != 0
    assert [path.name.split("-")[1] for path in cut.checkpoints] == (["2"] if processes == 1 else ["2", "4"])
    assert latest(cut.folder) == cut.checkpoints[-1]
    settings |= {"max_train_steps": 6, "pretrained_model_name_or_path": base}
    train("cut", **settings, resume_from_checkpoint="latest")
    assert [line["step"] for line in cut.metrics] == [1, 2, 3, 4, 5, 6] and not list(cut.folder.glob(".*"))


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_a_full_disk_stops_the_run_and_leaves_the_last_checkpoint(
    train, flags, run_at, tmp_path, subprocess_environment, processes
):
    """From the second checkpoint on, the operating system refuses files as large as the weights."""
    settings = {**SETTINGS, "max_train_steps": 2, "reward_model": "jpeg_compressibility", "prompts_per_iteration": 2}
    settings |= {"checkpoints_total_limit": 1}
    whole = train("whole", **settings)
    weights = (whole.checkpoints[0] / "diffusion_pytorch_model.safetensors").stat().st_size
    train("cut", **{**settings, "max_train_steps": 1})
    first = run_at("cut").checkpoints
    longer = {**settings, "max_train_steps": 50, "resume_from_checkpoint": "latest"}
    argv, log = flags(output_dir=tmp_path / "cut", **longer), tmp_path / "cut.log"
    if processes == 1:
        assert Script(TRAINER, argv, subprocess_environment, log, log, weights // 2).wait(TIME_LIMIT) == 1
        told = log.read_text()
    else:
        done = torchrun(argv, subprocess_environment, file_limit=weights // 2)
        assert done.returncode == 1
        told = done.stderr
    messages = re.findall(r"checkpoint-2-0 can't be written, with [\d.]+ GiB free there: .+", told)
    assert told.splitlines()[-1].endswith(*messages) and "Traceback" not in told
    assert processes > 1 or "File too large" in messages[0]
    assert lines(tmp_path / "cut") <= 4  # noticed during training, or by the next save
    assert run_at("cut").checkpoints == first and not list((tmp_path / "cut").glob(".*"))
    train("cut", **settings, resume_from_checkpoint="latest")
    assert same_weights(run_at("cut").weights(), whole.weights())


def test_a_checkpoint_that_cannot_be_written_is_removed_by_the_thread_that_writes_it(monkeypatch, tmp_path):
    """The run may end for another reason, such as a full disk under metrics.jsonl, and ask for no result."""

    def full(folder, *_):
        (folder / "half").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("fastvideo.runtime.checkpoint._write_weights", full)
    writer = CheckpointWriter(SimpleNamespace(config=None), None)
    with pytest.raises(OSError):
        writer._write(tmp_path / "checkpoint-1-0", {}, {".": {}}, None)
    assert not list(tmp_path.iterdir())
