"""Runs scripts in processes forked from a process that has imported the trainer. Each does the same as
`python SCRIPT ARGUMENTS`, without the seconds of imports. Tests of torchrun itself start the real torchrun.
"""

import multiprocessing
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

ROOT = Path(__file__).parents[1]
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["fastvideo.train_grpo_flux", "deepspeed.comm.torch"])
GRACE = 30  # seconds in which the other processes may end after one has failed, as with torchrun


def _run(
    script: str, argv: list[str], environment: dict[str, str], log: tuple[str, str], file_limit: int | None
) -> None:
    """Runs in the forked process."""
    os.setsid()
    os.chdir(ROOT)
    for number, path in enumerate(log, start=1):
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, number)
        os.close(file)
    os.environ.clear()
    os.environ.update(environment)
    if file_limit is not None:
        import resource

        resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))
    import torch

    torch.set_num_threads(1)
    sys.argv = [script, *argv]
    added = environment.get("PYTHONPATH", "").split(os.pathsep)
    sys.path[:0] = [str((ROOT / script).parent), *added]
    runpy.run_path(str(ROOT / script), run_name="__main__")


class Script:
    """A script in a separate process and session, with some methods of subprocess.Popen."""

    def __init__(
        self,
        script: str,
        argv: Sequence[object],
        environment: Mapping[str, str],
        stdout: Path,
        stderr: Path,
        file_limit: int | None = None,
    ) -> None:
        """file_limit: the largest size in bytes of a file that the script may write."""
        given = (script, list(map(str, argv)), dict(environment), (str(stdout), str(stderr)), file_limit)
        self._process = CONTEXT.Process(target=_run, args=given)
        self._process.start()
        self.pid = self._process.pid

    def poll(self) -> int | None:
        """The exit status, −N after signal N, None while it runs."""
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        """The exit status when it has ended."""
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired("a forked script", timeout)
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            with suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def kill_session(self) -> None:
        """Kills the process and all processes that it has started."""
        with suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)


def run_together(
    script: str,
    argv: Sequence[object],
    environment: Mapping[str, str],
    processes: int,
    timeout: float,
    file_limit: int | None = None,
) -> subprocess.CompletedProcess:
    """Runs a script like torchrun on one machine: if a process fails, ends the others and returns status 1."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    place = {"WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    place |= {"GROUP_RANK": 0, "GROUP_WORLD_SIZE": 1}
    deadline = time.monotonic() + timeout
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder, name) for name in ("stdout", "stderr")]
        started = []
        for rank in range(processes):
            variables = {name: str(value) for name, value in {**place, "RANK": rank, "LOCAL_RANK": rank}.items()}
            started.append(Script(script, argv, {**environment, **variables}, *files, file_limit))
        try:
            while any(one.poll() is None for one in started):
                if any(one.poll() for one in started):
                    deadline = min(deadline, time.monotonic() + GRACE)
                    for one in started:
                        one.terminate()
                if time.monotonic() > deadline:
                    if not any(one.poll() for one in started):
                        raise subprocess.TimeoutExpired(f"{processes} processes of {script}", timeout)
                    break
                time.sleep(0.05)
        finally:
            for one in started:
                one.kill_session()
        failed = any(one.wait() for one in started)
        return subprocess.CompletedProcess([script, *argv], int(failed), *(file.read_text() for file in files))
