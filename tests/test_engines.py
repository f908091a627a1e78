"""Engines, each as real processes under torchrun: the same numbers, the same checkpoints, no needless communication."""

import gc
import json
import weakref
from pathlib import Path

from fastvideo.cli import FlagError
from fastvideo.config import GRPOConfig
from fastvideo.runtime import engines as engines_module
from fastvideo.runtime.engines import ComputeCopy, build_accelerator, choose_engine

import pytest
import torch
from accelerate.utils import DistributedType
from conftest import Run, assert_same_update, relative_difference, same_weights, torchrun
from safetensors.torch import load_file
from transformers.integrations import is_deepspeed_zero3_enabled

# Samples draw their own steps: the processes have different numbers of micro-batches.
UNEVEN = {
    "algorithm": "dance_grpo",
    "sampling_steps": 6,
    "timestep_fraction": 0.4,
    "gradient_accumulation_steps": 2,
    "prompts_per_iteration": 4,
    "learning_rate": 1e-6,
    "train_micro_batch_size": 1,
    "reward_model": "custom_rewards:rough_brightness",
}
LORA = {"use_lora": True, "lora_rank": 4, "lora_alpha": 8, "learning_rate": 1e-4}
ENGINES = {
    "ddp": {"parallel": "ddp"},
    "fsdp": {"parallel": "fsdp"},
    "fsdp, compiled": {"parallel": "fsdp", "compile": "true"},
    "fsdp, gathered anew at every step": {"fsdp_sharding_startegy": "full", "rollout_keep_gathered": "false"},
    "fsdp, gathered between forward and backward": {"fsdp_sharding_startegy": "hybrid_zero2"},
    "ZeRO-2": {"parallel": "deepspeed", "zero_stage": 2},
    "ZeRO-3": {"parallel": "deepspeed", "zero_stage": 3},
}


def weights(run: Run, part: str = ".") -> dict[str, torch.Tensor]:
    (path,) = (run.checkpoints[-1] / part).glob("*.safetensors")
    return load_file(path)


def assert_same_numbers(a: Run, b: Run) -> None:
    """Asserts that metrics and weights are equal up to float32 rounding. Works for every format of optimizer state."""
    assert len(a.metrics) == len(b.metrics) > 0
    for one, other in zip(a.numbers(), b.numbers(), strict=True):
        assert one.keys() == other.keys()
        for name in ("reward", "grad_norm", "nfe", "optimizer_steps", "lr", "window", "reward_std"):
            assert one[name] == pytest.approx(other[name], rel=1e-3), name
        for name in ("loss", "ratio_mean", "ratio_max_deviation", "clip_frac"):
            assert one[name] == pytest.approx(other[name], abs=2e-5), name
    first, second = (torch.cat([w.flatten() for _, w in sorted(weights(run).items())]) for run in (a, b))
    assert relative_difference(first, second) < 1e-6


@pytest.fixture
def on_two(flags, tmp_path, subprocess_environment):
    """on_two(name, flag=value, ...) -> the Run of two processes."""

    def run(name: str, **given) -> Run:
        done = torchrun(flags(output_dir=tmp_path / name, **given), subprocess_environment)
        assert done.returncode == 0, done.stderr[-4000:]
        return Run(tmp_path / name)

    return run


def engines(*in_every_run: str) -> list:
    """Parametrizes a test by all engines. Engines that are not named only run in the long test run."""
    return [pytest.param(name, marks=() if name in in_every_run else pytest.mark.long) for name in ENGINES]


@pytest.mark.slow
def test_random_weights_are_the_same_with_every_engine(train, on_two):
    given = UNEVEN | {"init_random_flux": True}
    assert_same_numbers(train(**given), on_two("two", **given, parallel="fsdp"))


@pytest.mark.slow(1)
@pytest.mark.parametrize("name", engines("ddp", "fsdp", "ZeRO-2"))
def test_every_engine_gives_the_numbers_of_one_process(train, on_two, name):
    alone, together = train(**UNEVEN), on_two("two", **UNEVEN, **ENGINES[name])
    assert_same_numbers(alone, together)
    if ENGINES[name].get("parallel") != "deepspeed":
        assert_same_update(alone, together)


