"""Starts torchrun on every node of a hostfile; the recipes call it when HOSTFILE is set. Standard library only.

    HOSTFILE=data/hosts/hostfile bash scripts/finetune/finetune_flux_grpo_MixGRPO.sh --parallel fsdp --dry_run

`launch.py --node` runs on each node. From standard input it reads a line of JSON with the command and environment, then
signals to pass on. So no key is in a process's arguments, and a node that loses the launcher sees the end of its input
and stops. Variables: docs/distributed.md, "Several nodes".
"""

import contextlib
import fnmatch
import json
import math
import os
import random
import re
import select
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from pathlib import Path
from typing import IO, NamedTuple

ROOT = Path(__file__).resolve().parents[2]
SELF = [sys.executable, str(Path(__file__).resolve())]
REMOTE_SHELL = "ssh -o BatchMode=yes -o ConnectTimeout=15 -o ServerAliveInterval=30"
PASSED = (
    "NCCL_* GLOO_* TORCH_* TORCHELASTIC_* PYTORCH_* CUDA_* OMP_* HF_* TOKENIZERS_* WANDB_* SWANLAB_* TRACKIO_* "
    "PYTHONPATH UNIFIED_REWARD_API_KEY"
)
BY_HAND = "hand"  # LAUNCHER=hand: the recipe is started on every node, each with its INDEX_CUSTOM
JOB = "FASTVIDEO_LAUNCH"  # environment variable that marks all processes of a node, whatever their parent is
PATIENCE = 5  # seconds in which the other nodes may end by themselves after one has failed
DRY_RUN = r"--dry[-_]run|dry_run=[Tt]rue"
PIPE_SIZE = 2**16  # bytes that a pipe holds before anybody reads


class Node(NamedTuple):
    """A line of the hostfile."""

    host: str
    slots: int

    @property
    def is_here(self) -> bool:
        return self.host in ("localhost", "127.0.0.1", socket.gethostname())

    def argv(self, *command: str) -> list[str]:
        """Arguments that run `command` on the node."""
        return list(command) if self.is_here else [*remote_shell(), self.host, f"exec {shlex.join(command)}"]


def remote_shell() -> list[str]:
    return shlex.split(os.environ.get("REMOTE_SHELL") or REMOTE_SHELL)


def read_hostfile(path: str, default_slots: str) -> list[Node]:
    """Reads one host per line, with an optional `slots=N`; # starts a comment.

    Raises:
        ValueError: with the mistake and its line.
    """
    try:
        lines = (ROOT / path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"HOSTFILE {path}: can't be read: {error}") from error
    if not re.fullmatch("[1-9][0-9]*", default_slots):
        raise ValueError(f"NPROC_PER_NODE {default_slots}: give a number of processes, at least 1")
    nodes: list[Node] = []
    for number, line in enumerate(lines, 1):
        words = line.split("#")[0].split()
        if not words:
            continue
        host, option, *more = [*words, f"slots={default_slots}"]
        slots = re.fullmatch("slots=([1-9][0-9]*)", option)
        where = f"HOSTFILE {path}, line {number}"
        if not re.fullmatch(r"[A-Za-z0-9][\w.-]*", host):
            raise ValueError(f"{where}: {host} is no host name")
        if slots is None or len(more) > 1:
            raise ValueError(
                f"{where}: {' '.join(words[1:])}; after a host write slots=N with N at least 1, or nothing"
            )
        if host in (node.host for node in nodes):
            raise ValueError(f"{where}: {host} is listed twice; use slots=N for several processes")
        nodes.append(Node(host, int(slots[1])))
    if not nodes:
        raise ValueError(f"HOSTFILE {path}: names no host")
    loopback = [node.host == "localhost" or node.host.startswith("127.") for node in nodes]
    if loopback[0] and not all(loopback):
        raise ValueError(f"HOSTFILE {path}: others can't reach the first host, the master, as {nodes[0].host}")
    return nodes


def torchrun(nodes: list[Node], rank: int, port: str, args: list[str]) -> list[str]:
    """The torchrun command of node `rank`. args: a script or -m MODULE, and its arguments."""
    place = {"nnodes": len(nodes), "nproc_per_node": nodes[rank].slots, "node_rank": rank}
    place |= {"master_addr": nodes[0].host, "master_port": port}
    flags = [word for name, value in place.items() for word in (f"--{name}", str(value))]
    return [sys.executable, "-m", "fastvideo.torchrun", *flags, *args]


