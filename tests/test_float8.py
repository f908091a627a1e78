"""FP8 in untrained steps, emulated on the CPU: which steps, the same numbers everywhere, and what is refused.

Real FP8 products are tested on a GPU that has them.
"""

from collections import Counter
from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace

from fastvideo import train_grpo_flux
from fastvideo.cli import parse_dataclass
from fastvideo.config import GRPOConfig
from fastvideo.eval.plots import plan_plots
from fastvideo.models import float8
from fastvideo.models.float8 import (
    Float8Copies,
    Modulated,
    float8_layers,
    float8_product,
    gelu,
    lacks_float8,
    swiglu,
    to_e4m3,
)
from fastvideo.models.flux import Flux1
from fastvideo.models.int8 import quantize_linear
from fastvideo.models.pretrained import add_lora, family_of, load_transformer
from fastvideo.models.speed import compile_transformer, rotated
from fastvideo.rollout_plan import make_plan, scout_plan
from fastvideo.runtime import rollout_drift as drift_module
from fastvideo.runtime.memory import predict_memory
from fastvideo.train_grpo_flux import main

import pytest
import torch
from conftest import Run, assert_same_update, relative_difference, same_weights, torchrun
from diffusers import AutoencoderKL, FluxTransformer2DModel
from make_tiny_flux import build_tiny_flux, build_tiny_flux2
from safetensors.torch import load_file

FP8 = {"rollout_precision": "fp8_emulated"}
LORA = {"use_lora": True, "lora_rank": 4, "lora_alpha": 8, "learning_rate": 1e-4}
NEEDS_FLOAT8 = pytest.mark.skipif(lacks_float8() is not None, reason="needs a GPU with FP8 products")


