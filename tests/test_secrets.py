"""Passwords and keys reach no file and no message."""

import json
from pathlib import Path

from fastvideo.io.secrets import redact
from fastvideo.train import read

import pytest
from conftest import TIME_LIMIT, TRACKERS_HERE, torchrun
from forked import Script

SECRET = "hush-hush-hush"


@pytest.mark.parametrize(
    "text,expected",
    [
        ("http://me:{}@proxy:3128", "http://proxy:3128"),
        ("http://{}@host/v1", "http://host/v1"),
        ("http:/me:{}@host/v1", "http:/host/v1"),
        ("http://me:p@{}@proxy", "http://proxy"),
        ("http://me:p/{}@proxy:1/x", "http://proxy:1/x"),
        ("me:{}@proxy:3128", "proxy:3128"),
        ("--pick_score_https_proxy=http://me:{}@proxy", "--pick_score_https_proxy=http://proxy"),
        ("http://a/v1?api_key={},http://b/?sig={}&n={}", "http://a/v1?api_key=***,http://b/?sig=***&n=***"),
        ("GET /score?token={} HTTP/1.1", "GET /score?token=*** HTTP/1.1"),
        ("https://a/b#access_token={}", "https://a/b#access_token=***"),
        ("the server said: wrong key {}!", "the server said: wrong key ***!"),
        ("http://[::1]:80/a@b hpsv2:0.5,pick_score git@host:x a red cat? yes", None),
    ],
)
def test_secrets_are_left_out_and_the_rest_stays(text, expected, monkeypatch):
    monkeypatch.setenv("UNIFIED_REWARD_API_KEY", SECRET)
    assert redact(text.replace("{}", SECRET)) == (text if expected is None else expected)


def everything_in(folder: Path) -> bytes:
    return b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file())


@pytest.mark.slow
def test_a_run_leaves_no_secret_of_its_command_line_and_environment(flags, tmp_path, subprocess_environment):
    argv = flags(
        log_with=["wandb", *TRACKERS_HERE], use_wandb=True, max_train_steps=1, unified_reward_url=f"http://127.0.0.1:9/v1?api_key={SECRET}",
        pick_score_https_proxy=f"http://me:{SECRET}@proxy:3128", clip_score_http_proxy=f"me:{SECRET}@proxy:3128",
    )  # fmt: skip
    environment = {**subprocess_environment, "WANDB_MODE": "offline", "WANDB_API_KEY": SECRET * 3, "HF_TOKEN": SECRET}
    environment |= {"SWANLAB_MODE": "offline", "SWANLAB_API_KEY": SECRET, "TRACKIO_DIR": str(tmp_path / "run/trackio")}
    done = torchrun(argv, environment, processes=1)
    assert done.returncode == 0, done.stderr[-2000:]
    assert SECRET not in done.stdout + done.stderr
    files = everything_in(tmp_path / "run")
    assert SECRET.encode() not in files
    assert b"--pick_score_https_proxy" in files and b"http://proxy:3128" in files  # wandb has the command line


def test_a_refused_flag_does_not_repeat_a_secret(flags, tmp_path, subprocess_environment):
    argv = flags(reward_server=f"ftp://me:{SECRET}@host/?key={SECRET}")
    done = torchrun(argv, subprocess_environment, processes=1)
    assert done.returncode and "--reward_server ftp://host/?key=***: must start with" in done.stderr
    assert SECRET not in done.stderr


@pytest.mark.parametrize("argument", ["reward.reward_server={}", "nosuch={}", "reward.unified_reward_url=[{}"])
def test_e_grpos_command_line_does_not_repeat_a_secret(argument, capsys):
    with pytest.raises(SystemExit):
        read([argument.format(f"http://me:{SECRET}@host/v1?api_key={SECRET}&n=1")])
    error = capsys.readouterr().err
    assert "error: " in error and SECRET not in error


@pytest.fixture
def script(tmp_path, subprocess_environment):
    """script(lines of main) runs a program through entry_point. Returns status, stderr and torchrun's record."""

    def run(*lines: str) -> tuple[int, str, str]:
        path, log, record = (tmp_path / name for name in ("program.py", "log", "error.json"))
        body = "".join(f"    {line}\n" for line in lines)
        path.write_text(
            "import atexit, threading\nfrom fastvideo.io import processes\nprocesses.EXIT_GRACE = 0.5\n"
            f"def main():\n{body}processes.entry_point(main)\n"
        )
        environment = {**subprocess_environment, "TORCHELASTIC_ERROR_FILE": str(record)}
        status = Script(str(path), [], environment, tmp_path / "out", log).wait(TIME_LIMIT)
        return status, log.read_text(), record.read_text() if record.exists() else ""

    return run


def test_a_traceback_shows_no_secret_and_keeps_the_rest(script):
    status, text, record = script(f"raise ValueError('no answer from http://me:{SECRET}@host/?key={SECRET}')")
    assert status == 1 and SECRET not in text + record
    assert "ValueError: no answer from http://host/?key=***" in text
    assert "program.py" in json.loads(record)["message"]["message"]


@pytest.mark.parametrize("status", [0, 3])
def test_a_program_ends_although_threads_and_exit_handlers_do_not(script, status):
    found, text, _ = script(
        "threading.Thread(target=threading.Event().wait).start()",
        "atexit.register(threading.Event().wait)",
        f"raise SystemExit({status})",
    )
    assert found == status and ("this process ends without them" in text) == (status == 0)
