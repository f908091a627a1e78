"""What a program checks about the folder it writes to, and what it leaves there."""

import errno
import fcntl
import json
import os
import pickle
import shutil
import signal
import socket
import threading
import time
from contextlib import suppress
from pathlib import Path

from fastvideo.cli import FlagError
from fastvideo.io import lock
from fastvideo.io.files import check_writable, write_json
from fastvideo.io.fingerprint import sample_file
from fastvideo.io.resumable import Journal
from fastvideo.runtime import checkpoint
from fastvideo.runtime.optimizer_files import tensors_only

import pytest
import torch
from conftest import TIME_LIMIT, torchrun

# --- places that can't be written to ----------------------------------------------------------------------------------


@pytest.mark.parametrize("file", [False, True])
@pytest.mark.parametrize("place", ["new/folder/x", "there/x"])
def test_a_place_that_can_be_written_to_is_left_as_it_was(tmp_path, file, place):
    (tmp_path / "there").mkdir()
    check_writable("output_dir", tmp_path / place, file)
    assert [path.name for path in tmp_path.rglob("*")] == ["there"]


@pytest.mark.parametrize(
    "place,file,problem",
    [
        ("/proc/x", False, "can't be written: "),  # read-only
        ("/proc/x/y.json", True, "can't be written: "),
        ("file", False, "file is not a folder"),
        ("file/x", False, "file is not a folder"),
        ("link/x", False, "link is not a folder"),  # to nowhere
        ("n" * 300, False, "File name too long"),
        (".", True, "is not a file"),
        ("/dev/null", True, "is not a file"),
    ],
)
def test_a_place_that_cant_be_written_to_is_named(tmp_path, place, file, problem):
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("nowhere")
    with pytest.raises(FlagError, match=problem):
        check_writable("output_dir", tmp_path / place, file)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "link"]


def test_a_place_that_is_too_small_is_named_with_what_is_needed(tmp_path):
    with pytest.raises(FlagError, match=r"needs 1048576.0 GiB .* but has [\d.]+ GiB free"):
        check_writable("output_dir", tmp_path, needed=1 << 50)


def test_a_full_disk_is_named(tmp_path, monkeypatch):
    def full(number):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(FlagError, match="can't be written: No space left on device"):
        check_writable("output_dir", tmp_path)


def test_a_file_system_that_refuses_fsync_still_gets_files(tmp_path, monkeypatch):
    def refuse(number):
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    monkeypatch.setattr(os, "fsync", refuse)
    check_writable("output_dir", tmp_path)
    write_json(tmp_path / "x.json", 1)
    assert Path(tmp_path / "x.json").read_text() == "1\n"


# --- one program per folder -------------------------------------------------------------------------------------------


@pytest.fixture
def child():
    """child(work) -> the number of a forked process that does `work`, writes "ready" and waits to be killed."""
    started = []

    def start(work):
        reading, writing = os.pipe()
        pid = os.fork()
        if not pid:
            try:
                work()
                os.write(writing, b"ready")
                time.sleep(TIME_LIMIT)
            finally:
                os._exit(3)
        started.append(pid)
        os.close(writing)
        assert os.read(reading, 5) == b"ready"
        os.close(reading)
        return pid

    yield start
    for pid in started:
        with suppress(ProcessLookupError, ChildProcessError):
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


@pytest.fixture
def without_file_locks(monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    monkeypatch.setattr(lock, "SETTLE", 0.1)


def take(folder: Path) -> None:
    """Takes the folder and gives it back."""
    with lock.FolderLock("output_dir", folder) as held:
        held.take()


@pytest.mark.parametrize("locks", [True, False])
def test_a_folder_of_a_living_or_stopped_process_is_refused_and_of_a_killed_one_is_free(
    request, child, tmp_path, locks
):
    if not locks:
        request.getfixturevalue("without_file_locks")
    pid = child(lambda: lock.FolderLock("output_dir", tmp_path).take())
    os.kill(pid, signal.SIGSTOP)
    with pytest.raises(FlagError, match=f"process {pid} on {socket.gethostname()} is working in it"):
        take(tmp_path)
    os.kill(pid, signal.SIGKILL)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)  # it has ended, but nobody has asked for its status yet
    take(tmp_path)
    assert not list(tmp_path.iterdir())


def other_machine(folder: Path, beat: int = 0) -> None:
    """The file of a process of another machine."""
    record = {"host": "elsewhere", "pid": 7, "started": "1", "machine": "another", "beat": beat}
    (folder / "run.lock").write_text(json.dumps(record))


