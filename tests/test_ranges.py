"""Every number that a command can't work with is refused by its field's range, not by an exception later."""

from dataclasses import fields
from typing import Any, get_args, get_origin

from fastvideo.cli import FlagError, flag_errors, parse_dataclass
from fastvideo.config import GRPOConfig
from fastvideo.data_preprocess.preprocess_flux_embedding import PreprocessConfig
from fastvideo.eval.eval_reward import EvalConfig
from fastvideo.eval.report import ReportConfig
from fastvideo.eval.run_benchmark import BenchmarkConfig
from fastvideo.models.merge_lora import MergeConfig
from fastvideo.models.reward_model.server import ServerConfig
from fastvideo.rollout_plan import describe
from fastvideo.sample.sample_flux import SampleConfig

import pytest
import torch

VALUES = (0, -1, 1, 2, 10**9, 2**63, 2**70, 1e-300, 1e-45, 0.5, 1e300, float("nan"), float("inf"), float("-inf"))
NEEDED: dict[type, dict[str, Any]] = {
    SampleConfig: {"baseline": True}, EvalConfig: {"image": "x.png", "prompt": "x"}, ReportConfig: {"run_dir": ["x"]},
    BenchmarkConfig: {"benchmark": "dpg", "baseline": True}, PreprocessConfig: {}, MergeConfig: {"model_path": "x"},
    ServerConfig: {"reward_model": "shapes"},
}  # fmt: skip


def numbers(config: type) -> list[tuple[str, int | float]]:
    """(field, value) for all fields of a command's settings that hold one number."""
    kinds = {
        f.name: {f.type, *get_args(f.type)} & {int, float} for f in fields(config) if get_origin(f.type) is not list
    }
    return [(name, v) for name, kind in kinds.items() for v in VALUES if type(v) in kind or kind == {float}]


@pytest.mark.parametrize("algorithm", ["mix_grpo_flash", "flow_grpo", "branch_grpo"])
def test_the_trainer_refuses_a_number_or_can_plan_with_it(algorithm):
    needed = {"data_json_path": "unused", "reward_model": "shapes", "algorithm": algorithm}
    for name, value in numbers(GRPOConfig):
        try:
            describe(GRPOConfig.create(**{**needed, name: value}), 1)
        except FlagError:
            continue
        except Exception as error:
            raise AssertionError(f"--{name} {value}") from error
        if "seed" in name:
            torch.Generator().manual_seed(value)


@pytest.mark.parametrize("config", NEEDED, ids=lambda config: config.__name__)
def test_other_commands_refuse_numbers_that_are_no_numbers_or_below_their_range(config):
    for name, value in numbers(config):
        accepted = True
        try:
            config(**{**NEEDED[config], name: value})
        except FlagError:
            accepted = False
        if value != value or abs(value) == float("inf"):
            assert not accepted, (name, value)
        if accepted and "seed" in name:
            torch.Generator().manual_seed(value)
        if accepted and "port" in name:
            assert 0 <= value < 65536


@pytest.mark.parametrize("flag", ["--guidance_scale 1e30", "--clip_range 1e300", "--rollout_batch_size 1" + 22 * "0"])
def test_a_number_that_no_tensor_holds_is_refused(capsys, flag):
    with pytest.raises(SystemExit) as stop:
        parse_dataclass(GRPOConfig, ["--data_json_path", "unused", *flag.split()])
    assert stop.value.code == 2 and f"{flag.split()[0]} 1" in capsys.readouterr().err


def test_a_value_with_line_breaks_is_refused_in_one_line(capsys):
    with pytest.raises(SystemExit), flag_errors("program.py"):
        raise FlagError("output_dir", "a\nb", "no folder\n(really)")
    assert capsys.readouterr().err == "program.py: error: --output_dir a b: no folder (really)\n"
    with pytest.raises(SystemExit):
        parse_dataclass(GRPOConfig, ["--data_json_path", "unused", "--dpm_algorithm_type", "a\nb"])
    assert len(capsys.readouterr().err.splitlines()) == 1