def random_layer(seed: int = 0, rows: int = 48, inputs: int = 64, outputs: int = 96) -> list[torch.Tensor]:
    """Activations whose rows differ in size by orders of magnitude, a weight, and a bias."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, inputs, generator=generator) * torch.logspace(-3, 3, rows)[:, None]
    return [x, torch.randn(outputs, inputs, generator=generator), torch.randn(outputs, generator=generator)]


def test_products_are_as_exact_as_e4m3_in_every_row_and_rows_do_not_depend_on_their_batch():
    x, weight, bias = random_layer()
    numbers, scale, _ = to_e4m3(weight)
    found = float8_product(to_e4m3(x), numbers, scale, bias, emulated=True)
    exact = torch.nn.functional.linear(x, weight, bias)
    errors = (found - exact).norm(dim=1) / torch.nn.functional.linear(x, weight).norm(dim=1)
    assert errors.min() > 0.01 and errors.max() < 0.06  # a scale for all rows would leave nothing of the small ones
    alone = torch.cat([float8_product(to_e4m3(row), numbers, scale, bias, emulated=True) for row in x.split(1)])
    torch.testing.assert_close(found, alone, rtol=1e-5, atol=1e-5)
    zeros = float8_product(to_e4m3(torch.zeros(2, 64)), numbers, scale, None, emulated=True)
    assert zeros.eq(0).all()


def test_torch_multiplies_the_same_numbers():
    """The contract with torch._scaled_mm, whose version for CPUs emulates FP8 too."""
    x, weight, bias = (tensor.bfloat16() for tensor in random_layer())
    given = (to_e4m3(x.view(4, 12, -1)), *to_e4m3(weight)[:2], bias)
    found, emulated = float8_product(*given), float8_product(*given, emulated=True)
    assert found.shape == emulated.shape == (4, 12, 96) and found.dtype == torch.bfloat16
    assert relative_difference(found.float(), emulated.float()) < 4e-3  # two bf16 roundings


def test_modulation_adapters_and_odd_sizes_stay_in_the_compute_format(random_flux):
    transformer = load_transformer(random_flux)
    add_lora(transformer, 16, 16, ["to_q", "ff.net.2"], seed=0)
    double, single = transformer.transformer_blocks[0], transformer.single_transformer_blocks[0]
    single.proj_mlp = torch.nn.Linear(128, 520)
    names = {id(module): name for block in (double, single) for name, module in block.named_modules()}
    found = [[names[id(layer)] for layer in float8_layers(block)] for block in (double, single)]
    projections = {
        "to_q.base_layer",
        "to_k",
        "to_v",
        "add_q_proj",
        "add_k_proj",
        "add_v_proj",
        "to_out.0",
        "to_add_out",
    }
    parts = {"ff.net.0.proj", "ff.net.2.base_layer", "ff_context.net.0.proj", "ff_context.net.2"}
    assert set(found[0]) == {f"attn.{name}" for name in projections} | parts
    assert set(found[1]) == {"attn.to_q.base_layer", "attn.to_k", "attn.to_v", "proj_out"}


@pytest.mark.parametrize("quantized", [False, True])
def test_copies_are_used_only_in_their_context_and_leave_no_trace(random_flux, quantized):
    transformer = load_transformer(random_flux).requires_grad_(False)
    if quantized:
        quantize_linear(Flux1().blocks(transformer), "cpu")
    block, names = transformer.single_transformer_blocks[0], list(transformer.state_dict())
    x = torch.randn(4, 128, generator=torch.Generator().manual_seed(0))
    layers = float8_layers(block)
    before = [layer(x) if layer.in_features == 128 else None for layer in layers]
    copies = Float8Copies([block], emulated=True)
    copies.take(torch.float32, nullcontext)
    with copies.in_use():
        inside = [layer(x) if layer.in_features == 128 else None for layer in layers]
    copies.drop()
    for layer, plain, reduced in zip(layers, before, inside, strict=True):
        if plain is not None:
            assert torch.equal(layer(x), plain)
            assert 0.005 < relative_difference(reduced, plain) < 0.06
    assert list(transformer.state_dict()) == names and not hasattr(layers[0], "weight_e4m3")


@pytest.fixture
def rollouts(train, monkeypatch):
    """rollouts(flag=value, ...) -> a finished Run, and what `rollout` returned in it, in order."""

    def run(**given):
        found, sample = [], train_grpo_flux.rollout

        def rollout(*args):
            found.append(sample(*args))
            return found[-1]

        with monkeypatch.context() as patch:
            patch.setattr(train_grpo_flux, "rollout", rollout)
            return train(**given), found

    return run


def test_trained_steps_are_untouched_and_the_drift_is_what_fp8_changes(rollouts):
    given = {"max_train_steps": 1, "reward_model": "custom_rewards:rough_brightness"}
    given |= {"sample_strategy": "random", "seed": 3}
    plain, (exact,) = rollouts(**given)
    assert plain.metrics[0]["window"][0] > 0  # there are steps before it
    assert not any(name.startswith("rollout_drift") for name in plain.metrics[0])
    for steps in ("after", "all"):
        run, (reduced, again) = rollouts(**given, **FP8, fp8_steps=steps)
        untouched = [
            torch.equal(getattr(reduced, name)[position], values)
            for name in ("before", "after", "means", "log_probs")
            for position, values in getattr(exact, name).items()
        ]
        assert all(untouched) == (steps == "after")
        line, moved = run.metrics[0], relative_difference(reduced.latents, exact.latents)
        assert line["ratio_first_deviation"] <= (0 if steps == "after" else 1e-6)
        assert torch.equal(again.latents, exact.latents)
        assert line["rollout_drift_latents"] == pytest.approx(moved) and 1e-4 < moved < 0.1
        assert 0 < line["rollout_drift_reward"] < 1
        shown = [[plot.name for plot in plan_plots(found.metrics, {})] for found in (plain, run)]
        assert set(shown[1]) - set(shown[0]) == {"rollout_drift"}
    assert torch.equal(rollouts(**given, rollout_precision="bf16")[1][0].latents, exact.latents)


def test_evaluations_use_no_fp8(train, prompts_file):
    """V-GRPO's rollouts are in FP8 from their first step to their last."""
    given = {"algorithm": "v_grpo", "max_train_steps": 1, "eval_steps": 1, "eval_prompts": prompts_file}
    plain, reduced = train(**given), train(**given, **FP8)
    assert plain.metrics[0]["evaluation_reward"] == reduced.metrics[0]["evaluation_reward"]
    assert plain.metrics[1]["reward"] != reduced.metrics[1]["reward"]


