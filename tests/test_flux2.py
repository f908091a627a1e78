"""FLUX.2 [klein], the second family: the same commands on its own classes, with guidance in two passes."""

import json
import re
import shutil
from pathlib import Path

from fastvideo.data_preprocess.preprocess_flux_embedding import embed_prompts
from fastvideo.eval import report
from fastvideo.family_defaults import flux_2_shift
from fastvideo.models import merge_lora
from fastvideo.models.family import Conditioning, LatentShape
from fastvideo.models.flux2 import Flux2Klein
from fastvideo.models.lora import LORA_FILE
from fastvideo.models.pretrained import decode_latents, load_transformer, load_vae
from fastvideo.models.speed import compile_transformer
from fastvideo.runtime import evaluation
from fastvideo.sample import sample_flux
from fastvideo.train_grpo_flux import main

import numpy as np
import pytest
import torch
import yaml
from conftest import PROMPTS, same_weights, torchrun
from diffusers import Flux2KleinPipeline
from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu
from make_tiny_flux import build_tiny_flux2
from PIL import Image
from safetensors.torch import save_file
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

GUIDANCE = 4.0


@pytest.fixture(scope="module")
def flux2(tmp_path_factory) -> str:
    """An untrained FLUX.2 [klein] base pipeline."""
    folder = tmp_path_factory.mktemp("flux2")
    build_tiny_flux2(folder, seed=1, single_layers=2)
    with torch.no_grad():  # a new VAE's norm has mean 0 and variance 1, which would hide a wrong one
        vae = load_vae(str(folder))
        vae.bn.running_mean.normal_(generator=torch.Generator().manual_seed(0))
        vae.bn.running_var.uniform_(0.5, 2, generator=torch.Generator().manual_seed(0))
        vae.half().save_pretrained(folder / "vae")
    return str(folder)


@pytest.fixture(scope="module")
def embedded2(tmp_path_factory, flux2, prompts_file) -> Path:
    return embed_prompts(flux2, prompts_file, tmp_path_factory.mktemp("embeddings2"))


@pytest.fixture
def train2(train, flux2, embedded2):
    return lambda **given: train(
        pretrained_model_name_or_path=flux2,
        **{} if "prompts_file" in given else {"data_json_path": embedded2},
        **given,
    )


@pytest.fixture(scope="module")
def pipe(flux2) -> Flux2KleinPipeline:
    found = Flux2KleinPipeline.from_pretrained(flux2, dtype=torch.float32)
    found.set_progress_bar_config(disable=True)
    return found


def conditioning(pipe: Flux2KleinPipeline, guidance_scale: float, shape: LatentShape) -> Conditioning:
    found = Flux2Klein().encode_prompts(pipe, [*PROMPTS[:2], ""])
    embeds, ids = found["prompt_embeds"], Flux2Klein().image_ids(shape, torch.device("cpu"))
    return Conditioning(embeds[:2], None, found["text_ids"], ids, guidance_scale, negative_prompt_embeds=embeds[2])