def passed_environment() -> dict[str, str]:
    """The environment variables for the nodes: all that match a pattern in PASSED or PASS_ENV (* matches any text)."""
    patterns = [*PASSED.split(), *re.split(r"[\s,]+", os.environ.get("PASS_ENV", ""))]
    return {k: v for k, v in os.environ.items() if any(fnmatch.fnmatchcase(k, pattern) for pattern in patterns)}


def free_port() -> int:
    """A free port below the system's range for outgoing connections, so that none takes it before torchrun does."""
    while True:
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("", port := random.randrange(20000, 32000)))
            return port


def say(text: str) -> None:
    print(f"launch.py: {text}", file=sys.stderr, flush=True)


# --- on the machine where the recipe was called -----------------------------------------------------------------------


def choose_launcher(nodes: list[Node]) -> str:
    """The launcher: pdsh, ssh or `hand`, from LAUNCHER; `here` if all nodes are this machine."""
    chosen = os.environ.get("LAUNCHER") or ("pdsh" if shutil.which("pdsh") else "ssh")
    if chosen == BY_HAND:
        return chosen
    if all(node.is_here for node in nodes):
        return "here"
    needed = {"pdsh": ["pdsh", remote_shell()[0]], "ssh": [remote_shell()[0]]}
    if chosen not in needed:
        raise ValueError(f"LAUNCHER {chosen}: unknown; choose from pdsh, ssh, {BY_HAND}")
    for program in needed[chosen]:
        if not shutil.which(program):
            raise ValueError(
                f"LAUNCHER {chosen}: {program} is not installed; choose from pdsh, ssh, or set REMOTE_SHELL"
            )
    return chosen


def ask_for_port(master: Node) -> str:
    """A port that is free on the master."""
    command = master.argv(*SELF, "--free_port")
    done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True)
    *_, port = ["", *done.stdout.split()]  # a login may have printed something before
    if done.returncode or not port:
        raise ValueError(f"{master.host}: {SELF[0]} does not run there (status {done.returncode}); nothing was started")
    return port


def make_orders(nodes: list[Node], port: str, args: list[str]) -> list[bytes]:
    """The first line that each node reads: JSON with name, command, environment, and the mark of its processes."""
    job, environment = uuid.uuid4().hex, passed_environment()
    orders = [
        {"name": node.host, "command": torchrun(nodes, i, port, args), "environment": environment, "job": f"{job}-{i}"}
        for i, node in enumerate(nodes)
    ]
    lines = [json.dumps(order).encode() + b"\n" for order in orders]
    if max(map(len, lines)) > PIPE_SIZE:
        raise ValueError(f"PASS_ENV: arguments and environment exceed {PIPE_SIZE} bytes; name fewer variables")
    return lines


def start(nodes: list[Node], launcher: str, folder: Path) -> list[subprocess.Popen]:
    """Starts `launch.py --node` on all nodes. Node i reads the fifo folder/i, at its end it writes to folder/status."""
    cases = " ".join(f"{i}) {shlex.join(node.argv(*SELF, '--node'))};;" for i, node in enumerate(nodes))
    script, quoted = folder / "node.sh", shlex.quote(str(folder))
    script.write_text(f"""cd {quoted}
(case $1 in {cases} esac) <$1
status=$?
if kill -0 {os.getpid()} 2>/dev/null; then echo $1 $status 1<>status; else rm -rf {quoted}; fi
""")  # <> because opening a fifo with > would wait for a reader
    if launcher == "pdsh":  # its exec module runs a local command per host; %n is the host's index
        hosts = ",".join(node.host for node in nodes)
        commands = [["pdsh", "-R", "exec", "-N", "-f", str(len(nodes)), "-w", hosts, "sh", str(script), "%n"]]
    else:
        commands = [["sh", str(script), str(i)] for i in range(len(nodes))]
    # In new sessions, so that a terminal's Ctrl-C reaches only this process, which passes it on.
    return [subprocess.Popen(c, stdin=subprocess.DEVNULL, start_new_session=True) for c in commands]


