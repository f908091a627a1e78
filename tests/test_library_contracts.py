"""Contracts with libraries: one test per private or version-dependent name that the package relies on.

An upgrade that changes such a name fails here. The message gives the library's version, the file that uses the name,
and the use. test_library_contracts_rewards.py tests the names that rewards rely on.
"""

import argparse
import inspect
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version

from fastvideo.models.speed import ROUNDING_OF_ROWS

import pytest
import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from diffusers import FluxPipeline, FluxTransformer2DModel
from diffusers.models import ParallelConfig
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor
from diffusers.optimization import get_scheduler
from hydra.core.override_parser.overrides_parser import OverridesParser


@contextmanager
def relied_on(distribution: str, name: str, user: str) -> Iterator[None]:
    """Fails with the library's version and the user of the name if a check in the block fails or raises anything."""
    try:
        yield
    except Exception as error:
        used = f"{distribution} {version(distribution)} changed {name}, which fastvideo/{user}"
        pytest.fail(f"{used}: {type(error).__name__}: {error}")


# --- torch ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("found_inf", "steps"), [(0.0, 1), (1.0, 0)])
def test_the_fused_adamw_divides_by_grad_scale_and_skips_with_found_inf(found_inf, steps):
    parameters = [torch.nn.Parameter(torch.ones(3)) for _ in range(2)]
    gradient = torch.tensor([1.0, -2.0, 3.0])
    with relied_on("torch", "AdamW.grad_scale or .found_inf", "runtime/engines.py clips and skips steps by"):
        scaled, plain = (torch.optim.AdamW([p], lr=0.1, fused=True) for p in parameters)
        scaled.grad_scale, scaled.found_inf = torch.tensor(4.0), torch.tensor(found_inf)
        parameters[0].grad, parameters[1].grad = 4 * gradient, gradient
        scaled.step()
        if steps:
            plain.step()
            assert torch.equal(scaled.state[parameters[0]]["exp_avg"], plain.state[parameters[1]]["exp_avg"])
        assert scaled.state[parameters[0]]["step"] == steps
        assert torch.equal(*(p.detach() for p in parameters))


def test_a_learning_rate_schedule_goes_on_from_the_step_it_is_given():
    def schedule() -> torch.optim.lr_scheduler.LRScheduler:
        optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.ones(1))], lr=0.1)
        return get_scheduler("cosine", optimizer, num_warmup_steps=2, num_training_steps=10)

    with relied_on("torch", "LRScheduler._step_count", "train_grpo_flux.py puts a resumed schedule in its place by"):
        whole, rest = schedule(), schedule()
        assert whole._step_count == 1 and whole.last_epoch == 0
        for _ in range(5):
            whole.optimizer.step()
            whole.step()
        rest._step_count = rest.last_epoch = 5 - 1
        rest.step()
        assert rest.get_last_lr() == whole.get_last_lr()
        assert rest._step_count == whole.last_epoch == rest.last_epoch == 5


def test_dynamo_has_a_limit_of_graphs_beyond_which_it_gives_up():
    limit = torch._dynamo.config.recompile_limit
    calls = []

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]):
        calls.append(inputs[0].shape)
        return graph

    with relied_on("torch", "_dynamo.config.recompile_limit", "models/speed.py raises for all shapes of blocks"):
        try:
            torch._dynamo.reset()
            torch._dynamo.config.recompile_limit = 2
            double = torch.compile(lambda x: 2 * x, backend=backend, dynamic=False)
            for size in range(2, 7):
                double(torch.ones(size))
            assert len(calls) == 2
        finally:
            torch._dynamo.config.recompile_limit = limit
            torch._dynamo.reset()


def test_inductor_knows_the_options_that_make_rows_round_alike():
    with relied_on("torch", "Inductor's options", "models/speed.py gives compiled blocks"):
        assert set(ROUNDING_OF_ROWS) <= set(torch._inductor.list_options())


# --- accelerate and deepspeed -----------------------------------------------------------------------------------------


@pytest.fixture
def one_process(monkeypatch) -> None:
    """Sets torchrun's variables for a single process."""
    place = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "LOCAL_WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1"}
    for name, value in {**place, "MASTER_PORT": 0}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(os, "environ", os.environ.copy())  # the plugin adds variables
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def test_accelerate_shards_on_a_cpu_when_it_is_told_that_there_are_gpus(one_process):
    with relied_on("accelerate", "PartialState._shared_state", "runtime/engines.py gets FSDP on a CPU by"):
        PartialState(cpu=True)
        assert "distributed_type" in PartialState._shared_state
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
        plugin = FullyShardedDataParallelPlugin(fsdp_version=2)
        assert Accelerator(cpu=True, fsdp_plugin=plugin).distributed_type == DistributedType.FSDP


