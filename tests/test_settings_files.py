"""--config FILE.yaml: flags in a file, their place among recipes and flags, and the file that a run writes."""

import os
import re
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

from fastvideo.cli import parse_dataclass
from fastvideo.config import ALGORITHMS, NOT_AGAIN, GRPOConfig
from fastvideo.data_preprocess.preprocess_flux_embedding import PreprocessConfig
from fastvideo.eval.settings import EvalConfig
from fastvideo.reference_flags import translate
from fastvideo.sample.settings import SampleConfig
from fastvideo.train_grpo_flux import main

import pytest
from conftest import ROOT, Run, same_weights

GRPO = "data_json_path: p.json\n"


def parse(path: Path, text: str, *argv: str, cls: type = GRPOConfig):
    path.write_text(text, encoding="utf-8")
    return parse_dataclass(cls, ["--config", str(path), *argv], "", translate if cls is GRPOConfig else None)


@pytest.fixture
def file(tmp_path) -> Path:
    return tmp_path / "my.yaml"


def test_values_in_a_file_are_read_as_on_the_command_line(file):
    text = (
        "data_json_path: p.json\nlearning_rate: 1e-4  # text to YAML\nuse_lora: true\nroll-back: no\ncompile: true\n"
        "lora_target_modules: [to_q, to_k]\ngranular_start_weights: 1,2,3\nrollout_batch_size: null\neval_steps: 0\n"
        "experiment_name: 12:30\nfsdp_sharding_strategy: hybrid_full\nparallel: fsdp\n"
    )
    config = parse(file, text)
    assert (config.learning_rate, config.use_lora, config.roll_back, config.compile) == (1e-4, True, False, "true")
    assert config.lora_target_modules == ["to_q", "to_k"] and config.granular_start_weights == [1, 2, 3]
    assert config.rollout_batch_size is None and config.experiment_name == "12:30"
    assert config.fsdp_sharding_startegy == "hybrid_full"
    assert parse(file, "# nothing\n", "--data_json_path", "p.json").seed == 714


def test_all_programs_read_files(file):
    assert parse(file, "batch_size: 3\n", cls=PreprocessConfig).batch_size == 3
    assert parse(file, "manifest: m.json\nhacking_measures: false\n", cls=EvalConfig).hacking_measures is False
    assert parse(file, "seed: 5\nbaseline: true\n", "--seed", "6", cls=SampleConfig).seed == 6


def test_flags_beside_a_file_count_more_wherever_they_stand_and_a_recipe_counts_less(file):
    recipe = ["--seed", "1", "--h", "32", "--data_json_path", "r.json", "--w", "64", "--override", "--w=80"]
    file.write_text("seed: 2\nh: 48\nw: 96\nprompts_file: mine.txt\n", encoding="utf-8")
    for hand in (["--seed", "3", f"--config={file}"], ["--config", str(file), "--seed", "3"]):
        config = parse_dataclass(GRPOConfig, [*recipe, "--override", *hand])
        assert (config.seed, config.h, config.w, config.prompts_file) == (3, 48, 96, "mine.txt")
        assert config.data_json_path is None  # the file excludes the recipe's


@pytest.mark.parametrize(
    "text,problem",
    [
        (GRPO + "samplng_steps: 5\n", "line 2: samplng_steps: unknown name; did you mean --sampling_steps?"),
        (GRPO + "no_roll_back: true\n", "no_roll_back: unknown name"),
        (GRPO + "config: other.yaml\n", "config: unknown name"),
        (GRPO + "seed: 1\nseed: 2\n", "line 3: seed: is there twice"),
        (GRPO + "h: 3.5\n", "my.yaml, line 2: h: invalid int value: '3.5'"),
        (GRPO + "h: 33\n", "--h 33: must be a multiple of 16"),
        (GRPO + "use_lora: 'true'\n", "use_lora: true: expected true or false"),
        (GRPO + "seed: [1, 2]\n", "seed: expected one value"),
        (GRPO + "granular_start_weights: [[1]]\n", "granular_start_weights: expected a list of values"),
        (GRPO + "reward_model: {hpsv2: 1}\n", "reward_model: expected one value"),
        (GRPO + "sde_type: fast\n", "my.yaml, line 2: sde_type: invalid choice: 'fast'; choose from"),
        (GRPO + "learning_rate: small\n", "my.yaml, line 2: learning_rate: invalid float value: 'small'"),
        (
            GRPO + "granular_start_weights: [1, x]\n",
            "line 2: granular_start_weights: 1 x: expected a list of float",
        ),
        ("- a\n", "expected lines of `name: value`"),
        ("a: [1\n", "expected ',' or ']'"),
        (GRPO + "  h: 64\n", "line 2 or the one before: each line is `name: value` without spaces before the name;"),
        ("a: !!python/object/apply:os.system [x]\n", "a: unknown name"),  # nothing is ever constructed
    ],
)
def test_a_file_that_cant_be_used_ends_in_one_line_before_anything_loads(file, capsys, text, problem):
    with pytest.raises(SystemExit) as stop:
        parse(file, text)
    (line,) = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and problem in line, line


