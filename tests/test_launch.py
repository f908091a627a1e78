"""Recipes on several nodes: real ssh and pdsh to a throw-away sshd on loopback addresses, real torchrun, real kills.

Most tests start stub_trainer.py, which answers signals as the trainer does and loads nothing. The long test run starts
the trainer itself in the same tests.
"""

import getpass
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from conftest import ROOT, TIME_LIMIT, Run, assert_same_update, relative_difference
from test_checkpoints import lines, wait_for

FINETUNE = ROOT / "scripts/finetune"
RECIPE = FINETUNE / "finetune_flux_grpo_MixGRPO.sh"
STUB = ROOT / "tests/stub_trainer.py"
HOSTS = ("127.0.0.2", "127.0.0.3")
FOUR_PROMPTS = {"prompts_per_iteration": 4, "parallel": "ddp", "learning_rate": 1e-5}
ENDLESS = {**FOUR_PROMPTS, "max_train_steps": 500, "checkpointing_steps": 500}
LAUNCHERS = ("ssh", "pdsh")
SECRET = "sesame-open-93157"


def program(name: str) -> str:
    """Path of a program. Skips the test if the program is missing, except in CI."""
    path = shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin")
    if path is None and not os.environ.get("CI"):
        pytest.skip(f"no {name} here (apt-get install openssh-server pdsh shellcheck)")
    assert path, f"no {name}: .ci/run installs it"
    return path


@pytest.fixture(scope="session")
def ssh(tmp_path_factory) -> Iterator[Path]:
    """A folder with ssh_config for HOSTS, and with home directories of these names."""
    folder = tmp_path_factory.mktemp("ssh")
    sshd, keygen = program("sshd"), program("ssh-keygen")
    for key in ("key", "host_key"):
        subprocess.run([keygen, "-q", "-t", "ed25519", "-N", "", "-f", folder / key], check=True)
    with socket.socket() as probe:
        probe.bind((HOSTS[0], 0))
        port = probe.getsockname()[1]
    server = [f"Port {port}", *(f"ListenAddress {host}" for host in HOSTS), f"HostKey {folder}/host_key"]
    server += [f"AuthorizedKeysFile {folder}/key.pub", "StrictModes no", "UsePAM no", "PidFile none"]
    for host in HOSTS:
        (folder / host).mkdir()
        server += [f"Match LocalAddress {host}", f"SetEnv HOME={folder / host}"]
    (folder / "sshd_config").write_text("\n".join(server) + "\n")
    (folder / "ssh_config").write_text(
        f"Port {port}\nUser {getpass.getuser()}\nIdentityFile {folder}/key\nIdentitiesOnly yes\nBatchMode yes\n"
        "UserKnownHostsFile /dev/null\nStrictHostKeyChecking no\nLogLevel ERROR\n"
    )
    if os.geteuid() == 0:
        Path("/run/sshd").mkdir(exist_ok=True)
    with open(folder / "sshd.log", "w") as log:
        daemon = subprocess.Popen([sshd, "-D", "-e", "-f", folder / "sshd_config"], stderr=log)
    try:
        wait_for(lambda: (folder / "sshd.log").read_text().count("listening") == 2, daemon, folder / "sshd.log")
        yield folder
    finally:
        daemon.terminate()
        daemon.wait()


@pytest.fixture
def hostfile(tmp_path) -> Path:
    path = tmp_path / "hosts"
    path.write_text(f"# two nodes\n\n{HOSTS[0]} slots=2  # the master\n{HOSTS[1]}\n")
    return path


@pytest.fixture
def environment(subprocess_environment, hostfile) -> dict[str, str]:
    """Environment of a recipe on the hostfile, without launcher settings from outside."""
    settings = ("MASTER_PORT", "INDEX_CUSTOM", "LAUNCHER", "REMOTE_SHELL", "PASS_ENV")
    kept = {k: v for k, v in subprocess_environment.items() if k not in settings}
    return {**kept, "PYTHON_BIN": sys.executable, "HOSTFILE": str(hostfile), "NPROC_PER_NODE": "2"}


@pytest.fixture(params=["stub", pytest.param("trainer", marks=pytest.mark.long)])
def trainer(request) -> str:
    """The trainer that `start` starts."""
    return request.param


