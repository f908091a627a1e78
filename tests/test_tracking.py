"""Trackers get what metrics.jsonl gets. Whatever happens to one, a run neither waits for it nor ends because of it."""

import importlib.util
import inspect
import json
import os
import sys
import threading
import time
from types import SimpleNamespace

from fastvideo.cli import parse_dataclass
from fastvideo.config import GRPOConfig
from fastvideo.runtime import tracking
from fastvideo.runtime.tracking import Tracker, close_trackers
from fastvideo.train_grpo_flux import main

import pytest
from accelerate import PartialState
from conftest import PROMPTS, TIME_LIMIT, TRACKERS_HERE, Run, torchrun
from PIL import Image
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

    Patient.over.clear()
    yield change
    Patient.over.set()
    tracking.kill_service()


@pytest.fixture
def tracked(tmp_path, capsys):
    """tracked(tracker, ...) logs two steps. Returns seconds, what was printed, and wandb.json."""

    def run(*names: str, done: int = 0) -> tuple[float, str, dict]:
        PartialState(cpu=True)  # as in a run, by its engine; Accelerate's log needs it
        words = {"prompts_file": "p", "output_dir": str(tmp_path), "log_with": list(names or ["wandb"])}
        picture = tmp_path / "picture.png"
        Image.new("RGB", (32, 16), "red").save(picture)
        shown = [(str(picture), "a fox"), (str(picture), "a cat")]
        config, begin = GRPOConfig.create(**words), time.monotonic()
        trackers = [Tracker(name, config, "abcd1234", done) for name in config.log_with]
        for tracker in trackers:
            for step in (done + 1, done + 2):
                tracker.send(tracker.log, {"step": step, "loss": step / 2, "window": [1, 2], "reward": None}, step)
            tracker.send(tracker.show, "evaluation_samples", lambda _: shown, step)
        close_trackers(trackers)
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
    """A run of wandb that logs only while `working`, and doesn't finish before the test is `over`."""

    offline, url, working, over = False, "http://run", True, threading.Event()

    def log(self, *_: object, **__: object) -> None:
        if not self.working:
            raise OSError("the connection is lost")

    def finish(self) -> None:
        self.over.wait(TIME_LIMIT)


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
            logged.append((modes[-1], step, *values))

        def finish(self) -> None:
            logged.append((modes[-1], "end"))

    monkeypatch.setattr("wandb.init", lambda mode, **_: modes.append(mode) or Noted())
    _, text, _ = tracked()
    line = ("step", "loss", "window", "reward")
    pictures = ("offline", 2, "evaluation_samples")
    assert logged == [("online", 1, *line), ("offline", 2, *line), pictures, ("offline", "end")]
    assert text.count("\n") == 1 and "the connection is lost; this run goes on offline" in text


@pytest.mark.slow
def test_a_key_on_a_machine_without_a_network_does_not_stop_training(flags, tmp_path, subprocess_environment):
    variables = {"WANDB_API_KEY": KEY, "WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_INIT_TIMEOUT": "1"}
    environment = {k: v for k, v in subprocess_environment.items() if k != "WANDB_MODE"} | variables
    done = torchrun(flags(use_wandb=True, prompts_per_iteration=2), environment)
    assert done.returncode == 0 and done.stderr.count("goes on offline") == 1 and "Traceback" not in done.stderr
    run = Run(tmp_path / "run")
    assert len(run.metrics) == 2 and run.checkpoints and list(run.folder.glob("wandb/offline-run-*"))


# --- other trackers ---------------------------------------------------------------------------------------------------


def tensorboard_of(folder) -> SimpleNamespace:
    """What TensorBoard reads in a folder: {name: [(step, value)]} of numbers, pictures (as arrays) and texts."""
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    found = event_accumulator.EventAccumulator(
        str(folder), size_guidance=dict.fromkeys(("scalars", "images", "tensors"), 0)
    )
    found.Reload()
    tags = found.Tags()
    return SimpleNamespace(
        numbers={name: [(e.step, e.value) for e in found.Scalars(name)] for name in tags["scalars"]},
        pictures={name: [(e.step, e.width, e.height) for e in found.Images(name)] for name in tags["images"]},
        texts={
            name.removesuffix("/text_summary"): [
                (e.step, e.tensor_proto.string_val[0].decode()) for e in found.Tensors(name)
            ]
            for name in tags["tensors"]
        },
    )