def test_a_drift_beyond_the_limit_is_a_warning(train, monkeypatch, warned):
    monkeypatch.setattr(drift_module, "LIMIT", 1e-6)
    with warned(r"FP8 moves a picture's reward by .* Use --rollout_precision bf16"):
        train(max_train_steps=1, **FP8)


@pytest.mark.parametrize("lora", [{}, LORA | {"quantize_base": True}])
def test_a_resumed_run_equals_an_uninterrupted_one(train, lora):
    given = FP8 | lora | {"checkpointing_steps": 1, "rollout_drift_steps": 1}
    whole = train("whole", **given)
    rest = train("rest", **given, resume_from_checkpoint=whole.checkpoints[0])
    assert rest.numbers() == whole.numbers()[1:] and 0 < rest.metrics[0]["rollout_drift_reward"] < 1
    weights = [load_file(next(run.checkpoints[-1].glob("*.safetensors"))) for run in (whole, rest)]
    assert same_weights(*weights)


@pytest.mark.slow
@pytest.mark.parametrize(
    "engine",
    [
        {"parallel": "fsdp"},
        pytest.param({"parallel": "ddp"}, marks=pytest.mark.long),
        pytest.param({"parallel": "fsdp", "rollout_keep_gathered": "false"}, marks=pytest.mark.long),
        pytest.param({"parallel": "fsdp", **LORA}, marks=pytest.mark.long),
        pytest.param({"parallel": "ddp", **LORA, "quantize_base": True}, marks=pytest.mark.long),
    ],
)
def test_every_engine_gives_the_numbers_of_one_process(train, flags, tmp_path, subprocess_environment, engine):
    """V-GRPO: FP8 is in the first call of the model too. Processes sample one prompt each, so one process has to as
    well: where float32 rounds differently, an e4m3 number may fall to another one."""
    given = FP8 | {"algorithm": "v_grpo", "prompts_per_iteration": 2, "reward_model": "custom_rewards:rough_brightness"}
    given |= {"rollout_batch_size": 4, "max_train_steps": 1}
    own = {name: value for name, value in engine.items() if name not in ("parallel", "rollout_keep_gathered")}
    argv = flags(output_dir=tmp_path / "two", **given, **engine)
    done = torchrun(argv, subprocess_environment)
    assert done.returncode == 0, done.stderr[-4000:]
    one, two = train(**given, **own), Run(tmp_path / "two")
    assert_same_update(two, one)
    for name in ("rollout_drift_latents", "rollout_drift_reward"):  # means over both processes, the first prompt of one
        assert 0 < two.metrics[0][name] < 1 and 0 < one.metrics[0][name] < 1


def settings(algorithm: str, **given) -> GRPOConfig:
    return GRPOConfig.create(algorithm=algorithm, data_json_path="unused", reward_model="shapes", **given)


def states(algorithm: str, window: list[int], prefix: bool, **given) -> list[int]:
    return sorted(make_plan(settings(algorithm, **given), window).untrained_states(prefix))


def test_which_states_fp8_may_compute():
    assert states("mix_grpo", [3, 4], False, sampling_steps=8) == [4, 5, 6]
    assert states("mix_grpo", [3, 4], True, sampling_steps=8) == [-1, 0, 1, 4, 5, 6]
    assert states("mix_grpo", [0, 1], True, sampling_steps=8) == [1, 2, 3, 4, 5, 6]
    assert states("v_grpo", [], False, sampling_steps=3) == states("v_grpo", [], True, sampling_steps=3) == [-1, 0, 1]
    candidates = scout_plan(settings("mix_grpo", scouts=24, scout_steps=3, init_same_noise=False))
    assert candidates.untrained_states(False) == {-1, 0, 1}
    # E-GRPO: the anchor (0 to 3) leads to the active steps; each has a tail of its own.
    given = {"sampling_steps": 4, "eta_step_list": [0], "eta_step_merge_list": [2]}
    assert states("grpo_merge", [], False, **given) == [4, 5] and states("grpo_merge", [], True, **given) == [
        0,
        1,
        2,
        4,
        5,
    ]