@pytest.fixture
def start(flags, tmp_path, environment, ssh, trainer) -> Iterator:
    """start(name, launcher, *flags of the stub, flag=value, ...) -> the launcher of a run in the background.

    The output is in name.log. All processes, on whatever node, have MARK in their environment, and a secret key.
    """
    launched = []
    # Workers make sockets in this folder, and paths of sockets must be short.
    (tmp_path / "tmp").mkdir()
    short = Path(tempfile.mkdtemp(), "t")
    short.symlink_to(tmp_path / "tmp")
    secrets = {"HF_TOKEN": SECRET, "PASS_ENV": "MARK,OTHER_*", "OTHER_KEY": SECRET, "MARK": uuid.uuid4().hex}

    def run(name: str, launcher: str, *of_stub: str, **given) -> subprocess.Popen:
        program(launcher)
        remote = {"LAUNCHER": launcher, "REMOTE_SHELL": f"ssh -F {ssh}/ssh_config", "TMPDIR": str(short)}
        command = [sys.executable, FINETUNE / "launch.py", STUB, "--output_dir", tmp_path / name, *of_stub]
        if trainer == "trainer":
            command = ["bash", RECIPE, *flags(output_dir=tmp_path / name, **{**FOUR_PROMPTS, **given})]
        with open(tmp_path / f"{name}.log", "w") as log:
            process = subprocess.Popen(
                command, env={**environment, **secrets, **remote}, stdout=log, stderr=log, cwd=tmp_path
            )
        process.mark = secrets["MARK"]
        launched.append(process)
        return process

    yield run
    for process in launched:
        process.kill()
        process.wait()
        for pid in marked(process.mark):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    shutil.rmtree(short.parent)


def everybody(what: str) -> dict[int, list[str]]:
    """`environ` or `cmdline` of every process on this machine."""
    found = {}
    for path in Path("/proc").glob(f"[0-9]*/{what}"):
        try:
            found[int(path.parent.name)] = path.read_bytes().decode(errors="replace").split("\0")
        except OSError:  # it has ended
            continue
    return found


def marked(mark: str) -> list[int]:
    return [pid for pid, variables in everybody("environ").items() if f"MARK={mark}" in variables]


def torchrun_of(mark: str, rank: int) -> int:
    """The process of `torchrun` on a node."""
    commands = everybody("cmdline")
    on_node = f"--node_rank\0{rank}"
    (pid,) = (p for p in marked(mark) if on_node in "\0".join(commands.get(p, [])))
    return pid


def wait_until_gone(mark: str) -> None:
    deadline = time.monotonic() + TIME_LIMIT
    while left := marked(mark):
        assert time.monotonic() < deadline, [everybody("cmdline").get(pid) for pid in left]
        time.sleep(0.1)


def check_log(log: Path, launcher: str, processes: int = 4) -> list[str]:
    """Checks that each line of the log names its node. Returns the lines."""
    output = log.read_text().splitlines()
    assert output[0].startswith(f"launch.py: nodes: 2, processes: {processes} ({launcher}), master 127.0.0.2:")
    assert all(line.startswith(tuple(f"{host}: " for host in HOSTS)) for line in output[1:]), output
    return output[1:]


@pytest.mark.slow
@pytest.mark.parametrize("trainer", ["trainer"])
def test_two_nodes_train_what_one_process_trains(start, train, hostfile, tmp_path):
    hostfile.write_text("".join(f"{host} slots=1\n" for host in HOSTS))
    given = {"reward_model": "custom_rewards:rough_brightness"}
    process, log = start("two", "pdsh", **given), tmp_path / "two.log"
    assert process.wait(TIME_LIMIT) == 0, log.read_text()[-4000:]
    one, two = train(**{**FOUR_PROMPTS, **given, "parallel": "none"}), Run(tmp_path / "two")
    assert_same_update(two, one)
    said = "\n".join(line for line in check_log(log, "pdsh", processes=2) if line.startswith(HOSTS[0]))
    assert "16 images per iteration on 2 processes" in said and "training 2/2; reward" in said