def test_accelerate_connects_the_cpus_too_for_parameters_held_there():
    with relied_on("accelerate", "FSDP_OFFLOAD_PARAMS", "runtime/engines.py sets for --use_cpu_offload"):
        assert "FSDP_OFFLOAD_PARAMS" in inspect.getsource(inspect.getmodule(PartialState))


def test_accelerate_s_states_can_be_forgotten():
    with relied_on("accelerate", "AcceleratorState._reset_state", "(benchmarks and tests) starts a second trainer by"):
        Accelerator(cpu=True)
        assert AcceleratorState._shared_state and PartialState._shared_state
        AcceleratorState._reset_state(reset_partial_state=True)
        assert not AcceleratorState._shared_state and not PartialState._shared_state


def test_deepspeed_gathers_a_parameter_by_a_function_of_its_utils():
    with relied_on("deepspeed", "utils.safe_get_full_fp32_param", "runtime/engines.py reads weights of ZeRO by"):
        from deepspeed.utils import safe_get_full_fp32_param

        assert list(inspect.signature(safe_get_full_fp32_param).parameters) == ["param"]


def test_deepspeed_builds_no_collectives_of_its_own_for_a_cpu_if_they_are_marked():
    with relied_on("deepspeed", "ops.__compatible_ops__", "runtime/engines.py marks what isn't to be compiled in"):
        from deepspeed import ops
        from deepspeed.comm.torch import build_shm_op

        before = ops.__compatible_ops__["deepspeed_shm_comm"]
        ops.__compatible_ops__["deepspeed_shm_comm"] = False
        try:
            assert build_shm_op() is None
        finally:
            ops.__compatible_ops__["deepspeed_shm_comm"] = before


# --- diffusers and peft -----------------------------------------------------------------------------------------------


def test_diffusers_numbers_the_latent_tokens_row_by_row():
    with relied_on("diffusers", "FluxPipeline._prepare_latent_image_ids", "models/flux.py numbers tokens by"):
        ids = FluxPipeline._prepare_latent_image_ids(1, 2, 3, torch.device("cpu"), torch.float32)
        assert ids.tolist() == [[0, row, column] for row in range(2) for column in range(3)]


def test_diffusers_unpacks_what_it_has_packed():
    latents = torch.arange(2 * 4 * 6 * 8.0).view(2, 4, 6, 8)
    with relied_on("diffusers", "FluxPipeline._unpack_latents", "models/flux.py decodes by"):
        packed = FluxPipeline._pack_latents(latents, 2, 4, 6, 8)
        assert torch.equal(FluxPipeline._unpack_latents(packed, 6 * 8, 8 * 8, 8), latents)


def test_diffusers_attention_takes_backend_and_parallel_config_from_the_processor():
    with relied_on("diffusers", "FluxAttnProcessor", "models/speed.py replaces"):
        assert FluxAttnProcessor._attention_backend is None and FluxAttnProcessor._parallel_config is None


def test_diffusers_resolves_a_parallel_config_by_a_method_of_the_model():
    with relied_on("diffusers", "enable_parallelism", "models/speed.py splits sequences by"):
        assert "self._resolve_parallel_config(" in inspect.getsource(FluxTransformer2DModel.enable_parallelism)
        parameters = inspect.signature(ParallelConfig.setup).parameters
        assert list(parameters)[1:4] == ["rank", "world_size", "device"] and "mesh" in parameters


# --- hydra and argparse -----------------------------------------------------------------------------------------------


def test_hydra_parses_one_override_to_a_value():
    with relied_on("hydra-core", "OverridesParser", "train.py reads key=value by"):
        override = OverridesParser.create().parse_override("a.b=[1, 0.5]")
        assert override.value() == [1, 0.5] and not override.is_sweep_override()
        assert OverridesParser.create().parse_override("a=1,2").is_sweep_override()


def test_argparse_keeps_its_options_by_name():
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--eta")
    assert list(parser._option_string_actions) == ["--eta"], (
        f"Python {platform.python_version()} changed ArgumentParser._option_string_actions, in which fastvideo/cli.py "
        "looks for the option closest to an unknown one"
    )