def test_a_missing_file_and_a_record_are_named(tmp_path, capsys):
    (tmp_path / "args.json").write_text('{"h": 64, "reward_names": {}}')
    files = {
        str(tmp_path / "args.json"): "args.json: records a run; config.yaml beside it",
        "no.yaml": "--config no.yaml: No such file",
        "": "--config : ",
    }
    for path, problem in files.items():
        with pytest.raises(SystemExit):
            parse_dataclass(GRPOConfig, ["--config", *filter(None, [path])])
        assert problem in capsys.readouterr().err


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_the_file_of_a_run_gives_the_same_settings_under_any_recipe_and_no_secret(file, algorithm, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef")
    config = GRPOConfig.create(
        algorithm=algorithm, data_json_path="p.json", learning_rate=3e-7, granular_end_weights=[1.0, 0.0, 1.0],
        experiment_name="0123456789abcdef", reward_server="http://me:secret@host:1", resume_from_checkpoint="latest",
    )  # fmt: skip
    text = config.to_yaml()
    assert "secret" not in text and "0123456789abcdef" not in text
    assert text.index("learning_rate") < text.index("and the defaults") < text.index("sampler_seed")
    recipe = ["--lr_scheduler", "cosine", "--prompts_file", "other.txt", "--override"]
    file.write_text(text, encoding="utf-8")
    again = asdict(parse_dataclass(GRPOConfig, [*recipe, "--config", str(file)], "", translate))
    changed = {name for name, value in asdict(config).items() if again[name] != value}
    assert changed == {"experiment_name", "reward_server", "resume_from_checkpoint"}
    assert not set(NOT_AGAIN) & {line.partition(":")[0] for line in text.splitlines()}


def test_a_run_starts_again_from_its_file_bit_for_bit_and_is_resumed_with_it(train, tmp_path, capfd):
    first, again = train("x", checkpointing_steps=1, granular_end_weights=[0.2, 0.3, 0.5]), Run(tmp_path / "y")
    printed = capfd.readouterr().out
    assert "1 prompt x 4 samples = 4 images per iteration on 1 process\n" in printed and "rows per prompt" in printed
    assert "(linear): binding 0.5 to 0.2, form 0.3, clean 0.2 to 0.5\n" in printed and "predicted time" not in printed
    assert f"the trained model: {first.checkpoints[-1]}; metrics: {first.folder}/metrics.jsonl\n" in printed
    name, python, *rest = printed.splitlines()[-1].split()
    assert (name, rest) == ("report:", ["-m", "fastvideo.eval.report", "--run_dir", str(first.folder)])
    assert Path(shutil.which(python)).absolute() == Path(sys.executable)
    command = ["--config", str(first.folder / "config.yaml"), "--output_dir", str(again.folder)]
    for resume in ([], ["--resume_from_checkpoint", "latest"]):
        main([*command, *resume])
        assert again.numbers() == first.numbers()
        assert same_weights(again.weights(), first.weights())
        shutil.rmtree(again.checkpoints[-1])
    assert "changed settings" not in capfd.readouterr().out
    main([*command, "--resume_from_checkpoint", "latest", "--dry_run", "--max_train_steps", "1000000"])
    assert re.search(r"predicted time: 1000000 iterations of \S+ s, the mean in \S+: \d+ (d|h)", capfd.readouterr().out)
    texts = [(run.folder / "config.yaml").read_text() for run in (first, again)]
    assert texts[1] == texts[0].replace(str(first.folder), str(again.folder))


def test_recipes_and_scripts_take_a_file_before_their_own_values_and_the_environment(file, tmp_path):
    file.write_text(f"seed: 5\nsampling_steps: 9\nmax_train_steps: 7\nprompts_file: {file}\nlearning_rate: 3.0e-6\n")
    command = ["bash", "scripts/finetune/finetune_flux_grpo_DanceGRPO.sh", "--config", str(file), "--seed", "6"]
    stub = tmp_path / "python"
    stub.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    stub.chmod(0o755)
    environment = os.environ | {"PYTHON_BIN": str(stub), "LEARNING_RATE": "1e-3"}
    words = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    ).stdout.split()
    config = parse_dataclass(GRPOConfig, words[1:], "", translate)
    assert (config.seed, config.sampling_steps, config.learning_rate) == (6, 9, 3e-6)
    assert config.data_json_path is None and config.algorithm == "dance_grpo"