@pytest.mark.slow
@pytest.mark.parametrize("trainer", ["stub"])
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_all_processes_of_all_nodes_run_and_say_where(start, tmp_path, launcher):
    process, log = start("run", launcher, "--ends"), tmp_path / "run.log"
    assert process.wait(TIME_LIMIT) == 0, log.read_text()[-4000:]
    said = {line for line in check_log(log, launcher) if "rank" in line}
    assert said == {f"{host}: rank {rank} of 4" for rank, host in enumerate([HOSTS[0]] * 2 + [HOSTS[1]] * 2)}


@pytest.mark.long
@pytest.mark.parametrize("trainer", ["trainer"])
def test_two_nodes_train_exactly_what_one_node_trains_with_either_launcher(start, flags, environment, tmp_path):
    alone = {**environment, "HOSTFILE": "", "NPROC_PER_NODE": "4"}
    command = ["bash", RECIPE, *flags(output_dir=tmp_path / "one", **FOUR_PROMPTS)]
    subprocess.run(command, env=alone, timeout=TIME_LIMIT, capture_output=True, check=True)
    one = Run(tmp_path / "one")
    assert len(one.metrics) == 2
    for launcher in LAUNCHERS:
        process, log = start(launcher, launcher), tmp_path / f"{launcher}.log"
        assert process.wait(TIME_LIMIT) == 0, log.read_text()[-4000:]
        two = Run(tmp_path / launcher)
        assert one.numbers() == two.numbers()
        assert relative_difference(one.gradient(), two.gradient()) < 1e-6


@pytest.mark.long
@pytest.mark.parametrize("trainer", ["trainer"])
def test_shards_within_a_node_and_copies_between_nodes_train_the_same(start, train, tmp_path, hostfile):
    hostfile.write_text("\n".join(HOSTS))
    given = {"prompts_per_iteration": 4, "reward_model": "custom_rewards:rough_brightness", "parallel": "fsdp"}
    process = start("two", "ssh", **given, fsdp_sharding_startegy="hybrid_full")
    assert process.wait(TIME_LIMIT) == 0, (tmp_path / "two.log").read_text()[-4000:]
    one, two = train(**{**FOUR_PROMPTS, **given, "parallel": "none"}), Run(tmp_path / "two")
    assert relative_difference(two.gradient(), one.gradient()) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_node_that_fails_stops_the_others_and_gives_its_status(start, tmp_path, launcher):
    process, log = start("run", launcher, **ENDLESS), tmp_path / "run.log"
    wait_for(lambda: lines(tmp_path / "run") >= 1, process, log)
    os.kill(torchrun_of(process.mark, 1), signal.SIGKILL)  # leaves its children behind
    assert process.wait(TIME_LIMIT) == 128 + signal.SIGKILL
    wait_until_gone(process.mark)
    assert log.read_text().splitlines()[-1] == "launch.py: 127.0.0.3 (node 1) ended first, with status 137"


@pytest.mark.slow
def test_a_process_that_raises_stops_all_nodes(start, tmp_path, trainer):
    given = {**ENDLESS, "reward_model": "failing_rewards:raises_on_rank_1"}
    process, log = start("run", "ssh", "--fails", **given), tmp_path / "run.log"
    assert process.wait(TIME_LIMIT) == 1
    wait_until_gone(process.mark)
    told = log.read_text()
    if trainer == "trainer":  # all its processes learn of the error, and record it for torchrun's summary
        assert "raised RuntimeError: on purpose (rank 1)" in told.partition(" failed first:\n")[2]
    else:
        assert "127.0.0.2: RuntimeError: on purpose" in told.splitlines()


@pytest.mark.slow
@pytest.mark.parametrize(
    "launcher,number",
    [("pdsh", signal.SIGTERM), ("ssh", signal.SIGTERM), ("ssh", signal.SIGINT), ("pdsh", signal.SIGHUP)],
)
def test_a_signal_ends_all_nodes_after_saving(start, tmp_path, launcher, number):
    process, log = start("run", launcher, **ENDLESS), tmp_path / "run.log"
    wait_for(lambda: lines(tmp_path / "run") >= 2, process, log)
    os.kill(process.pid, number)
    assert process.wait(TIME_LIMIT) == 128 + number
    wait_until_gone(process.mark)
    (checkpoint,) = Run(tmp_path / "run").checkpoints
    assert checkpoint.name.split("-")[1] == str(lines(tmp_path / "run"))