def test_what_fp8_cannot_do_is_refused_before_anything_loads(flags, refused, tmp_path, capsys):
    refusals = {
        "--rollout_precision fp8: needs GPUs with FP8 products .* no GPU; choose bf16, or .* fp8_emulated": {
            "mixed_precision": "bf16"
        },
        "--rollout_precision fp8: needs --mixed_precision bf16, not no; fp8_emulated takes both": {},
        "--rollout_precision fp8: .* not deepspeed": {"mixed_precision": "bf16", "parallel": "deepspeed"},
        "--fp8_steps all: goes with .* fp8 or fp8_emulated": {"rollout_precision": "bf16", "fp8_steps": "all"},
    }
    for message, given in refusals.items():
        with refused(message):
            main(flags(**{"rollout_precision": "fp8", **given}))
    assert not (tmp_path / "run").exists()
    main(flags(rollout_precision="fp8", mixed_precision="bf16", dry_run=True))
    printed = capsys.readouterr()
    assert "of these in FP8 (fp8): 16\n" in printed.out and "fp8_copies 0.0009" in printed.out
    marked = [line.split()[0] for line in printed.out.splitlines() if line.endswith("in FP8")]
    assert marked == ["2", "3", "4", "5"]  # those after the window
    assert "warning: --rollout_precision fp8 can't run here: this machine has no GPU" in printed.err


def test_gpus_from_ada_on_have_fp8(monkeypatch):
    gpus = {"A100": (8, 0), "L40S": (8, 9), "H100": (9, 0)}
    named = [SimpleNamespace(name=name, major=major, minor=minor) for name, (major, minor) in gpus.items()]
    monkeypatch.setattr(torch.cuda, "get_device_properties", named.__getitem__)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    assert lacks_float8() == "A100 has none"
    del named[0]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert lacks_float8() is None


def test_the_predicted_memory_has_a_byte_per_weight_in_the_rollout(tmp_path):
    with torch.device("meta"):
        sizes = {"num_layers": 19, "num_single_layers": 38, "guidance_embeds": True}
        FluxTransformer2DModel(**sizes).save_config(tmp_path / "transformer")
    AutoencoderKL(latent_channels=16).save_config(tmp_path / "vae")
    flags = f"--pretrained_model_name_or_path {tmp_path} --data_json_path unused --reward_model shapes --dry_run"
    flags += " --use_lora --train_micro_batch_size 1"
    plain, reduced = (
        predict_memory(parse_dataclass(GRPOConfig, f"{flags} --rollout_precision {precision}".split()), 1)
        for precision in ("bf16", "fp8")
    )
    blocks = 19 * 24 + 38 * 12  # weights of width²
    assert reduced["fp8_copies"] == pytest.approx(blocks * 3072**2 / 2**30)
    assert 0 < reduced["peak"] - plain["peak"] <= reduced["fp8_copies"] and "fp8_copies" not in plain