@pytest.mark.parametrize("guidance_scale", [1.0, GUIDANCE])
def test_velocity_positions_and_decoding_are_those_of_the_pipeline(pipe, guidance_scale):
    height, width, steps, family = 32, 48, 3, Flux2Klein()
    shape = LatentShape.of(pipe.vae, height, width)
    given, latents = conditioning(pipe, guidance_scale, shape), torch.empty(2, shape.tokens, shape.channels)
    latents.normal_(generator=torch.Generator().manual_seed(0))
    unpacked = latents.transpose(1, 2).unflatten(2, (shape.height // 2, shape.width // 2))
    expected = pipe(
        prompt=list(PROMPTS[:2]),
        height=height,
        width=width,
        num_inference_steps=steps,
        guidance_scale=guidance_scale,
        latents=unpacked,
        max_sequence_length=pipe.tokenizer.model_max_length,
    ).images
    shift = flux_2_shift(*(size * 16 / 8 for size in (height, width)), steps)  # a 4x VAE: cells of 8 pixels, not 16
    times = [1 - i / steps for i in range(steps + 1)]
    sigmas = [shift * t / (1 + (shift - 1) * t) for t in times]
    family.prepare_blocks(pipe.transformer)
    with torch.no_grad():
        for sigma, after in zip(sigmas, sigmas[1:], strict=False):
            v = family.velocity(pipe.transformer, latents, torch.full((2,), sigma), torch.arange(2), given)
            latents = latents + (after - sigma) * v
    found = decode_latents(family, pipe.vae, latents, height, width, 2)
    for mine, theirs in zip(found, expected, strict=True):
        difference = np.abs(np.asarray(mine, int) - np.asarray(theirs, int))
        assert difference.max() <= 1 and np.asarray(mine).std() > 0


def test_the_shift_of_the_schedule_is_the_pipeline_s():
    for size, steps in ((1024, 50), (720, 25), (512, 4), (2048, 25)):
        mu = compute_empirical_mu(size * size // 256, steps)
        assert flux_2_shift(size, size, steps) == pytest.approx(np.exp(mu), rel=1e-6)


def test_blocks_give_the_numbers_and_gradients_of_diffusers_bit_for_bit(flux2, pipe):
    transformer, family = load_transformer(flux2), Flux2Klein()
    shape = LatentShape.of(pipe.vae, 32, 32)
    given = conditioning(pipe, GUIDANCE, shape)
    latents = torch.randn(2, shape.tokens, shape.channels, generator=torch.Generator().manual_seed(0))

    def numbers() -> torch.Tensor:
        v = family.velocity(transformer, latents, torch.tensor([0.9, 0.4]), torch.tensor([1, 0]), given)
        v.square().mean().backward()
        found = torch.cat([v.flatten(), *(p.grad.flatten() for p in transformer.parameters())]).detach()
        transformer.zero_grad()
        return found

    theirs = numbers()
    family.prepare_blocks(transformer)
    assert torch.equal(numbers(), theirs) and theirs.isfinite().all()


@pytest.mark.long  # C++ is compiled for a minute
def test_compiled_blocks_give_the_numbers_of_uncompiled_ones(flux2, pipe):
    transformer, family, shape = load_transformer(flux2), Flux2Klein(), LatentShape.of(pipe.vae, 32, 32)
    given = conditioning(pipe, GUIDANCE, shape)
    latents = torch.randn(2, shape.tokens, shape.channels, generator=torch.Generator().manual_seed(0))
    family.prepare_blocks(transformer)
    rows = (latents, torch.tensor([0.9, 0.4]), torch.tensor([1, 0]), given)
    plain = family.velocity(transformer, *rows)
    compile_transformer(transformer)
    torch._dynamo.utils.counters.clear()
    torch.testing.assert_close(family.velocity(transformer, *rows), plain, rtol=1e-4, atol=1e-5)
    assert not torch._dynamo.utils.counters["graph_break"]


def test_operations_are_counted_as_torch_counts_them(flux2):
    with torch.device("meta"):
        config = load_transformer(flux2).config
    transformer = load_transformer(flux2)
    image, text = 1024, 256
    given = Conditioning(
        torch.zeros(1, text, config.joint_attention_dim), None, torch.zeros(text, 4), torch.zeros(image, 4), 1.0
    )
    latents = torch.zeros(1, image, config.in_channels)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
        Flux2Klein().velocity(transformer, latents, torch.ones(1), torch.zeros(1, dtype=torch.long), given)
    assert Flux2Klein().forward_flops(transformer, image, text) == pytest.approx(counter.get_total_flops(), rel=0.03)


def test_embeddings_are_the_pipeline_s_and_the_empty_prompt_is_beside_them(embedded2, pipe):
    entries = json.loads(embedded2.read_text())
    names = {"prompt_embed_path", "text_ids", "caption", "negative_prompt_embed_path"}
    assert [set(entry) for entry in entries] == [names] * len(PROMPTS)
    assert not (embedded2.parent / "pooled_prompt_embeds").exists()
    for entry, key in ((entries[0], "prompt_embed_path"), (entries[3], "negative_prompt_embed_path")):
        stored = torch.load(embedded2.parent / "prompt_embed" / entry[key], weights_only=True)
        text = entry["caption"] if key == "prompt_embed_path" else ""
        expected, _ = pipe.encode_prompt(text, max_sequence_length=pipe.tokenizer.model_max_length)
        torch.testing.assert_close(stored, expected[0], rtol=1e-4, atol=1e-4)


ALGORITHMS = {
    "mix_grpo_flash": {"dpm_algorithm_type": "dpmsolver++"},
    "dance_grpo": {},
    "grpo_merge": {},
    "granular_grpo": {"granular_list": "1,2"},
    "branch_grpo": {"tree_split_points": [0, 2]},
    "v_grpo": {},
    "diffusion_nft": {},
    "awm": {},
}


@pytest.mark.parametrize("guidance_scale", [1.0, None])
def test_the_first_ratios_are_one_with_guidance_and_without(train2, flux2, guidance_scale):
    """None: the family's own guidance."""
    given = {} if guidance_scale is None else {"guidance_scale": guidance_scale}
    run = train2(max_train_steps=1, learning_rate=1e-4, train_micro_batch_size=1, rollout_batch_size=3, **given)
    settings = json.loads((run.folder / "args.json").read_text())
    assert settings["guidance_scale"] == (guidance_scale or GUIDANCE)
    assert settings["shift"] == pytest.approx(flux_2_shift(32, 32, 6))
    assert "shift" not in yaml.safe_load((run.folder / "config.yaml").read_text())  # another size has its own
    (line,) = run.metrics
    assert line["ratio_first_deviation"] == 0 and line["grad_norm"] > 0
    assert not same_weights(run.weights(), load_transformer(flux2).state_dict())


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_every_kind_of_algorithm_trains(train2, algorithm):
    run = train2(algorithm=algorithm, sampling_steps=4, max_train_steps=1, **ALGORITHMS[algorithm])
    (line,) = run.metrics
    assert line["grad_norm"] > 0 and line.get("ratio_first_deviation", 0) == 0


@pytest.mark.parametrize(
    "given",
    [
        {"rollout_precision": "fp8_emulated", "ref_kl_coeff": 0.1, "gradient_checkpointing": True},
        {"use_lora": True, "lora_rank": 4, "quantize_base": True, "ref_kl_coeff": 0.1},
    ],
    ids=["FP8 rollouts and the reference", "adapters on 8 bits and the reference"],
)
def test_what_saves_time_and_memory_works_on_its_blocks(train2, given):
    run = train2(max_train_steps=1, learning_rate=1e-3, train_micro_batch_size=1, **given)
    (line,) = run.metrics
    assert line["grad_norm"] > 0 and line["ratio_first_deviation"] == 0 and line["ref_kl_loss"] >= 0


def test_a_resumed_run_equals_an_uninterrupted_one(train2):
    given = {"max_train_steps": 2, "checkpointing_steps": 1, "ema_decay": 0.5, "gradient_checkpointing": True}
    whole = train2(output_dir="whole", **given)
    rest = train2(output_dir="rest", **given, resume_from_checkpoint=whole.checkpoints[0])
    assert rest.numbers() == whole.numbers()[1:]
    assert same_weights(rest.weights(), whole.weights()) and same_weights(
        rest.weights(part="ema"), whole.weights(part="ema")
    )


ENGINES = {
    "fsdp": {"parallel": "fsdp"},
    "ddp": {"parallel": "ddp"},
    "ZeRO-3": {"parallel": "deepspeed", "zero_stage": 3},
    "a shared sequence": {"sp_size": 2, "prompts_per_iteration": 1},
}


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["fsdp", *(pytest.param(name, marks=pytest.mark.long) for name in [*ENGINES][1:])])
def test_two_processes_train_what_one_trains(
    train2, flags, flux2, embedded2, run_at, tmp_path, engine, subprocess_environment
):
    common = {"prompts_per_iteration": 2, "max_train_steps": 1} | ENGINES[engine]
    given = {k: v for k, v in common.items() if k in ("prompts_per_iteration", "max_train_steps")}
    alone, model = train2(**given), {"pretrained_model_name_or_path": flux2, "data_json_path": embedded2}
    done = torchrun(flags(output_dir=tmp_path / "two", **model, **common), subprocess_environment)
    assert done.returncode == 0, done.stderr[-4000:]
    for name in ("reward", "grad_norm"):
        one, two = (run.metrics[0][name] for run in (alone, run_at("two")))
        assert one == pytest.approx(two, rel=1e-3)
    assert run_at("two").metrics[0]["ratio_first_deviation"] <= 1e-6


def sampled(flux2: str, folder: Path, prompts: Path, *more: object) -> list[np.ndarray]:
    size = "--h 32 --w 32 --total_sampling_steps 4 --device cpu --dtype fp32 --batch_size 2".split()
    base = ["--pretrained_model_name_or_path", flux2, "--prompts_file", prompts, "--output_dir", folder]
    manifest = sample_flux.main(list(map(str, [*base, *size, *more])))
    entries = json.loads(manifest.read_text())
    return [np.asarray(Image.open(manifest.parent / entry["image"])).astype(int) for entry in entries]


def test_a_lora_draws_in_the_pipeline_what_it_draws_here_and_mixes_with_the_base_model(
    train2, flux2, pipe, tmp_path, refused
):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text(PROMPTS[0])
    lora = {"use_lora": True, "lora_rank": 4, "lora_alpha": 64, "learning_rate": 1e-1}
    adapters = train2(max_train_steps=1, **lora).checkpoints[-1]
    targets = json.loads((adapters.parent / "args.json").read_text())["lora_target_modules"]
    assert "to_qkv_mlp_proj" in targets
    seen = {
        name: sampled(flux2, tmp_path / name, prompts, *given)[0]
        for name, given in {
            "tuned": ("--model_path", adapters),
            "mixed": ("--model_path", adapters, "--mix_fraction", 0.25),
            "base": ("--baseline",),
        }.items()
    }
    seed = json.loads((tmp_path / "tuned/manifest.json").read_text())[0]["seed"]
    theirs = {}
    for name in ("base", "tuned"):
        own = Flux2KleinPipeline.from_pretrained(flux2, dtype=torch.float32)
        own.set_progress_bar_config(disable=True)
        if name == "tuned":
            own.load_lora_weights(adapters)
        given = {"num_inference_steps": 4, "guidance_scale": GUIDANCE, "max_sequence_length": 24}
        generator = torch.Generator("cpu").manual_seed(seed)
        image = own(prompt=[PROMPTS[0]], height=32, width=32, generator=[generator], **given).images[0]
        theirs[name] = np.asarray(image).astype(int)
        assert np.abs(seen[name] - theirs[name]).max() <= 1
    assert min(np.abs(seen["mixed"] - other).max() for other in theirs.values()) > 0
    assert np.abs(theirs["tuned"] - theirs["base"]).max() > 3

    other = {"transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight": torch.zeros(4, 64)}
    save_file(other, tmp_path / LORA_FILE)
    with refused("--model_path .*: it was made for FLUX.1, and the model is FLUX.2"):
        sampled(flux2, tmp_path / "other", prompts, "--model_path", tmp_path / LORA_FILE)

    merge = ["--model_path", str(adapters), "--dtype", "fp32", "--output_dir", str(tmp_path / "whole")]
    with refused("--format lora_kohya: .* is no FLUX.1; choose diffusers"):
        merge_lora.main([*merge, "--format", "lora_kohya"])
    merge_lora.main(merge)
    (whole,) = sampled(flux2, tmp_path / "of the whole", prompts, "--model_path", tmp_path / "whole")
    assert np.abs(whole - seen["tuned"]).max() <= 2

    again = train2(max_train_steps=2, output_dir="again", resume_from_checkpoint=adapters, **lora)
    assert again.metrics[0]["step"] == 2
    # Row by row, because some CPUs round products of rank 4 differently in batches of other sizes.
    start = train2(max_train_steps=1, output_dir="start", lora_init=adapters, train_micro_batch_size=1, **lora)
    assert start.metrics[0]["ratio_first_deviation"] == 0


def test_prompts_are_embedded_evaluated_and_reported(train2, prompts_file, monkeypatch):
    shifts, plan = [], evaluation.noise_free_plan
    monkeypatch.setattr(evaluation, "noise_free_plan", lambda *given: shifts.append(given) or plan(*given))
    run = train2(
        prompts_file=prompts_file,
        eval_prompts=prompts_file,
        eval_steps=1,
        max_train_steps=1,
        eval_h=48,
        eval_sampling_steps=3,
        image_log_steps=1,
    )
    assert {"evaluation_reward", "evaluation_failed_rewards"} <= run.metrics[-1].keys()
    assert shifts == [(3, pytest.approx(flux_2_shift(48, 32, 3)))]
    assert Image.open(run.folder / "evaluation/000001/00000.png").size == (32, 48)
    assert (run.folder / "images/iteration_000001.png").is_file()
    report.main(["--run_dir", str(run.folder)])
    assert (run.folder / "report/report.html").is_file()


def test_a_dry_run_says_what_guidance_costs_and_predicts_its_memory(flags, flux2, embedded2, capsys):
    base = {"pretrained_model_name_or_path": flux2, "data_json_path": embedded2, "dry_run": True}
    memory = []
    for given in ({}, {"guidance_scale": 1.0}):
        main(flags(**base, **given, train_micro_batch_size=4))
        text = capsys.readouterr().out
        assert ("classifier-free guidance 4: each evaluation takes two passes" in text) == (not given)
        memory.append(float(re.search(r"activations ([\d.]+)", text)[1]))
    assert memory[0] > memory[1]


def test_the_plan_is_flux_2_s_before_the_model_is_downloaded(flags, embedded2, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        main(flags(pretrained_model_name_or_path="data/flux2_klein", data_json_path=embedded2, dry_run=True))
    told = capsys.readouterr()
    assert (
        "classifier-free guidance 4" in told.out
        and "1.0000 -> 0.9718" in told.out
        and "FLUX.1's schedule" not in told.out
    )
    assert "download_checkpoints.sh klein" in told.err


@pytest.mark.parametrize(
    "given,warned",
    [
        ({"algorithm": "mix_grpo_flash", "sampling_steps": 10, "group_size": 4}, True),
        ({"algorithm": "mix_grpo_flash", "sampling_steps": 10, "group_size": 4, "dpm_post_compress_ratio": 0.8}, False),
        ({"algorithm": "mix_grpo_flash", "sampling_steps": 25}, False),
        ({"algorithm": "mix_grpo", "sampling_steps": 10}, False),
    ],
)
def test_a_rollout_that_ends_with_one_step_from_high_noise_is_warned_of(flags, flux2, embedded2, capsys, given, warned):
    base = {"pretrained_model_name_or_path": flux2, "data_json_path": embedded2, "dry_run": True}
    main(flags(**base, **given))
    said = capsys.readouterr()
    assert ("last step goes from sigma 0.91 to 0 at once" in said.out + said.err) == warned


def test_what_does_not_fit_together_is_refused_in_one_line(flags, flux2, embedded_prompts, embedded2, tmp_path, capsys):
    entries = json.loads(embedded2.read_text())
    for entry in entries:
        del entry["negative_prompt_embed_path"]
    without = embedded2.with_name("without.json")
    without.write_text(json.dumps(entries))
    other = tmp_path / "other"
    shutil.copytree(flux2, other)
    index = json.loads((other / "model_index.json").read_text())
    (other / "model_index.json").write_text(json.dumps(index | {"_class_name": "StableDiffusion3Pipeline"}))
    distilled = tmp_path / "distilled"
    shutil.copytree(flux2, distilled)
    (distilled / "model_index.json").write_text(json.dumps(index | {"is_distilled": True}))
    for given, problem in (
        *(
            ({"data_json_path": embedded_prompts, **more}, "is 64 wide, .* takes 96: it was made with another model")
            for more in ({}, {"guidance_scale": 1.0}, {"dry_run": True})
        ),
        ({"data_json_path": without}, "no embedding of the empty prompt"),
        ({"lora_target_modules": ["to_out"], "use_lora": True}, "to_out: also names transformer_blocks.0.attn.to_out"),
        ({"pretrained_model_name_or_path": other}, "names StableDiffusion3Pipeline; choose a model of FluxPipeline"),
        ({"pretrained_model_name_or_path": distilled, "guidance_scale": 3.0}, "guidance_scale 3.0: .*distilled"),
    ):
        base = {"pretrained_model_name_or_path": flux2, "data_json_path": embedded2}
        with pytest.raises(SystemExit) as ended:
            main(flags(**base | given))
        assert ended.value.code == 2
        assert re.search(problem, capsys.readouterr().err)