@pytest.mark.slow
def test_a_signal_to_every_process_is_saved_as_one_to_the_launcher(start, tmp_path, hostfile, trainer):
    """A scheduler signals the launcher, its shells, torchrun and torchrun's processes. All pass the signal on."""
    hostfile.write_text("localhost slots=2\n")
    process, log = start("run", "ssh", **ENDLESS), tmp_path / "run.log"
    wait_for(lambda: lines(tmp_path / "run") >= 2, process, log)
    everyone = marked(process.mark)
    assert len(everyone) == 6  # launcher, shell, node, torchrun, two trainers
    for pid in everyone:
        os.kill(pid, signal.SIGTERM)
    process.wait(TIME_LIMIT)
    wait_until_gone(process.mark)
    (checkpoint,) = Run(tmp_path / "run").checkpoints
    assert checkpoint.name.split("-")[1] == str(lines(tmp_path / "run"))


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_killed_launcher_leaves_no_process_and_keys_stay_secret(start, tmp_path, launcher):
    process, log = start("run", launcher, **ENDLESS), tmp_path / "run.log"
    wait_for(lambda: lines(tmp_path / "run") >= 2, process, log)
    environ = everybody("environ")
    trainers = [pid for pid in marked(process.mark) if any(v.startswith("LOCAL_RANK=") for v in environ[pid])]
    assert len(trainers) == 4
    assert all({f"HF_TOKEN={SECRET}", f"OTHER_KEY={SECRET}"} <= set(environ[pid]) for pid in trainers)
    assert SECRET not in str(everybody("cmdline"))
    process.kill()
    process.wait()
    wait_until_gone(process.mark)
    assert len(Run(tmp_path / "run").checkpoints) == 1, log.read_text()  # as after SIGTERM
    assert not list((tmp_path / "tmp").iterdir())
    assert SECRET not in log.read_text()


@pytest.mark.slow
def test_a_second_signal_ends_all_at_once(start, tmp_path, trainer):
    process = start("run", "ssh", "--never_saves", **ENDLESS)
    wait_for(lambda: lines(tmp_path / "run") >= 1, process, tmp_path / "run.log")
    for _ in range(2):
        os.kill(process.pid, signal.SIGINT)
        time.sleep(0.05)
    assert process.wait(TIME_LIMIT) == 130
    wait_until_gone(process.mark)
    if trainer == "stub":
        assert not Run(tmp_path / "run").checkpoints


@pytest.mark.slow
def test_prompts_are_embedded_on_all_nodes(environment, tmp_path, ssh, tiny_flux, prompts_file, embedded_prompts):
    given = {"MODEL_PATH": tiny_flux, "PROMPT_FILE": str(prompts_file), "OUTPUT_DIR": str(tmp_path / "out")}
    given |= {"LAUNCHER": "ssh", "REMOTE_SHELL": f"ssh -F {ssh}/ssh_config", "HOSTFILE": str(tmp_path / "one_each")}
    (tmp_path / "one_each").write_text("".join(f"{host} slots=1\n" for host in HOSTS))
    done = subprocess.run(
        ["bash", ROOT / "scripts/preprocess/preprocess_flux_rl_embeddings.sh", "--batch_size", "1"],
        env={**environment, **given}, timeout=TIME_LIMIT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    assert (tmp_path / "out/prompt.json").read_text() == embedded_prompts.read_text()
    for rank, host in enumerate(HOSTS):
        assert re.search(f"^{host}: rank {rank}: [1-5] embedded", done.stdout + done.stderr, re.MULTILINE)


@pytest.mark.parametrize("start", ["entry_point(work)", "with processes('cpu'): work()"])
def test_processes_that_share_a_pipe_write_whole_lines(start, tmp_path, environment):
    script = tmp_path / "script.py"
    script.write_text(f"""if True:
        import os, sys
        from fastvideo.io.processes import entry_point, processes
        def work():
            for stream in (sys.stdout, sys.stderr):
                print("rank", os.environ["RANK"], "to", stream.name, file=stream)
        {start}
    """)
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)  # one packet per write
    command = [sys.executable, "-m", "fastvideo.torchrun", "--standalone", "--nproc_per_node", "2", str(script)]
    with ours, theirs:
        both = {"stdout": theirs, "stderr": theirs}
        subprocess.run(
            command, env={**environment, "PYTHONUNBUFFERED": "1"}, cwd=ROOT, **both, timeout=TIME_LIMIT, check=True
        )
        theirs.close()
        packets = iter(lambda: ours.recv(10000), b"")
        lines = {packet for packet in packets if b"rank" in packet}
    assert lines == {f"rank {rank} to <{name}>\n".encode() for rank in (0, 1) for name in ("stdout", "stderr")}