@pytest.mark.parametrize(
    ("kind", "adapters"),
    [
        ("flux1", []),
        ("flux1", ["to_q", "proj_out", "ff.net.2"]),
        ("flux2", []),
        ("flux2", ["to_q", "single_transformer_blocks.0.attn.to_out", "linear_out"]),
    ],
)
def test_layers_share_roundings_and_products_and_get_the_same_numbers(kind, adapters, tmp_path, monkeypatch):
    """Layers with adapters need their input unrounded."""
    (build_tiny_flux if kind == "flux1" else build_tiny_flux2)(tmp_path)
    folder = str(tmp_path)
    family = family_of(folder)
    transformer = load_transformer(folder).requires_grad_(False)
    if adapters:
        add_lora(transformer, 2, 4, adapters, seed=0)
    copies = Float8Copies(family.blocks(transformer), emulated=True)
    copies.take(torch.float32, nullcontext)
    calls = []
    for name, function in (("to_e4m3", float8.to_e4m3), ("float8_product", float8.float8_product)):
        counted = partial(lambda name, function, *args: calls.append(name) or function(*args), name, function)
        monkeypatch.setattr(float8, name, counted)
    config, generator = transformer.config, torch.Generator().manual_seed(0)
    shapes = {"hidden_states": (2, 4, config.in_channels), "encoder_hidden_states": (2, 8, config.joint_attention_dim)}
    inputs = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    inputs |= {"timestep": torch.ones(2), "return_dict": False}
    inputs |= {"txt_ids": torch.zeros(8, family.position_axes), "img_ids": torch.zeros(4, family.position_axes)}
    if kind == "flux1":
        inputs |= {"guidance": torch.ones(2), "pooled_projections": torch.ones(2, config.pooled_projection_dim)}
    found = []
    for prepare in (lambda model: None, family.prepare_blocks):
        prepare(transformer)
        calls.clear()
        with torch.no_grad(), copies.in_use():
            found.append((transformer(**inputs)[0], Counter(calls)))
    (theirs, most), (ours, fewer) = found
    assert torch.equal(ours, theirs)
    texts, singles = config.num_layers, config.num_single_layers if kind == "flux1" else 0  # FLUX.2's have one product
    # Of queries, keys and values, two; in a single block, of those and the MLP's, three.
    saved = {name: count - fewer[name] for name, count in most.items()}
    assert saved["to_e4m3"] == (2 * texts if adapters else 4 * texts + 3 * singles)
    assert saved["float8_product"] == (2 * texts if adapters else 4 * texts + 2 * singles)


@NEEDS_FLOAT8
@pytest.mark.parametrize("activation", [gelu, swiglu])
@pytest.mark.parametrize("compiled", [False, True])
def test_a_gpu_rounds_rows_in_one_kernel_to_the_same_numbers(activation, compiled):
    generator = torch.Generator().manual_seed(0)
    x, raw = (torch.randn(6, 7, width, generator=generator).bfloat16() for width in (96, 384))
    x[0, 0] = 0
    rounding = torch.compile(to_e4m3, dynamic=False) if compiled else to_e4m3
    for given in ((x, None), (None, raw), (x, raw)):
        theirs = to_e4m3(*given, activation)
        ours = rounding(*(part if part is None else part.cuda() for part in given), activation)
        assert ours.dtype == torch.bfloat16 and ours.numbers.shape == theirs.numbers.shape
        torch.testing.assert_close(ours.scale.cpu(), theirs.scale, rtol=1e-2, atol=0)  # the largest may round otherwise
        values = [(rounded.numbers.float().cpu() * rounded.scale.cpu()) for rounded in (ours, theirs)]
        assert relative_difference(*values) < 1e-2  # e4m3 itself moves numbers by 2.6 %


@NEEDS_FLOAT8
@pytest.mark.parametrize("compiled", [False, True])
def test_a_gpu_normalises_and_rounds_rows_in_one_kernel_to_the_same_numbers(compiled):
    generator = torch.Generator().manual_seed(0)
    x, both = torch.randn(3, 7, 96, generator=generator) * 9 + 5, torch.randn(3, 192, generator=generator)
    given = [part.bfloat16() for part in (x, *both.chunk(2, dim=1))]
    rounding = torch.compile(to_e4m3, dynamic=False) if compiled else to_e4m3
    theirs = to_e4m3(Modulated(*given, 1e-6))
    ours = rounding(Modulated(*(part.cuda() for part in given), 1e-6))
    assert ours.dtype == torch.bfloat16 and ours.numbers.shape == theirs.numbers.shape
    torch.testing.assert_close(ours.scale.cpu(), theirs.scale, rtol=1e-2, atol=0)
    values = [(rounded.numbers.float().cpu() * rounded.scale.cpu()) for rounded in (ours, theirs)]
    assert relative_difference(*values) < 1e-2