def run_nodes(nodes: list[Node], launcher: str, orders: list[bytes]) -> int:
    """Runs all nodes to their end. Stops all nodes when one fails or a signal comes. Returns the exit status."""
    running = dict(enumerate(nodes))
    signals: list[int] = []
    first, deadline = None, math.inf
    with tempfile.TemporaryDirectory(prefix="launch-") as folder:
        pipes = []
        for name in [*running, "status"]:
            os.mkfifo(path := Path(folder, str(name)), 0o600)
            pipes.append(os.open(path, os.O_RDWR))
        *inputs, status = pipes
        for pipe, order in zip(inputs, orders, strict=True):
            os.write(pipe, order)

        def tell(number: int) -> None:
            for i in list(running):
                os.write(inputs[i], b"%d\n" % number)

        def on_signal(number: int, _frame: object) -> None:
            signals.append(number)
            if len(signals) == 1:
                say(f"{signal.Signals(number).name}: all nodes are told to end; a second signal ends them at once")
                tell(signal.SIGINT if number == signal.SIGINT else signal.SIGTERM)

        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            if signal.getsignal(number) != signal.SIG_IGN:  # nohup ignores SIGHUP, and the nodes must too
                signal.signal(number, on_signal)
        processes = start(nodes, launcher, Path(folder))
        while running and time.monotonic() < deadline + 2 * PATIENCE:
            readable = select.select([status], [], [], 0.5)[0]
            ended = [map(int, line.split()) for line in os.read(status, PIPE_SIZE).splitlines()] if readable else []
            if not readable and all(process.poll() is not None for process in processes):
                ended = [(i, 255) for i in running]  # killed from outside
            for i, code in ended:
                host = running.pop(i).host
                if code and first is None:
                    first = (code, f"{host} (node {i}) ended first, with status {code}")
                    if running and not signals:
                        say(f"{host} (node {i}) failed; the others have {PATIENCE} seconds to end")
                        deadline = time.monotonic() + PATIENCE
            if len(signals) > 1:
                deadline = min(deadline, time.monotonic())
            if time.monotonic() >= deadline:
                tell(signal.SIGKILL)
        if running:
            say(f"no answer from {', '.join(node.host for node in running.values())}: look for processes there")
        for process in processes:
            if running:
                process.kill()
            process.wait()
    if running or first:
        code, text = first or (1, "stopped by a signal")
        say(text)
        return 128 + signals[0] if signals else code
    return 0


# --- on a node --------------------------------------------------------------------------------------------------------


def run_node() -> int:
    """Runs the command read from standard input until it ends, or until the input ends. Returns its exit status."""
    orders = open(0, "rb", buffering=0)  # noqa: SIM115  (unbuffered: a thread waits in it when this process ends)
    order = json.loads(orders.readline())
    environment = {**os.environ, **order["environment"], JOB: order["job"]}
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    child = subprocess.Popen(order["command"], cwd=ROOT, env=environment, start_new_session=True, **pipes)
    first = threading.Lock()

    def stop(number: int) -> None:
        """Signals torchrun once only: at a third signal torchrun ends without waiting for its processes to save."""
        if first.acquire(blocking=False):
            child.send_signal(number)

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda *_: stop(signal.SIGTERM))

    def obey() -> None:
        for line in orders:
            if int(line) == signal.SIGKILL:
                kill(order["job"])
            else:
                stop(int(line))
        stop(signal.SIGTERM)  # the launcher is gone
        torchrun_waits = float(environment.get("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", 30))
        time.sleep(torchrun_waits + PATIENCE)
        kill(order["job"])

    threading.Thread(target=obey, daemon=True).start()
    prefix = f"{order['name']}: ".encode()
    outputs = ((child.stdout, 1), (child.stderr, 2))
    pumps = [threading.Thread(target=pump, args=(*output, prefix), daemon=True) for output in outputs]
    for thread in pumps:
        thread.start()
    if status := child.wait():
        kill(order["job"])  # the processes that a killed torchrun leaves behind
    for thread in pumps:
        thread.join(PATIENCE)  # with a limit, because a daemon may keep the output open
    return status if status >= 0 else 128 - status