TWO_ENDS = {  # what two processes do -> what they print, and the exit status
    "end('program.py: error: --h 33\\n', 2)": ("program.py: error: --h 33\n", 2),
    "end('program.py: error: --h 33\\n', 2) if RANK == '1' else time.sleep(60)": ("program.py: error: --h 33\n", 2),
    "signal.signal(2, lambda *_: end('stopped\\n', 130, True)); os.write(1, b'here\\n'); time.sleep(60)": (
        "stopped\n",
        130,
    ),
    "sys.exit(1) if RANK == '1' else time.sleep(60)": ("", 1),
    "os.kill(os.getpid(), 9) if RANK == '1' else time.sleep(60)": (
        "rank 1 was ended first, by SIGKILL; Linux does this when memory runs out\n",
        137,
    ),
    "os._exit(9)": ("rank . ended first, with status 9\n", 9),
    "entry_point(lambda: (print('here', flush=True), time.sleep(60)))": (
        "script.py: stopped by Ctrl-C, in processes.py, line \\d+\n",
        130,
    ),
}


@pytest.mark.parametrize("what", TWO_ENDS)
def test_why_two_processes_end_is_said_once_without_words_of_torchrun(what, tmp_path, environment):
    script, (said, status) = tmp_path / "script.py", TWO_ENDS[what]
    script.write_text(f"""if True:
        import os, signal, sys, time
        from fastvideo.io import messages
        from fastvideo.io.messages import end
        messages.FIRST_SPEAKS, RANK = 3, os.environ["RANK"]
        messages.shorten_interrupts()
        if "entry_point" in {what!r}:
            from fastvideo.io.processes import entry_point
        {what}
    """)
    command = [sys.executable, "-m", "fastvideo.torchrun", "--standalone", "--nproc_per_node", "2", str(script)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "start_new_session": True}
    process = subprocess.Popen(command, env=environment, cwd=ROOT, **pipes)
    if status == 130:
        assert [process.stdout.readline() for _ in range(2)] == ["here\n"] * 2
        os.killpg(process.pid, signal.SIGINT)
    told = process.communicate(timeout=TIME_LIMIT)[1]
    assert re.fullmatch(said, told) and process.returncode == status, told


# --- by hand, and with Slurm ------------------------------------------------------------------------------------------


@pytest.fixture
def stub_recipe(tmp_path) -> Path:
    """A recipe that starts the stub instead of the trainer."""
    path = tmp_path / "recipe.sh"
    path.write_text(f'source {ROOT}/scripts/environment.sh\nrun_distributed {STUB} "$@"\n')
    return path