def test_zero_3_leaves_models_of_transformers_whole(monkeypatch):
    """transformers splits all models that it loads while a ZeRO-3 configuration is active."""

    class Connected:
        distributed_type = DistributedType.DEEPSPEED

        def __init__(self, deepspeed_plugin, **_):
            self.plugin = deepspeed_plugin
            self.plugin.set_deepspeed_weakref()  # as Accelerator does
            assert is_deepspeed_zero3_enabled()

    monkeypatch.setattr(engines_module, "Accelerator", Connected)
    accelerator = build_accelerator(config(parallel="deepspeed", zero_stage=3), "deepspeed")
    assert accelerator.plugin and not is_deepspeed_zero3_enabled()


@pytest.mark.long
def test_prompts_are_embedded_with_zero_3(flags, tmp_path, subprocess_environment):
    (tmp_path / "prompts.txt").write_text("a red circle\na blue square\n")
    given = {"prompts_file": tmp_path / "prompts.txt", "max_train_steps": 1, **ENGINES["ZeRO-3"]}
    done = torchrun(flags(output_dir=tmp_path / "out", **given), subprocess_environment)
    assert done.returncode == 0, done.stderr[-4000:]
    assert len(Run(tmp_path / "out").checkpoints) == 1


@pytest.fixture
def in_bf16(train, flags, tmp_path, subprocess_environment):
    """in_bf16(flag=value, ...) -> the Runs of one process without and with FSDP2, in bf16."""

    def run(**kind) -> tuple[Run, Run]:
        settings = UNEVEN | {"max_train_steps": 1, "gradient_accumulation_steps": 4, "mixed_precision": "bf16"} | kind
        given = flags(output_dir=tmp_path / "fsdp", **settings, parallel="fsdp")
        done = torchrun(given, subprocess_environment, processes=1)
        assert done.returncode == 0, done.stderr[-4000:]
        alone, fsdp = train("alone", **settings), Run(tmp_path / "fsdp")
        assert alone.metrics[0]["reward"] == pytest.approx(fsdp.metrics[0]["reward"], rel=1e-2)
        assert {w.dtype for w in weights(alone).values()} == {torch.float32}
        return alone, fsdp

    return run


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind", [{}, pytest.param({"compile": "true"}, marks=pytest.mark.long)], ids=["full", "compiled"]
)
def test_one_process_in_bf16_trains_what_fsdp_trains(kind, in_bf16):
    """Both use the same compute format, cast weights at the same places and sum gradients in float32."""
    alone, fsdp = in_bf16(**kind)
    assert relative_difference(alone.gradient(), fsdp.gradient()) < 2e-3


@pytest.mark.slow
def test_adapters_in_bf16_train_in_the_direction_of_float32_with_fsdp_as_without(in_bf16, train):
    """Frozen weights are float32 on a CPU, but FSDP2 casts them too: norms round differently. How much of that reaches
    the gradient depends on the processor.
    """
    settings = UNEVEN | {"max_train_steps": 1, "gradient_accumulation_steps": 4} | LORA
    exact = train("exact", **settings).gradient()
    alone, fsdp = (torch.nn.functional.cosine_similarity(run.gradient(), exact, dim=0) for run in in_bf16(**LORA))
    assert min(alone, fsdp) > 0.6


@pytest.mark.parametrize(
    ("count", "compiled"), [(1, False), (2, False), (3, False), pytest.param(3, True, marks=pytest.mark.long)]
)
def test_one_process_sums_bf16_gradients_in_float32(count, compiled):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    parameters = [torch.nn.Parameter(torch.randn(size)) for size in ((3, 64), (5,))]
    before = [p.detach().clone() for p in parameters]
    factors = [[torch.randn_like(p).bfloat16() for p in parameters] for _ in range(count)]  # each one's gradients
    copy = ComputeCopy(parameters, compiled)
    copy.take()
    for values in factors:
        sum((p * x).sum() for p, x in zip(parameters, values, strict=True)).backward()
        copy.add_gradients()
        assert all(p.dtype == torch.bfloat16 and p.grad is None for p in parameters)
    copy.drop()
    for parameter, value, *parts in zip(parameters, before, *factors, strict=True):
        assert torch.equal(parameter, value)
        assert torch.equal(parameter.grad, sum(x.float() for x in parts))
    # Per size, one graph for two bf16 gradients and one graph for a further gradient.
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == (4 if compiled else 0)
    # A process that makes several trainers, like bench_iteration.py, must free the weights of the previous trainer.
    alive = weakref.ref(parameters[0])
    del parameters, parameter, copy
    torch._dynamo.reset()
    gc.collect()
    assert alive() is None