def test_tensorboard_shows_numbers_and_pictures_and_a_resumed_run_repeats_no_step(tracked, tmp_path):
    pytest.importorskip("tensorboard")
    _, text, _ = tracked("tensorboard")
    assert text == ""
    tracked("tensorboard", done=1)  # goes on from a checkpoint of iteration 1
    shown = tensorboard_of(tmp_path / "tensorboard")
    assert shown.numbers == {"loss": [(1, 0.5), (2, 1.0), (3, 1.5)]}
    assert [step for step, *size in shown.pictures["evaluation_samples"] if size == [64, 16]] == [3]  # side by side
    assert shown.texts["evaluation_samples_prompts"][-1] == (3, "1. a fox\n1. a cat\n")  # TensorBoard keeps all texts


@pytest.mark.slow
def test_tensorboard_gets_what_metrics_jsonl_gets_and_a_resumed_run_goes_on(train, prompts_file):
    pytest.importorskip("tensorboard")
    given = {"log_with": ["tensorboard"], "checkpointing_steps": 1, "eval_steps": 2, "eval_prompts": prompts_file}
    run = train("out", **given, max_train_steps=1, image_log_steps=1)
    train("out", **given, max_train_steps=2, image_log_steps=1, resume_from_checkpoint="latest")
    shown, lines = tensorboard_of(run.folder / "tensorboard"), run.metrics
    for name in ("loss", "reward", "evaluation_reward"):
        expected = [(line["step"], line[name]) for line in lines if name in line]
        assert shown.numbers[name] == [(step, pytest.approx(value)) for step, value in expected]
    assert [step for step, *_ in shown.pictures["samples"]] == [1, 2]
    assert [step for step, *_ in shown.pictures["evaluation_samples"]] == [0, 1, 2]
    assert shown.texts["evaluation_samples_prompts"][0][1] == "".join(f"1. {prompt}\n" for prompt in PROMPTS)


class Recorder:
    """A package like wandb, swanlab and trackio, with the arguments of init that ours must fit."""

    def __init__(self, init: inspect.Signature) -> None:
        self.calls: list[tuple] = []
        self.signature, self.config = init, {}

    def init(self, **given: object) -> "Recorder":
        self.signature.bind(**given)
        self.calls.append(("init", given))
        return self

    def Settings(self, **_: object) -> None:
        return None

    def Image(self, path: str, caption: str) -> tuple[str, str]:
        return os.path.basename(path), caption

    def log(self, values: dict, step: int) -> None:
        self.calls.append((step, values))

    def finish(self) -> None:
        self.calls.append(("end", {}))


# Arguments of swanlab 0.7.20 and trackio 0.43.0 that are used here.
ARGUMENTS = {
    "swanlab": "project experiment_name config logdir mode settings id resume",
    "trackio": "project name config resume",
}


@pytest.fixture(params=ARGUMENTS)
def recorder(request, monkeypatch):
    """A package that notes what it is called with; its `init` has the arguments of the installed one."""
    name = request.param
    given = [inspect.Parameter(word, inspect.Parameter.KEYWORD_ONLY) for word in ARGUMENTS[name].split()]
    optional = [p.replace(default=None) for p in given]
    found = Recorder(inspect.Signature(optional))
    found.name = name
    monkeypatch.setitem(sys.modules, name, found)
    monkeypatch.setitem(
        sys.modules, f"{name}.package", SimpleNamespace(has_api_key=lambda: "SWANLAB_API_KEY" in os.environ)
    )
    monkeypatch.delenv("SWANLAB_API_KEY", raising=False)
    return found


def test_other_trackers_get_numbers_and_pictures_with_captions(recorder, tracked):
    _, text, _ = tracked(recorder.name)
    (_, options), *logged = recorder.calls
    images = [("picture.png", "a fox"), ("picture.png", "a cat")]
    lists = {"evaluation_samples": images}
    single = {"evaluation_samples/0": images[0], "evaluation_samples/1": images[1]}
    assert text == "" and options["project"] == "mixgrpo-flux" and options["config"]["log_with"] == [recorder.name]
    assert logged == [
        (1, {"loss": 0.5}), (2, {"loss": 1.0}), (2, single if recorder.name == "trackio" else lists), ("end", {})
    ]  # fmt: skip
    assert options.get("mode", "offline") == "offline" and "id" not in options  # there is no key