@NEEDS_FLOAT8
@pytest.mark.parametrize("compiled", [False, True])
def test_a_gpu_normalises_and_rotates_queries_in_one_kernel(compiled):
    """The heads may be part of a wider row, as in FLUX.2's single blocks."""
    generator = torch.Generator().manual_seed(0)
    wide = torch.randn(2, 7, 120, generator=generator).bfloat16().cuda()
    angles = torch.randn(7, 16, generator=generator).repeat_interleave(2, 1).cuda()
    norm = torch.nn.RMSNorm(32, eps=1e-6).cuda()
    torch.nn.init.normal_(norm.weight)

    def query(wide: torch.Tensor, in_float8: bool) -> torch.Tensor:
        x = wide.split([96, 24], dim=-1)[0].unflatten(-1, (3, 32))
        return rotated(x, norm, (angles.cos(), angles.sin()), in_float8)

    ours = torch.compile(query, dynamic=False) if compiled else query
    with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
        found, plain = ours(wide, True), query(wide, False)
    assert found.dtype == torch.bfloat16 and relative_difference(found.float(), plain.float()) < 5e-3


@NEEDS_FLOAT8
@pytest.mark.parametrize("compiled", [False, True])
def test_products_of_a_gpu_are_those_that_are_emulated(compiled):
    x, weight, bias = (tensor.bfloat16().cuda() for tensor in random_layer(rows=4096, inputs=512, outputs=1536))
    weight, x = to_e4m3(weight)[:2], x.view(8, 512, -1)

    def product(x: torch.Tensor, emulated: bool = False) -> torch.Tensor:
        return float8_product(to_e4m3(x), *weight, bias, emulated)

    on_gpu = torch.compile(product, dynamic=False) if compiled else product
    found, emulated = on_gpu(x), product(x, emulated=True)
    assert relative_difference(found.float(), emulated.float()) < 5e-3
    few = on_gpu(x[:2])
    assert relative_difference(found[:2].float(), few.float()) < 5e-3


@pytest.mark.parametrize(
    ("device", "fast_guards"),
    [
        pytest.param("cpu", False, marks=pytest.mark.long),
        pytest.param("cpu", True, marks=pytest.mark.long),
        pytest.param("cuda", True, marks=NEEDS_FLOAT8),
    ],
)
def test_compiled_blocks_have_one_more_graph_each_however_often_the_weights_are_copied(
    random_flux, monkeypatch, device, fast_guards
):
    """fast_guards: torch 2.11's default, with which a graph isn't checked again while no module's attributes change."""
    monkeypatch.setattr(torch._dynamo.config, "use_recursive_dict_tags_for_guards", fast_guards)
    transformer = load_transformer(random_flux).requires_grad_(False).to(device)
    Flux1().prepare_blocks(transformer)
    compile_transformer(transformer)
    blocks = [*transformer.transformer_blocks, *transformer.single_transformer_blocks]
    copies, generator = Float8Copies(blocks, emulated=device == "cpu"), torch.Generator().manual_seed(0)
    given = {"hidden_states": (2, 4, 64), "encoder_hidden_states": (2, 8, 64), "pooled_projections": (2, 64)}
    inputs = {name: torch.randn(shape, generator=generator) for name, shape in given.items()}
    inputs |= {"timestep": torch.ones(2), "guidance": torch.ones(2)}
    inputs |= {"txt_ids": torch.zeros(8, 3), "img_ids": torch.zeros(4, 3)}
    inputs = {name: tensor.to(device) for name, tensor in inputs.items()} | {"return_dict": False}
    graphs = []
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    for _ in range(3):
        with torch.no_grad(), torch.autocast(device, torch.bfloat16):
            plain = transformer(**inputs)[0]
            copies.take(torch.bfloat16, nullcontext)
            with copies.in_use():
                reduced = transformer(**inputs)[0]
            copies.drop()
            assert torch.equal(transformer(**inputs)[0], plain)
        assert 5e-3 < relative_difference(reduced, plain) < 0.1
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert graphs == [6, 6, 6]  # two kinds of block, twice; positions and the last norm