@pytest.mark.slow
@pytest.mark.parametrize("name", engines("fsdp"))
def test_every_engine_trains_adapters_alike(train, on_two, name):
    copy = {} if name == "ZeRO-3" else {"ref_kl_coeff": 0.1}  # ZeRO-3 has no copies of the trained parameters
    settings = {**UNEVEN, **LORA, **copy, "quantize_base": name == "ddp"}
    assert_same_numbers(train(**settings), on_two("two", **settings, **ENGINES[name]))


@pytest.mark.slow
def test_a_checkpoint_goes_from_fsdp_to_one_process_and_back_with_its_average(train, on_two):
    settings = {
        "prompts_per_iteration": 4, "learning_rate": 1e-6, "max_train_steps": 4, "checkpointing_steps": 2,
        "ema_decay": 0.5, "lr_scheduler": "cosine", "reward_model": "custom_rewards:rough_brightness",
    }  # fmt: skip
    whole = train("whole", **settings)
    sharded = on_two("sharded", **settings, parallel="fsdp")
    assert_same_update(sharded, whole)
    for name, rest in {
        "one": train("one", **settings, resume_from_checkpoint=sharded.checkpoints[0]),
        "two": on_two("two", **settings, parallel="fsdp", resume_from_checkpoint=whole.checkpoints[0]),
    }.items():
        assert [line["step"] for line in rest.metrics] == [3, 4], name
        for line, other in zip(rest.metrics, whole.metrics[2:], strict=True):
            assert line["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-3), name
            assert line["lr"] == other["lr"]
        assert relative_difference(rest.gradient(), whole.gradient()) < 1e-4, name
        for part in (".", "ema"):
            a, b = weights(rest, part), weights(whole, part)
            assert max((a[key] - b[key]).abs().max() for key in b) < 1e-6, (name, part)


@pytest.mark.slow
def test_deepspeed_goes_on_exactly_and_only_where_its_state_fits(on_two, flags, tmp_path, subprocess_environment):
    settings = {"parallel": "deepspeed", "max_train_steps": 2, "checkpointing_steps": 1, "learning_rate": 1e-5}
    whole = on_two("whole", **settings)
    rest = on_two("rest", **settings, resume_from_checkpoint=whole.checkpoints[0])
    assert rest.numbers() == whole.numbers()[1:]
    assert all(torch.equal(w, weights(whole)[name]) for name, w in weights(rest).items())
    argv = flags(output_dir=tmp_path / "one", **settings, resume_from_checkpoint=whole.checkpoints[0])
    refused = torchrun(argv, subprocess_environment, processes=1)
    assert refused.returncode != 0 and "deepspeed (ZeRO-2) on 2 processes" in refused.stderr


@pytest.mark.slow
@pytest.mark.parametrize("name", engines("fsdp", "ZeRO-2"))
def test_all_processes_of_a_sharded_model_skip_a_step_that_is_bad_on_one(on_two, name):
    run = on_two("two", **ENGINES[name], reward_model="custom_rewards:spoils_one_step_of_rank_1")
    assert [(line["optimizer_steps"], line["skipped_steps"]) for line in run.metrics] == [(1, 1), (2, 0)]
    assert all(tensor.isfinite().all() for tensor in weights(run).values())


@pytest.mark.slow
@pytest.mark.parametrize("name,exchange", [("ddp", "allreduce_"), ("fsdp", "_reduce_scatter_base_")])
def test_gradients_are_exchanged_once_an_optimizer_step(flags, tmp_path, subprocess_environment, name, exchange):
    runs = {"one": {"train_micro_batch_size": 100}, "many": {"train_micro_batch_size": 1}}
    runs |= {"anew": runs["one"] | {"rollout_keep_gathered": "false"}} if name == "fsdp" else {}
    settings = {**ENGINES[name], "learning_rate": 1e-6, "reward_model": "custom_rewards:rough_brightness"}
    todo = [flags(output_dir=tmp_path / folder, **settings, **given) for folder, given in runs.items()]
    (tmp_path / "todo.json").write_text(json.dumps(todo))
    files = [str(tmp_path / "todo.json"), str(tmp_path / "counts.json")]
    done = torchrun(files, subprocess_environment, script="tests/count_collectives.py")
    assert done.returncode == 0, done.stderr[-4000:]
    one, many, *anew = json.loads((tmp_path / "counts.json").read_text())
    assert one[exchange] == many[exchange] > 0
    if name == "fsdp":  # a rollout gathers each block once, not once per step
        assert one["_allgather_base_"] < anew[0]["_allgather_base_"]
        assert one["_allgather_base_"] == many["_allgather_base_"]  # micro-batches don't gather again
    for folder in runs.keys() - {"one"}:
        assert_same_update(Run(tmp_path / folder), Run(tmp_path / "one"))


# --- what the flags ask for -------------------------------------------------------------------------------------------


def config(**given) -> GRPOConfig:
    return GRPOConfig(prompts_file="prompts.txt", reward_model="shapes", **given)


@pytest.mark.parametrize(
    "given,processes,expected",
    [
        ({}, 1, "none"),
        ({}, 2, "ddp"),
        ({"fsdp_sharding_startegy": "full"}, 1, "none"),
        ({"fsdp_sharding_startegy": "full"}, 2, "fsdp"),
        ({"fsdp_sharding_startegy": "none"}, 2, "ddp"),
        ({"parallel": "fsdp"}, 1, "fsdp"),
        ({"parallel": "deepspeed", "zero_stage": 3}, 2, "deepspeed"),
    ],
)
def test_the_engine_follows_from_flags_and_processes(monkeypatch, given, processes, expected):
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert choose_engine(config(**given), processes) == expected


@pytest.mark.parametrize("value", ["two", "0", ""])
def test_a_number_of_processes_that_is_none_is_refused(monkeypatch, refused, train, value):
    monkeypatch.setenv("WORLD_SIZE", value)
    with refused(f"--parallel: WORLD_SIZE is '{value}' in the environment; start processes with torchrun"):
        train()


def test_variables_of_another_launcher_that_connect_no_processes_are_refused(monkeypatch):
    def fails(**_):
        raise ValueError("`MASTER_ADDR` env was not set")

    monkeypatch.setattr(engines_module, "Accelerator", fails)
    with pytest.raises(FlagError, match="can't be connected: `MASTER_ADDR` env was not set; start them with torchrun"):
        build_accelerator(config(), "none")


@pytest.mark.parametrize("per_node,nodes,processes", [(2, 2, 6), (4, 2, 6), (1, 2, 2)])
@pytest.mark.parametrize("dry_run", [False, True])
def test_hybrid_sharding_is_refused_on_nodes_that_differ_or_have_one_process(
    monkeypatch, per_node, nodes, processes, dry_run
):
    given = config(parallel="fsdp", fsdp_sharding_startegy="hybrid_full", dry_run=dry_run)
    for name, value in {"LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": per_node, "GROUP_WORLD_SIZE": nodes}.items():
        monkeypatch.setenv(name, str(value))
    with pytest.raises(ValueError, match="hybrid_full: needs the same number of processes on every node, at least 2"):
        choose_engine(given, processes)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    assert choose_engine(given, 6) == "fsdp"


@pytest.mark.parametrize(
    "given,processes,message",
    [
        ({"parallel": "none"}, 2, "parallel none: 2 processes"),
        ({"parallel": "ddp"}, 1, "parallel ddp: only one process"),
        ({"parallel": "fsdp"}, 1, "torchrun"),
        ({"parallel": "deepspeed"}, 1, "torchrun"),
        ({"parallel": "ddp", "fsdp_sharding_startegy": "full"}, 2, "fsdp_sharding_startegy full"),
        ({"parallel": "fsdp", "fsdp_sharding_startegy": "none"}, 2, "fsdp_sharding_startegy none"),
        ({"parallel": "ddp", "use_cpu_offload": True}, 2, "use_cpu_offload"),
        ({"parallel": "deepspeed", "ema_decay": 0.9}, 2, "ema_decay"),
        ({"parallel": "deepspeed", "master_weight_type": "bf16"}, 2, "master_weight_type"),
        ({"parallel": "fsdp", "master_weight_type": "bf16"}, 2, "master_weight_type"),
        ({"quantize_base": True}, 1, "quantize_base: goes with --use_lora"),
        (
            {"quantize_base": True, "use_lora": True, "parallel": "fsdp"},
            2,
            "quantize_base: .* --parallel none or ddp",
        ),
        ({"quantize_base": True, "use_lora": True, "fsdp_sharding_startegy": "full"}, 2, "quantize_base: each process"),
        ({"quantize_base": True, "use_lora": True, "parallel": "deepspeed"}, 2, "quantize_base: each process"),
    ],
)
def test_an_engine_that_can_not_be_had_is_refused(monkeypatch, given, processes, message):
    monkeypatch.setenv("LOCAL_RANK", "0")
    if message == "torchrun":
        monkeypatch.delenv("LOCAL_RANK")
    with pytest.raises(ValueError, match=message):
        choose_engine(config(**given), processes)


@pytest.mark.parametrize("parallel", ["fsdp", "deepspeed", "ddp"])
def test_the_command_line_refuses_an_engine_without_torchrun(train, capsys, parallel, tmp_path):
    with pytest.raises(SystemExit) as stop:
        train("out", parallel=parallel)
    assert stop.value.code == 2 and f"--parallel {parallel}" in capsys.readouterr().err.splitlines()[-1]
    assert not Path(tmp_path / "out").exists()


# What `accelerate launch` and a shell hand on: each would change numbers, or the engine.
HOSTILE = {
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4",
    "ACCELERATE_MIXED_PRECISION": "bf16",
    "ACCELERATE_DOWNCAST_BF16": "true",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "true",
    "PARALLELISM_CONFIG_DP_REPLICATE_SIZE": "2",
    "ACCELERATE_USE_FSDP": "true",
    "ACCELERATE_USE_DEEPSPEED": "true",
    "ACCELERATE_USE_MEGATRON_LM": "true",
    "ACCELERATE_DYNAMO_BACKEND": "INDUCTOR",
    "ACCELERATE_GRADIENT_CLIPPING": "0.001",
    "ACCELERATE_TORCH_DEVICE": "meta",
    "ACCELERATE_FP8_BACKEND": "TE",
    "FSDP_VERSION": "1",
    "FSDP_RESHARD_AFTER_FORWARD": "false",
    "FSDP_OFFLOAD_PARAMS": "true",
    "FSDP_ACTIVATION_CHECKPOINTING": "true",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
    "NVIDIA_TF32_OVERRIDE": "1",
}


@pytest.mark.slow
@pytest.mark.parametrize("name", [None, *engines()])
def test_the_launcher_s_environment_changes_no_number(flags, tmp_path, subprocess_environment, name):
    given, processes = (ENGINES[name], 2) if name else ({}, 1)
    runs = []
    for folder, more in {"plain": {}, "hostile": HOSTILE}.items():
        argv = flags(output_dir=tmp_path / folder, **given)
        done = torchrun(argv, {**subprocess_environment, **more}, processes=processes)
        assert done.returncode == 0, done.stderr[-4000:]
        assert done.stderr.count("this program's flags decide: ACCELERATE_") == len(runs)
        runs.append(Run(tmp_path / folder))
    assert runs[0].numbers() == runs[1].numbers() and same_weights(runs[0].weights(), runs[1].weights())
