"""An error in the middle of a run loses nothing that was trained, and is the last thing printed."""

import json
import signal
import sys
import threading

from fastvideo import train_grpo_flux
from fastvideo.dataset import latent_flux_rl_datasets
from fastvideo.io import processes
from fastvideo.models.reward_model.custom import probe
from fastvideo.runtime import scoring, stopping
from fastvideo.runtime.engines import Engine
from fastvideo.runtime.evaluation import Evaluation
from fastvideo.runtime.log import Log

import custom_rewards
import pytest
import torch
from conftest import Run, same_weights, torchrun

SETTINGS = {"max_train_steps": 3, "image_log_steps": 1, "reward_model": "jpeg_compressibility"}


@pytest.fixture
def stops(train, run_at, capsys):
    """stops(text, **flags): a run in the folder `cut` ends with status 1, and a last line that has the text."""

    def expect(text: str, **given) -> Run:
        with pytest.raises(SystemExit) as stop:
            train("cut", **given)
        last = capsys.readouterr().err.splitlines()[-1]
        assert stop.value.code == 1 and last.startswith("train_grpo_flux.py: stopped: ") and text in last
        return run_at("cut")

    return expect


class Failing:
    """Raises an error in the n-th call, and calls the real function in the others."""

    def __init__(self, real, number: int, error: Exception) -> None:
        self.real, self.number, self.error, self.calls = real, number, error, 0

    def __get__(self, owner, kind=None):
        return lambda *args, **given: self(owner, *args, **given)

    def __call__(self, *args, **given):
        self.calls += 1
        if self.calls == self.number:
            raise self.error
        return self.real(*args, **given)


@pytest.mark.slow
def test_an_error_anywhere_in_an_iteration_keeps_the_iterations_before(train, stops, monkeypatch):
    whole = train("whole", **SETTINGS)
    moments = [
        (latent_flux_rl_datasets, "collate", 3, ValueError("broken prompt"), 2),
        (train_grpo_flux, "rollout", 3, torch.OutOfMemoryError("no memory to sample"), 2),
        (train_grpo_flux, "decode_latents", 3, torch.OutOfMemoryError("no memory to decode"), 2),
        (scoring, "compute_reward", 3, ZeroDivisionError("in the scoring thread"), 2),
        (train_grpo_flux, "policy_loss", 5, torch.OutOfMemoryError("no memory to train"), 2),  # 2 losses per iteration
        (Log, "write_images", 2, ValueError("no such picture format"), 2),
    ]
    for owner, name, call, error, done in moments:
        with monkeypatch.context() as patched:
            patched.setattr(owner, name, Failing(getattr(owner, name), call, error))
            cut = stops(str(error), **SETTINGS)
        assert [path.name for path in cut.checkpoints] == [f"checkpoint-{done}-0"], name
        train("cut", **SETTINGS, resume_from_checkpoint="latest")
        assert cut.numbers() == whole.numbers() and same_weights(cut.weights(), whole.weights()), name
        cut.folder.rename(cut.folder.with_name(name))


def interrupting(place: int):
    """A trace function that raises SIGINT before the handler's instruction number `place`."""
    left = place

    def trace(frame, event, _):
        nonlocal left
        if frame.f_code.co_name == "note":
            frame.f_trace_opcodes = True
            left -= event == "opcode"
            if left == 0 and event == "opcode":
                signal.raise_signal(signal.SIGINT)
        return trace

    return trace


@pytest.mark.parametrize("place", range(1, 40))
def test_a_signal_that_interrupts_the_handling_of_the_first_one_ends_nothing(place):
    """As when Slurm signals all processes, and torchrun passes its own signal on in the same moment."""
    with processes.stop_signals() as asked:
        sys.settrace(interrupting(place))
        try:
            signal.raise_signal(signal.SIGINT)
        finally:
            sys.settrace(None)
    assert asked[0] == signal.SIGINT


def test_pictures_that_cannot_be_measured_do_not_end_a_run(train, monkeypatch, warned):
    monkeypatch.setattr(scoring, "group_measures", Failing(scoring.group_measures, 1, ZeroDivisionError("no pixels")))
    with warned("can't be measured: ZeroDivisionError: no pixels"):
        run = train(max_train_steps=2)
    assert ["hacking_sharpness" in line for line in run.metrics] == [False, True]