def test_a_process_of_another_machine_counts_as_dead_without_a_sign_of_life(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "SILENCE", 1)
    other_machine(tmp_path)
    take(tmp_path)
    monkeypatch.setattr(lock, "SILENCE", TIME_LIMIT)
    other_machine(tmp_path)
    sign = threading.Timer(1, other_machine, (tmp_path, 1))
    sign.start()
    with pytest.raises(FlagError, match="process 7 on elsewhere is working in it"):
        take(tmp_path)
    sign.join()


def test_a_process_that_lost_its_folder_to_another_machine_ends(child, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(lock, "BEAT", 0.1)
    pid = child(lambda: lock.FolderLock("output_dir", tmp_path).take())
    other_machine(tmp_path)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 1
    assert "process 7 on elsewhere has taken" in capfd.readouterr().err
    assert json.loads((tmp_path / "run.lock").read_text())["host"] == "elsewhere"


def test_a_worker_that_outlives_its_run_keeps_nothing(child, tmp_path):
    with lock.FolderLock("output_dir", tmp_path) as held:
        held.take()
        child(lambda: None)
    take(tmp_path)


def test_of_programs_that_start_together_without_file_locks_one_gets_the_folder(
    child, tmp_path, without_file_locks, monkeypatch
):
    monkeypatch.setattr(lock, "SETTLE", 1)
    got = []

    def attempt():
        with suppress(FlagError):
            lock.FolderLock("output_dir", tmp_path / "run").take()
            (tmp_path / f"got.{os.getpid()}").touch()

    threads = [threading.Thread(target=lambda: got.append(child(attempt))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(list(tmp_path.glob("got.*"))) == 1


class Numbers(Journal[int, int]):
    def key(self, item: int) -> str:
        return str(item)


def test_two_evaluations_for_one_file_dont_mix_without_file_locks(child, tmp_path, without_file_locks):
    output = tmp_path / "scores.json"
    pid = child(lambda: Numbers(output, "these flags").keep(1, 2))
    with pytest.raises(FlagError, match="with other flags is under way"):
        Numbers(output, "other flags")
    assert Numbers(output, "these flags").has(1)
    os.kill(pid, signal.SIGKILL)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    Numbers(output, "these flags").remove()
    assert not list(tmp_path.iterdir())


@pytest.mark.slow(0.2)
def test_a_second_run_in_a_folder_ends_on_every_process_and_writes_nothing(flags, tmp_path, subprocess_environment):
    with lock.FolderLock("output_dir", tmp_path / "run") as held:
        held.take()
        done = torchrun(flags(prompts_per_iteration=2, resume_from_checkpoint="auto"), subprocess_environment)
        assert [path.name for path in (tmp_path / "run").iterdir()] == ["run.lock"]
    line = f"error: --output_dir {tmp_path / 'run'}: process {os.getpid()} on {socket.gethostname()} is working in it"
    assert done.returncode and done.stderr.count(line) == 1  # the first process says it for all


# --- start and start again --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", ["latest", "auto"])
def test_a_run_without_a_checkpoint_starts_again_and_its_files_are_set_aside(train, run_at, tmp_path, capsys, value):
    (tmp_path / "out/images").mkdir(parents=True)
    for name in ("metrics.jsonl", "args.json", "images/iteration_000001.png"):
        (tmp_path / "out" / name).write_text('{"step": 1, "dead": 1}\n')
    (tmp_path / "out/mine.txt").write_text("not of a run")
    train("out", max_train_steps=1, resume_from_checkpoint=value)
    (line,) = run_at("out").metrics
    assert line["step"] == 1 and "dead" not in line
    aside = tmp_path / "out/superseded/run.0"
    assert (aside / "metrics.jsonl").read_text() == '{"step": 1, "dead": 1}\n'
    assert sorted(path.name for path in aside.iterdir()) == ["args.json", "images", "metrics.jsonl"]
    assert (tmp_path / "out/mine.txt").exists() and not (tmp_path / "out/images").exists()
    assert f"the run starts from the beginning; what was there is in {aside}" in capsys.readouterr().out


@pytest.mark.parametrize("dry_run", [False, True])
@pytest.mark.parametrize("name", ["images", "evaluation", "rl_embeddings", "superseded", "args.json", "metrics.jsonl"])
def test_a_folder_in_which_a_run_could_not_write_its_files_is_refused_first(refused, train, tmp_path, name, dry_run):
    """As a file where a folder has to be, or the other way round."""
    place = tmp_path / "out" / name
    place.mkdir(parents=True)
    if "." not in name:
        place.rmdir()
        place.write_text("mine")
    with refused(f"--output_dir .*{name}"):
        train("out", resume_from_checkpoint="auto", dry_run=dry_run)
    assert [path.name for path in (tmp_path / "out").iterdir()] == [name]


def test_auto_starts_a_run_and_goes_on_with_it(train):
    for steps in (1, 2):
        run = train("out", max_train_steps=steps, resume_from_checkpoint="auto")
    assert [line["step"] for line in run.metrics] == [1, 2] and not (run.folder / "superseded").exists()


def test_a_folder_copied_without_links_goes_on(train, run_at, tmp_path):
    run = train("out", max_train_steps=1)
    shutil.copytree(run.folder, tmp_path / "copy")  # follows links
    assert (tmp_path / "copy/latest").is_dir() and not (tmp_path / "copy/latest").is_symlink()
    shutil.rmtree(run.checkpoints[-1])
    (run.folder / "latest").unlink()
    shutil.copytree(tmp_path / "copy/latest", run.folder / "latest")  # a folder `latest` alone
    for name, value in (("copy", tmp_path / "copy/latest"), ("out", "latest")):
        train(name, max_train_steps=2, resume_from_checkpoint=value)
        assert [line["step"] for line in run_at(name).metrics] == [1, 2]
        assert os.readlink(tmp_path / name / "latest") == run_at(name).checkpoints[-1].name
        assert [path.name for path in run_at(name).checkpoints] == ["checkpoint-1-0", "checkpoint-2-0"]
    assert [path.name for path in (tmp_path / "copy/superseded").iterdir()] == ["latest.0"]


def test_a_disk_without_links_keeps_the_best_checkpoint_and_names_it(tmp_path, monkeypatch, warned):
    def refuse(*_, **__):
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    best = {"iteration": 2, "value": 1.0, "measure": "x"}
    for iteration in (1, 2, 3, 10):
        (tmp_path / f"checkpoint-{iteration}-0").mkdir()
        write_json(tmp_path / f"checkpoint-{iteration}-0/checkpoint.json", {"format": 1, "best": best})
    checkpoint.point_to(tmp_path, best)
    monkeypatch.setattr(os, "symlink", refuse)
    with warned("gets no link `latest`: Operation not permitted"):
        checkpoint.point_to(tmp_path, best)
    checkpoint._rotate(tmp_path, 1, best)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-10-0", "checkpoint-2-0"]
    assert checkpoint.linked(tmp_path / "best/ema", "model_path") == tmp_path / "checkpoint-2-0/ema"
    assert checkpoint.linked(tmp_path / "latest", "model_path") == tmp_path / "checkpoint-10-0"


# --- files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lora", [True, False])
def test_every_file_of_a_run_has_the_mode_that_the_umask_gives(train, lora):
    before = os.umask(0o027)
    try:
        run = train("out", max_train_steps=1, use_lora=lora, ema_decay=0.5, image_log_steps=1)
    finally:
        os.umask(before)
    modes = {path.relative_to(run.folder): path.stat().st_mode & 0o777 for path in run.folder.rglob("*")}
    files = {path: mode for path, mode in modes.items() if (run.folder / path).is_file()}
    assert len(files) > 7 and set(files.values()) == {0o640}, files


class Evil:
    """An object whose pickle makes a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


def test_a_checkpoint_with_code_in_it_is_refused_and_its_code_is_not_run(train, tmp_path, refused):
    run = train("out", max_train_steps=1)
    metadata, record = (run.checkpoints[0] / name for name in ("optimizer/.metadata", "checkpoint.json"))
    metadata.write_bytes(pickle.dumps(Evil(tmp_path / "ran")))
    entries = json.loads(record.read_text())
    del entries["record_sha256"]
    entries["files"]["optimizer/.metadata"] = sample_file(metadata)
    write_json(record, entries)
    with refused("--resume_from_checkpoint .*optimizer/.metadata can't be read: it names posix.mkdir"):
        train("out", max_train_steps=2, resume_from_checkpoint="latest")
    torch.save({"optimizer": Evil(tmp_path / "ran")}, tmp_path / "deepspeed.pt")
    with pytest.raises(pickle.UnpicklingError), tensors_only():
        torch.load(tmp_path / "deepspeed.pt", weights_only=False)  # as DeepSpeed calls it
    assert not (tmp_path / "ran").exists()