def pump(source: IO[bytes], target: int, prefix: bytes) -> None:
    """Copies lines to a file descriptor, each with a prefix. Progress bars, which start with \\r, become lines too."""
    rest = b""
    while chunk := os.read(source.fileno(), PIPE_SIZE):
        *lines, rest = re.split(rb"[\r\n]+", rest + chunk)
        if chunk.startswith(b"\r"):
            lines, rest = [*lines, rest], b""
        with contextlib.suppress(BrokenPipeError):  # without a launcher the command still ends normally
            os.write(target, b"".join(prefix + line + b"\n" for line in lines if line))
    with contextlib.suppress(BrokenPipeError):
        os.write(target, prefix + rest + b"\n" if rest else b"")


def kill(job: str) -> None:
    """Kills all processes that carry the job's mark."""
    mark = f"{JOB}={job}".encode()
    for path in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):  # ended meanwhile, or another user's
            if mark in path.read_bytes().split(b"\0"):
                os.kill(int(path.parent.name), signal.SIGKILL)


# --- command line -----------------------------------------------------------------------------------------------------


def run_on_each(nodes: list[Node], script: str) -> int:
    """Runs a shell script on one node after the other (nodes may share a home); $1 is the node's index."""
    runs = [subprocess.run(n.argv("sh", "-s", str(i)), input=script, text=True) for i, n in enumerate(nodes)]
    return max(run.returncode for run in runs)


def launch(nodes: list[Node], args: list[str]) -> int:
    """Starts all nodes. With LAUNCHER=hand, starts only this machine's node, INDEX_CUSTOM; with --dry_run, none."""
    index, port = os.environ.get("INDEX_CUSTOM", ""), os.environ.get("MASTER_PORT")
    launcher = choose_launcher(nodes)
    if launcher == BY_HAND:
        if index not in map(str, range(len(nodes))):
            raise ValueError(f"INDEX_CUSTOM {index or 'is not set'}: the hostfile has nodes 0 to {len(nodes) - 1}")
        port = port or "29500"  # nodes started by hand can't ask the first one
        say(f"INDEX_CUSTOM={index}: starts only node {index} of {len(nodes)}; unset LAUNCHER to start all nodes")
    elif index:
        say(f"INDEX_CUSTOM={index} isn't used: starts all nodes; LAUNCHER={BY_HAND} starts only this one")
        index = ""
    if any(re.fullmatch(DRY_RUN, arg) for arg in args):
        world = {"WORLD_SIZE": str(sum(node.slots for node in nodes)), "LOCAL_WORLD_SIZE": str(nodes[0].slots)}
        world["GROUP_WORLD_SIZE"] = str(len(nodes))
        if status := subprocess.run([sys.executable, *args], cwd=ROOT, env={**os.environ, **world}).returncode:
            return status
        for i in [int(index)] if index else range(len(nodes)):
            real = [arg for arg in args if not re.fullmatch(DRY_RUN, arg)]
            command = shlex.join(torchrun(nodes, i, port or "FREE_PORT", real))
            print(f"{nodes[i].host}: cd {shlex.quote(str(ROOT))} && {command}")
        print(f"launcher: {launcher}; environment passed: {' '.join(sorted(passed_environment()))}")
        return 0
    if index:
        os.chdir(ROOT)
        os.execv(sys.executable, torchrun(nodes, int(index), port, args))
    port = port or ask_for_port(nodes[0])
    orders = make_orders(nodes, port, args)
    size = f"nodes: {len(nodes)}, processes: {sum(n.slots for n in nodes)}"
    say(f"{size} ({launcher}), master {nodes[0].host}:{port}")
    return run_nodes(nodes, launcher, orders)


def main(args: list[str]) -> int:
    """args: a script and its arguments for torchrun; or --node, --free_port, or --each (a shell script is on stdin)."""
    if args == ["--node"]:
        return run_node()
    if args == ["--free_port"]:
        print(free_port())
        return 0
    if args in (["-h"], ["--help"]):
        print(__doc__)
        return 0
    if not os.environ.get("HOSTFILE"):
        raise ValueError("HOSTFILE is not set: it names the file with the machines, one per line (--help)")
    nodes = read_hostfile(os.environ["HOSTFILE"], os.environ.get("NPROC_PER_NODE") or "1")
    return run_on_each(nodes, sys.stdin.read()) if args == ["--each"] else launch(nodes, args)


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except ValueError as error:
        print(f"launch.py: error: {error}", file=sys.stderr)
        sys.exit(2)