@pytest.mark.slow
def test_the_slurm_example_starts_a_process_per_gpu_and_node(environment, tmp_path, stub_recipe):
    """Two replacements of Slurm's commands start one task per node on this machine. Only the trainer is a stub."""
    bin_folder = tmp_path / "bin"
    bin_folder.mkdir()
    for name, text in {
        "scontrol": 'printf "%s\\n" 127.0.0.2 127.0.0.3',
        "srun": '[ "$1" = --kill-on-bad-exit=1 ] && shift\nSLURM_NODEID=1 "$@" & SLURM_NODEID=0 "$@" && wait $!',
    }.items():
        (bin_folder / name).write_text(f"#!/bin/sh\n{text}\n")
        (bin_folder / name).chmod(0o755)
    job = {"SLURM_JOB_ID": "123", "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_GPUS_ON_NODE": "1", "RECIPE": str(stub_recipe)}
    environment = {**environment, **job, "PATH": f"{bin_folder}:{environment['PATH']}"}
    del environment["NPROC_PER_NODE"]
    done = subprocess.run(
        ["bash", FINETUNE / "flux_grpo_MixGRPO.sbatch", "--output_dir", tmp_path / "run", "--ends"],
        env=environment, cwd=tmp_path, timeout=TIME_LIMIT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    assert {f"rank {rank} of 2" for rank in (0, 1)} <= set(done.stdout.splitlines()) and "INDEX_CUSTOM=1" in done.stderr
    assert lines(tmp_path / "run") == 1


@pytest.mark.parametrize("index", ["2", "-1", "x", ""])
def test_an_index_that_no_node_has_is_refused(environment, index):
    done = subprocess.run(
        ["bash", RECIPE],
        env={**environment, "LAUNCHER": "hand", "INDEX_CUSTOM": index},
        timeout=TIME_LIMIT,
        capture_output=True,
        text=True,
    )
    assert (
        done.returncode == 2 and f"INDEX_CUSTOM {index or 'is not set'}: the hostfile has nodes 0 to 1" in done.stderr
    )


def test_set_env_multinode_twice_is_as_once_and_can_be_undone(environment, hostfile, ssh, flags):
    def run(*argv: str) -> dict[str, str]:
        remote = {"REMOTE_SHELL": f"ssh -F {ssh}/ssh_config"}
        script = ROOT / "scripts/preprocess/set_env_multinode.sh"
        subprocess.run(["bash", script, *argv], env={**environment, **remote}, timeout=TIME_LIMIT, check=True)
        return {host: (ssh / host / ".bashrc").read_text() for host in HOSTS}

    def index(host: str) -> str:
        command = ["ssh", "-F", ssh / "ssh_config", host, ". ~/.bashrc; echo $INDEX_CUSTOM$OWN"]
        return subprocess.run(command, timeout=TIME_LIMIT, capture_output=True, text=True, check=True).stdout.strip()

    (ssh / HOSTS[0] / ".bashrc").write_text("OWN=own\n")
    once = run()
    assert [index(host) for host in HOSTS] == ["0own", "1"]
    assert run() == once
    hostfile.write_text(f"{HOSTS[1]}\n{HOSTS[0]}\n")
    run()
    assert [index(host) for host in HOSTS] == ["1own", "0"]
    command = ["bash", RECIPE, *flags(dry_run=True)]  # then a recipe starts all nodes, as in the references
    env = {**environment, "LAUNCHER": "ssh", "INDEX_CUSTOM": index(HOSTS[0])[0]}
    done = subprocess.run(command, env=env, timeout=TIME_LIMIT, capture_output=True, text=True, check=True)
    assert all(f"--node_rank {rank}" in done.stdout for rank in (0, 1))
    assert "INDEX_CUSTOM=1 isn't used: starts all nodes" in done.stderr
    assert run("--remove") == {HOSTS[0]: "OWN=own\n", HOSTS[1]: ""} == run("--remove")


# --- hostfiles, dry run, errors ---------------------------------------------------------------------------------------


def refused(environment: dict[str, str], **given: str) -> str:
    """The one line that a recipe prints when it stops before it starts anything."""
    done = subprocess.run(
        ["bash", RECIPE], env={**environment, **given}, timeout=TIME_LIMIT, capture_output=True, text=True
    )  # fmt: skip
    assert done.returncode == 2 and not done.stdout, done.stderr
    assert done.stderr.count("\n") == 1 and done.stderr.startswith("launch.py: error: "), done.stderr
    return done.stderr


@pytest.mark.parametrize(
    "text,message",
    [
        ("", "names no host"),
        ("# nobody\n\n", "names no host"),
        ("node1\nnode2\nnode1 slots=4\n", "line 3: node1 is listed twice"),
        ("node1 slots=x\n", "line 1: slots=x"),
        ("node1\n\nnode2 slots=0\n", "line 3: slots=0"),
        ("node1 slots=\n", "line 1: slots="),
        ("node1 slots=8 max_slots=8\n", "slots=8 max_slots=8"),
        ("node1 node2\n", "line 1: node2"),
        ("-oProxyCommand=true\n", "-oProxyCommand=true is no host name"),
        ("node1,node2\n", "node1,node2 is no host name"),
        ("localhost\nnode2\n", "can't reach the first host, the master, as localhost"),
    ],
)
def test_a_bad_hostfile_is_refused_in_one_line(environment, hostfile, text, message):
    hostfile.write_text(text)
    error = refused(environment)
    assert message in error and str(hostfile) in error


def test_the_launcher_explains_itself_without_a_hostfile():
    alone = {key: value for key, value in os.environ.items() if key != "HOSTFILE"}
    for words, status, text in ((["--help"], 0, "Several nodes"), (["x.py"], 2, "HOSTFILE is not set")):
        done = subprocess.run(
            [sys.executable, FINETUNE / "launch.py", *words],
            env=alone,
            timeout=TIME_LIMIT,
            capture_output=True,
            text=True,
        )
        assert done.returncode == status and text in done.stdout + done.stderr and "Traceback" not in done.stderr


def test_other_bad_settings_are_refused_in_one_line(environment, hostfile, tmp_path):
    assert "missing: can't be read" in refused(environment, HOSTFILE=str(tmp_path / "missing"))
    assert "NPROC_PER_NODE 0" in refused(environment, NPROC_PER_NODE="0")
    assert "LAUNCHER mpirun: unknown; choose from pdsh, ssh, hand" in refused(environment, LAUNCHER="mpirun")
    assert "no-such-shell is not installed" in refused(environment, LAUNCHER="ssh", REMOTE_SHELL="no-such-shell -q")
    unreachable = refused(environment, LAUNCHER="ssh", REMOTE_SHELL="false")
    assert "127.0.0.2" in unreachable and "nothing was started" in unreachable
    huge = refused(environment, LAUNCHER="ssh", REMOTE_SHELL="true", MASTER_PORT="1", PASS_ENV="BIG", BIG="x" * 70000)
    assert "PASS_ENV" in huge


def test_a_node_that_can_not_be_reached_is_named(environment):
    done = subprocess.run(
        ["bash", RECIPE], timeout=TIME_LIMIT, capture_output=True, text=True,
        env={**environment, "LAUNCHER": "ssh", "REMOTE_SHELL": "sh -c 'exit 255'", "MASTER_PORT": "29500"},
    )  # fmt: skip
    assert done.returncode == 255
    assert "ended first, with status 255" in done.stderr.splitlines()[-1]


@pytest.mark.slow
def test_a_dry_run_prints_the_plan_and_each_node_s_command(environment, flags, tmp_path, stub_recipe):
    def dry_run(recipe: Path = stub_recipe, **given: str) -> list[str]:
        command = ["bash", recipe, *flags(output_dir=tmp_path / "run", dry_run=True, parallel="fsdp")]
        env = {**environment, "HF_TOKEN": SECRET, "NCCL_DEBUG": "INFO", "PYTORCH_CUDA_ALLOC_CONF": "x:1", **given}
        done = subprocess.run(command, env=env, timeout=TIME_LIMIT, capture_output=True, text=True, check=True)
        assert SECRET not in done.stdout + done.stderr and not (tmp_path / "run").exists()
        return done.stdout.splitlines()

    environment |= {"NPROC_PER_NODE": "3", "LAUNCHER": "ssh", "REMOTE_SHELL": "false"}
    plan, *described, first, second, summary = dry_run(RECIPE)
    assert "5 processes" in plan
    for beginning in ("predicted peak memory of each process: ", "checkpoints: 1 of 0.0182 GB"):
        assert any(line.startswith(beginning) for line in described)
    assert first.startswith(f"127.0.0.2: cd {ROOT} && {sys.executable} -m fastvideo.torchrun ")
    assert "--nnodes 2 --nproc_per_node 2 --node_rank 0 --master_addr 127.0.0.2 --master_port FREE_PORT" in first
    assert "--nnodes 2 --nproc_per_node 3 --node_rank 1 --master_addr 127.0.0.2" in second
    assert "fastvideo/train_grpo_flux.py" in first and "--num_generations 4" in second
    assert summary.startswith("launcher: ssh; ")
    assert {"HF_TOKEN", "NCCL_DEBUG", "PYTORCH_CUDA_ALLOC_CONF"} <= set(summary.split())
    assert "--dry_run" not in first + second
    *_, node, by_hand = dry_run(LAUNCHER="hand", INDEX_CUSTOM="1", MASTER_PORT="4711")
    assert node.startswith("127.0.0.3: ") and "--master_port 4711" in node and "launcher: hand" in by_hand
    *_, alone, here = dry_run(HOSTFILE="data/hosts/hostfile")
    assert alone.startswith("127.0.0.1: ") and "--nnodes 1 --nproc_per_node 3" in alone and "launcher: here" in here


def test_the_shipped_hostfile_means_this_machine_without_a_remote_shell(environment, stub_recipe, tmp_path):
    command = ["bash", stub_recipe, "--output_dir", tmp_path / "run", "--ends"]
    env = {**environment, "HOSTFILE": "data/hosts/hostfile", "NPROC_PER_NODE": "1", "REMOTE_SHELL": "false"}
    done = subprocess.run(command, env=env, cwd=tmp_path, timeout=TIME_LIMIT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "rank 0 of 1" in done.stdout and lines(tmp_path / "run") == 1


# --- other ways to start ----------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    "config,parallel",
    [
        pytest.param("ddp", "ddp", marks=pytest.mark.long),
        pytest.param("fsdp2", "fsdp", marks=pytest.mark.long),
        pytest.param("deepspeed", "deepspeed", marks=pytest.mark.long),
    ],
)
def test_accelerate_launch_trains_what_one_process_trains(
    train, flags, tmp_path, subprocess_environment, config, parallel
):
    given = {"prompts_per_iteration": 2, "reward_model": "custom_rewards:rough_brightness"}
    path = ROOT / f"scripts/accelerate_configs/{config}.yaml"
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", path, "--num_processes", "2"]
    argv = flags(output_dir=tmp_path / "two", parallel=parallel, **given)
    done = subprocess.run(
        [*command, "fastvideo/train_grpo_flux.py", *argv],
        cwd=ROOT, env=subprocess_environment, timeout=TIME_LIMIT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    one, two = train(**given), Run(tmp_path / "two")
    assert "2 processes" in done.stdout
    for a, b in zip(one.numbers(), two.numbers(), strict=True):
        assert {n: a[n] for n in ("reward", "grad_norm", "lr")} == pytest.approx(
            {n: b[n] for n in ("reward", "grad_norm", "lr")}, rel=1e-3
        )


SCRIPTS = [*ROOT.glob("*.sh"), *ROOT.glob("scripts/**/*.sh"), *ROOT.glob("scripts/**/*.sbatch"), ROOT / ".ci/run"]


def test_shell_scripts_are_sound():
    assert len(SCRIPTS) > 20
    for path in SCRIPTS:
        subprocess.run(["bash", "-n", path], check=True)
    done = subprocess.run(
        [program("shellcheck"), "-x", "-P", "SCRIPTDIR", "-S", "warning", *SCRIPTS], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout


def test_scripts_run_the_modules_of_their_own_checkout(tmp_path):
    """An environment made by another checkout has that one's modules."""
    copy = tmp_path / "a b'c"
    for folder in ("scripts", "fastvideo"):
        shutil.copytree(ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__"))
    with (copy / "fastvideo/config.py").open("a") as file:
        file.write("raise SystemExit('own modules')\n")
    environment = {**os.environ, "PYTHON_BIN": sys.executable, "PYTHONPATH": str(ROOT)}
    recipe = copy / "scripts/finetune/finetune_flux_grpo_MixGRPO.sh"
    done = subprocess.run(["bash", recipe], env=environment, capture_output=True, text=True, timeout=TIME_LIMIT)
    assert done.stderr.strip() == "own modules"
    (tmp_path / "python3").symlink_to("/bin/false")  # has no packages
    del environment["PYTHON_BIN"]
    environment["PATH"] = f"{tmp_path}:{os.environ['PATH']}"
    done = subprocess.run(["bash", recipe], env=environment, capture_output=True, text=True, timeout=TIME_LIMIT)
    assert done.returncode == 2 and "run bash env_setup.sh first" in done.stderr and "\n" not in done.stderr.strip()
