"""Whatever happens to wandb, a run neither waits for it nor ends because of it."""

import json
import os
import threading
import time

from fastvideo.config import GRPOConfig
from fastvideo.runtime import tracking
from fastvideo.runtime.tracking import Tracker

import pytest
from conftest import TIME_LIMIT, Run, torchrun
from reward_servers import QuietHandler

KEY = "0123456789abcdef0123456789abcdef01234567"


class Wandb(QuietHandler):
    """A server that answers every question with `status`; None: never."""

    def do_POST(self):
        if self.server.status is None:
            self.server.stop.wait(TIME_LIMIT)
        self.reply(self.server.status, b'{"errors": [{"message": "permission denied"}]}')

    do_GET = do_POST


@pytest.fixture
def environment(monkeypatch, tmp_path):
    """environment(name=value, ...): a user with a key, and these variables of wandb."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))  # no ~/.netrc
    tracking.kill_service()  # wandb read the variables when an earlier test set it up

    def change(**variables: str) -> None:
        for name, value in {"API_KEY": KEY, "INIT_TIMEOUT": "2", **variables}.items():
            monkeypatch.setenv(f"WANDB_{name}", value)

    yield change
    tracking.kill_service()


@pytest.fixture
def tracked(tmp_path, capsys):
    """tracked() logs two steps. Returns seconds, what was printed, and wandb.json."""

    def run() -> tuple[float, str, dict]:
        config = GRPOConfig.create(prompts_file="p", output_dir=str(tmp_path))
        begin, tracker = time.monotonic(), Tracker(config, "abcd1234")
        for step in (1, 2):
            tracker.log(lambda step=step: {"step": step}, step)
        tracker.close()
        seconds, record = time.monotonic() - begin, tmp_path / "wandb.json"
        return seconds, capsys.readouterr().err, json.loads(record.read_text()) if record.exists() else {}

    return run


# wandb itself tries for 90 seconds where a server refuses or is silent.
@pytest.mark.parametrize("status", [200, *(pytest.param(status, marks=pytest.mark.long) for status in (401, None))])
def test_a_server_that_refuses_or_never_answers_costs_one_line(status, environment, tracked, http_server):
    server = http_server(Wandb, status=status, stop=threading.Event())
    environment(BASE_URL=server.url)
    seconds, text, record = tracked()
    server.stop.set()
    assert text.count("goes on offline") == 1 and "Traceback" not in text and KEY not in text
    assert "offline-run" in record["sync"] and seconds < 100


@pytest.mark.parametrize("name,value", [("API_KEY", "short"), ("MODE", "onlin"), ("BASE_URL", "no-url")])
def test_a_malformed_variable_costs_one_line(name, value, environment, tracked):
    environment(**{name: value})
    _, text, record = tracked()
    assert text.count("goes on offline") == 1 and value in text + "short" and "offline-run" in record["sync"]


def test_a_place_that_wandb_can_not_write_to_costs_one_line(environment, tracked, tmp_path):
    environment(MODE="offline")
    (tmp_path / "wandb").touch()
    _, text, record = tracked()
    assert text.count("goes on without wandb") == 1 and "wandb" in text and not record


class Patient:
    """A run of wandb that logs only while `working`, and never finishes."""

    offline, url, working = False, "http://run", True

    def log(self, *_: object, **__: object) -> None:
        if not self.working:
            raise OSError("the connection is lost")

    def finish(self) -> None:
        threading.Event().wait(TIME_LIMIT)


def test_wandb_that_never_finishes_is_not_waited_for(environment, tracked, monkeypatch):
    environment()
    monkeypatch.setattr("wandb.init", lambda **_: Patient())
    monkeypatch.setattr(tracking, "FINISH", 0.5)
    seconds, text, _ = tracked()
    assert seconds < 30 and "not finished after 0.5 seconds" in text


def test_an_error_in_the_middle_of_a_run_loses_no_metrics(environment, tracked, monkeypatch):
    environment()
    modes, logged = [], []

    class Noted(Patient):
        def log(self, values: dict, step: int) -> None:
            self.working = modes[-1] == "offline" or step == 1
            super().log()
            logged.append((modes[-1], step))

        def finish(self) -> None:
            logged.append((modes[-1], "end"))

    monkeypatch.setattr("wandb.init", lambda mode, **_: modes.append(mode) or Noted())
    _, text, _ = tracked()
    assert logged == [("online", 1), ("offline", 2), ("offline", "end")]
    assert text.count("\n") == 1 and "the connection is lost; this run goes on offline" in text


@pytest.mark.slow
def test_a_key_on_a_machine_without_a_network_does_not_stop_training(flags, tmp_path, subprocess_environment):
    variables = {"WANDB_API_KEY": KEY, "WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_INIT_TIMEOUT": "1"}
    environment = {k: v for k, v in subprocess_environment.items() if k != "WANDB_MODE"} | variables
    done = torchrun(flags(use_wandb=True, prompts_per_iteration=2), environment)
    assert done.returncode == 0 and done.stderr.count("goes on offline") == 1 and "Traceback" not in done.stderr
    run = Run(tmp_path / "run")
    assert len(run.metrics) == 2 and run.checkpoints and list(run.folder.glob("wandb/offline-run-*"))