@pytest.mark.parametrize(
    "key,wanted,mode", [(KEY, None, "cloud"), (KEY, "offline", "offline"), (None, "cloud", "offline")]
)
@pytest.mark.parametrize("recorder", ["swanlab"], indirect=True)
def test_swanlab_is_online_with_a_key_only_and_never_asks_for_one(recorder, tracked, monkeypatch, key, wanted, mode):
    for name, value in (("SWANLAB_API_KEY", key), ("SWANLAB_MODE", wanted)):
        monkeypatch.delenv(name, raising=False)
        if value:
            monkeypatch.setenv(name, value)
    tracked("swanlab")
    _, options = recorder.calls[0]
    assert options["mode"] == mode and options.get("id") == ("abcd1234" if mode == "cloud" else None)


@pytest.mark.parametrize("recorder", ["trackio"], indirect=True)
def test_a_tracker_that_fails_or_hangs_leaves_the_others_alone(recorder, tracked, environment, monkeypatch):
    environment()
    hung = Patient()
    monkeypatch.setattr("wandb.init", lambda **_: hung)
    monkeypatch.setattr(tracking, "FINISH", 3)
    monkeypatch.setattr(recorder, "log", lambda *_, **__: 1 / 0)
    monkeypatch.setitem(sys.modules, "swanlab", other := Recorder(inspect.signature(lambda **_: None)))
    monkeypatch.setitem(sys.modules, "swanlab.package", SimpleNamespace(has_api_key=lambda: False))
    seconds, text, _ = tracked("wandb", "swanlab", "trackio")
    assert seconds < 30 and "wandb: not finished after 3 seconds" in text
    assert text.count("trackio: ZeroDivisionError: division by zero; this run goes on without trackio\n") == 1
    assert [call[0] for call in other.calls] == ["init", 1, 2, 2, "end"]


@pytest.mark.parametrize("name", ARGUMENTS)
def test_the_installed_package_takes_what_a_run_sends(name, tracked, tmp_path, monkeypatch):
    if name not in TRACKERS_HERE:
        pytest.skip(f"{name} isn't installed")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    hook = sys.excepthook
    _, text, _ = tracked(name)
    assert "goes on without" not in text and "not finished" not in text and sys.excepthook is hook
    assert [path for path in (tmp_path / name).rglob("*") if path.is_file()]


# --- the flag ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "argv,expected",
    [
        ("", "wandb"),
        ("--log_with none", ""),
        ("--no_use_wandb", ""),
        ("--log_with wandb tensorboard", "wandb tensorboard"),
        ("--report-to trackio,swanlab,trackio", "trackio swanlab"),
        ("--log_with tensorboard --use_wandb", "wandb tensorboard"),
        ("--log_with tensorboard wandb --no_use_wandb", "tensorboard"),
        ("--no_use_wandb --override --log_with wandb", "wandb"),  # the recipe's flag counts less
        ("--log_with tensorboard --override --no_use_wandb", "tensorboard"),
    ],
)
def test_log_with_names_the_trackers_and_use_wandb_adds_or_removes_one(argv, expected, tmp_path):
    config = parse_dataclass(GRPOConfig, ["--prompts_file", "p.txt", *argv.split()])
    assert config.log_with == expected.split()
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    again = parse_dataclass(GRPOConfig, ["--config", str(tmp_path / "config.yaml")])
    assert again.log_with == config.log_with


def test_a_tracker_that_does_not_exist_or_is_not_installed_is_refused(flags, capsys, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *_: None if name == "swanlab" else find(name, *_))
    for name, advice in (
        ("tensorbord", "trackio, none; did you mean tensorboard?"),
        ("swanlab", "pip install -e '.[trackers]'"),
    ):
        with pytest.raises(SystemExit) as stop:
            main([*flags(log_with=["wandb", name]), "--dry_run"])
        error = capsys.readouterr().err.splitlines()[-1]
        assert stop.value.code == 2 and f"--log_with {name}: " in error and advice in error