def test_optimizer_steps_of_a_half_done_iteration_are_kept(train, stops, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(train_grpo_flux, "policy_loss", Failing(train_grpo_flux.policy_loss, 4, ValueError("half")))
        cut = stops("ValueError: half; iterations up to 1 are saved", **SETTINGS)
    record = json.loads((cut.checkpoints[0] / "checkpoint.json").read_text())
    assert record["iteration"] == 1 and record["optimizer_steps"] == 3
    train("cut", **SETTINGS, resume_from_checkpoint="latest")
    assert [line["step"] for line in cut.metrics] == [1, 2, 3]


def test_an_evaluation_that_fails_keeps_its_iteration(stops, prompts_file, monkeypatch):
    monkeypatch.setattr(Evaluation, "run", Failing(Evaluation.run, 2, RuntimeError("no judge")))
    cut = stops("RuntimeError: no judge", **SETTINGS, eval_steps=1, eval_prompts=prompts_file)
    assert [line["step"] for line in cut.metrics] == [0, 1] and [p.name for p in cut.checkpoints] == ["checkpoint-1-0"]


def test_what_can_not_be_saved_is_said(stops, monkeypatch):
    monkeypatch.setattr(train_grpo_flux, "rollout", Failing(train_grpo_flux.rollout, 2, ValueError("first")))
    monkeypatch.setattr(Engine, "trained_weights", Failing(Engine.trained_weights, 1, ValueError("second")))
    assert not stops("first; iterations up to 1 can't be saved (ValueError: second)", **SETTINGS).checkpoints


def test_an_interrupt_that_a_reward_raises_itself_keeps_the_iterations_before(stops, monkeypatch):
    interrupted = Failing(custom_rewards.brightness, 2, KeyboardInterrupt())
    monkeypatch.setattr(custom_rewards, "interrupted", lambda *given: interrupted(*given), raising=False)
    message = "the reward interrupted raised RuntimeError: KeyboardInterrupt()"
    cut = stops(message, **{**SETTINGS, "reward_model": "custom_rewards:interrupted"})
    assert [path.name for path in cut.checkpoints] == ["checkpoint-1-0"]


def test_a_reward_that_does_not_answer_ends_the_run_by_name(stops, monkeypatch):
    released, calls = threading.Event(), []

    def silent(images, prompts):
        calls.append(len(images))
        if len(calls) == 2:
            released.wait(60)
        return custom_rewards.brightness(images, prompts)

    monkeypatch.setattr(custom_rewards, "silent", silent, raising=False)
    message = "the reward silent gave no scores within --reward_timeout 2 seconds"
    cut = stops(message, **{**SETTINGS, "reward_model": "custom_rewards:silent"}, reward_timeout=2)
    released.set()
    assert [path.name for path in cut.checkpoints] == ["checkpoint-1-0"]


@pytest.mark.slow
def test_a_reward_that_raises_on_one_process_is_known_to_all(flags, tmp_path, subprocess_environment):
    given = {**SETTINGS, "prompts_per_iteration": 2, "reward_model": "failing_rewards:raises_once_on_rank_1"}
    done = torchrun(flags(**given), subprocess_environment)
    text = "raises_once_on_rank_1 raised ConnectionError: the API is down (rank 1); iterations up to 1 are saved"
    assert done.returncode and text in done.stderr
    run = Run(tmp_path / "run")
    assert [path.name for path in run.checkpoints] == ["checkpoint-1-0"]
    given["reward_model"] = "custom_rewards:rough_brightness"
    resumed = torchrun(flags(**given, resume_from_checkpoint="latest"), subprocess_environment)
    assert resumed.returncode == 0, resumed.stderr[-2000:]
    whole = torchrun(flags(**{**given, "output_dir": tmp_path / "whole"}), subprocess_environment)
    assert whole.returncode == 0 and same_weights(run.weights(), Run(tmp_path / "whole").weights())


PROBED = """
import os, threading
def fine(images, prompts): return [float(image.width) for image in images]
def failed(images, prompts): return [None, float("nan")]
def column(images, prompts): return [[1.0, 2.0]] * len(images)
def nothing(images, prompts): pass
def raises(images, prompts): raise ConnectionError("the API is down")
def blocks(images, prompts): threading.Event().wait()
def dies(images, prompts): os._exit(9)
"""


@pytest.mark.parametrize(
    "name,problem",
    [
        ("fine", None),
        ("failed", None),
        ("column", r"column returned scores of shape \(2, 2\)"),
        ("nothing", "nothing returned a NoneType"),
        ("raises", r"raised ConnectionError: the API is down \(probed\.py, line 7\)"),
        ("blocks", "no scores of two pictures within 3 seconds"),
        ("dies", "ended its process, status 9"),
        ("missing", "probed has no 'missing'"),
    ],
)
def test_a_custom_reward_is_called_once_before_the_run(name, problem, tmp_path, monkeypatch):
    (tmp_path / "probed.py").write_text(PROBED)
    monkeypatch.syspath_prepend(tmp_path)
    if problem is None:
        return probe(f"probed:{name}", "reward_model", (32, 16), 60)
    with pytest.raises(ValueError, match=f"reward_model probed:{name}: .*{problem}"):
        probe(f"probed:{name}", "reward_model", (32, 16), 3)


@pytest.mark.slow
def test_a_reward_that_can_not_score_is_refused_before_anything_is_loaded(flags, tmp_path, subprocess_environment):
    (tmp_path / "probed.py").write_text(PROBED)
    path = f"{subprocess_environment['PYTHONPATH']}:{tmp_path}"
    done = torchrun(flags(reward_model="probed:raises"), {**subprocess_environment, "PYTHONPATH": path}, processes=1)
    last = done.stderr.splitlines()[-1]
    assert done.returncode and last.startswith(
        "train_grpo_flux.py: error: --reward_model probed:raises: asked to score"
    )
    assert "Traceback" not in done.stderr and not (tmp_path / "run").exists()


def test_a_printed_command_names_the_interpreter_that_has_the_packages(tmp_path, monkeypatch):
    python = tmp_path / "work/.venv/bin/python"
    python.parent.mkdir(parents=True)
    python.touch(mode=0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    found = []
    for place in (python.parent.parent, tmp_path / "work", tmp_path / "elsewhere"):
        place.mkdir(exist_ok=True)
        monkeypatch.chdir(place)
        found.append(stopping._this_python())
    assert found == ["bin/python", ".venv/bin/python", str(python)]
    monkeypatch.setenv("PATH", f"{python.parent}:/usr/bin")  # the environment is activated
    assert stopping._this_python() == "python"
