"""The predicted memory of a run, against arithmetic and against measurements on GPUs."""

import json
import re
from types import SimpleNamespace

from fastvideo.cli import parse_dataclass
from fastvideo.config import GRPOConfig
from fastvideo.runtime import memory
from fastvideo.runtime.memory import predict_memory
from fastvideo.train_grpo_flux import main

import pytest
import torch
from conftest import ROOT, Run, parts_missing, torchrun
from diffusers import AutoencoderKL, AutoencoderKLFlux2, Flux2Transformer2DModel, FluxTransformer2DModel
from test_docs import recipe_flags


@pytest.fixture(scope="module")
def flux_of(tmp_path_factory):
    """flux_of(double blocks, single blocks) -> a pipeline of FLUX.1's width with only its config.json files."""

    def make(double: int, single: int):
        folder = tmp_path_factory.mktemp("flux")
        with torch.device("meta"):
            transformer = FluxTransformer2DModel(num_layers=double, num_single_layers=single, guidance_embeds=True)
            transformer.save_config(folder / "transformer")
            AutoencoderKL(block_out_channels=[128] * 4, norm_num_groups=1, latent_channels=16,
                          down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4,
            ).save_config(folder / "vae")  # fmt: skip
        return folder

    return make


@pytest.fixture(scope="module")
def flux_1(flux_of):
    """FLUX.1's sizes."""
    return flux_of(19, 38)


def predicted(folder, flags: str, processes: int = 1) -> dict[str, float]:
    model = f"--pretrained_model_name_or_path {folder} --data_json_path unused --reward_model shapes --dry_run"
    argv = f"{model} {flags}".split()
    return predict_memory(parse_dataclass(GRPOConfig, argv), processes)


@pytest.mark.parametrize(
    "blocks,flags,measured",  # GiB, benchmarks/results/h100_iteration.txt, h200_engines.txt
    [
        ((4, 8), "--train_micro_batch_size 2 --no_gradient_checkpointing", 50.0),
        ((4, 8), "--train_micro_batch_size 4 --no_gradient_checkpointing", 53.3),
        ((4, 8), "--train_micro_batch_size 5 --no_gradient_checkpointing", 55.3),
        ((4, 8), "--train_micro_batch_size 10 --no_gradient_checkpointing", 67.3),
        # The rollout takes 12 rows with gradient, and training 10.
        (
            (4, 8),
            "--train_micro_batch_size 12 --no_gradient_checkpointing --algorithm mix_grpo_flash "
            "--rollout_precision fp8 --fp8_steps all",
            75.2,
        ),
        ((4, 8), "--train_micro_batch_size 5 --no_gradient_checkpointing --algorithm awm", 66.2),
        ((4, 8), "--train_micro_batch_size 5 --no_gradient_checkpointing --algorithm v_grpo", 56.7),
        ((19, 38), "--train_micro_batch_size 4 --use_lora", 31.5),
        ((19, 38), "--train_micro_batch_size 4 --use_lora --rollout_precision fp8", 35.3),
        ((19, 38), "--train_micro_batch_size 2 --use_lora --num_generations 4 --gradient_accumulation_steps 2", 27.0),
        (
            (19, 38),
            "--train_micro_batch_size 2 --use_lora --quantize_base --num_generations 4 --gradient_accumulation_steps 2",
            16.1,
        ),
        ((19, 38), "--train_micro_batch_size 2 --rollout_batch_size 6 --use_lora --quantize_base", 16.9),
        ((19, 38), "--train_micro_batch_size 4 --use_lora --lora_alpha 256 --selective_checkpointing 0.5", 47.9),
        ((19, 38), "--train_micro_batch_size 4 --use_lora --no_gradient_checkpointing --rollout_precision fp8", 67.3),
    ],
)
def test_the_prediction_is_near_what_was_measured(flux_of, blocks, flags, measured):
    assert predicted(flux_of(*blocks), flags)["peak"] == pytest.approx(measured, rel=0.03)


SMALL = (
    "--train_micro_batch_size 2 --num_generations 4 --sampling_steps 8 --group_size 2 --gradient_accumulation_steps 2"
)


@pytest.mark.parametrize(
    "blocks,flags,processes,gpu,measured",  # GiB per GPU, benchmarks/results/h100_iteration.txt, h100_fp8.txt, h200_…
    [
        ((4, 8), "--train_micro_batch_size 4 --no_gradient_checkpointing", 1, 79.1, 53.5),
        ((4, 8), "--train_micro_batch_size 5 --no_gradient_checkpointing", 1, 79.1, 60.2),
        ((12, 24), "--train_micro_batch_size 4", 2, 79.1, 60.7),  # keeps nothing whole
        ((15, 30), "--train_micro_batch_size 4", 2, 79.1, 74.8),
        ((19, 38), "--train_micro_batch_size 4", 4, 139.8, 82.2),  # keeps gradients whole
        ((19, 38), "--train_micro_batch_size 4 --selective_checkpointing 0.5", 4, 139.8, 103.9),
        ((19, 38), SMALL, 4, 139.8, 80.9),
    ],
)
def test_the_prediction_under_fsdp2_follows_what_fits(flux_of, monkeypatch, blocks, flags, processes, gpu, measured):
    monkeypatch.setattr(memory, "gpu_sizes", lambda: [int(gpu * 2**30)] * processes)
    found = predicted(flux_of(*blocks), f"--parallel fsdp {flags}", processes)
    assert found["peak"] == pytest.approx(measured, rel=0.03)


def test_an_evaluation_of_larger_pictures_counts_where_it_takes_more_than_training(flux_1, capsys, monkeypatch):
    lora = "--use_lora --train_micro_batch_size 1 --rollout_batch_size 1 --h 256 --w 256 --num_generations 4"
    lora += " --gradient_accumulation_steps 2 --eval_steps 5 --eval_prompts unused"
    plain, large, small = (
        predicted(flux_1, f"{lora} {size}") for size in ("", "--eval_h 2048 --eval_w 2048", "--eval_h 128 --eval_w 128")
    )
    assert plain == small and "evaluation" not in plain
    picture = 2048 * 2048 * 1350 / 2**30  # decoded in bf16, one at a time
    assert large["evaluation"] == large["activations"] == pytest.approx(picture)
    assert large["peak"] == pytest.approx(large["weights"] + large["moments"] + picture)
    monkeypatch.setattr(memory, "gpu_sizes", lambda: [20 * 2**30])
    argv = f"--pretrained_model_name_or_path {flux_1} --data_json_path unused {lora} --eval_h 4096 --eval_w 4096"
    assert "lower --eval_h and --eval_w" in memory.describe_memory(parse_dataclass(GRPOConfig, argv.split()), 1)


def test_engines_split_what_they_say(flux_of, monkeypatch):
    folder, gib = flux_of(1, 1), 2**30
    with torch.device("meta"):
        count = sum(
            p.numel()
            for p in FluxTransformer2DModel(num_layers=1, num_single_layers=1, guidance_embeds=True).parameters()
        )

    def parts(flags: str) -> list[float]:
        found = predicted(folder, flags, 4)
        return [found[name] * gib / count for name in ("weights", "gradients", "moments")]

    assert parts("--parallel ddp") == pytest.approx([4 + 2, 4, 8])
    assert parts("--parallel ddp --mixed_precision no") == pytest.approx([4, 4, 8])
    assert parts("--parallel ddp --master_weight_type bf16") == pytest.approx([2, 2, 4])
    assert parts("--parallel deepspeed --zero_stage 2") == pytest.approx([4 + 2, 1, 2])
    # FSDP2 with memory for nothing whole, and for everything: parameters in bf16, gradients in float32.
    sizes = []
    monkeypatch.setattr(memory, "gpu_sizes", lambda: sizes)
    assert parts("--parallel fsdp --train_micro_batch_size 4") == pytest.approx([1, 1, 2])
    assert parts("--parallel fsdp --train_micro_batch_size 4 --rollout_keep_gathered true") == pytest.approx(
        [1 + 2, 1, 2]
    )
    assert parts("--parallel fsdp --train_micro_batch_size 4 --use_cpu_offload") == pytest.approx([0, 0, 0])
    sizes.append(2**40)
    assert parts("--parallel fsdp --train_micro_batch_size 4") == pytest.approx([1 + 2, 4, 2])
    assert parts("--parallel fsdp --train_micro_batch_size 4 --rollout_keep_gathered false") == pytest.approx([1, 4, 2])
    assert parts("--parallel fsdp --train_micro_batch_size 4 --use_cpu_offload") == pytest.approx([2, 4, 0])
    assert parts("--parallel fsdp --train_micro_batch_size 4 --ema_decay 0.9 --ref_kl_coeff 1") == pytest.approx(
        [1 + 2 + 1 + 1, 4, 2]
    )
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert parts("--parallel fsdp --train_micro_batch_size 4 --fsdp_sharding_startegy hybrid_full") == pytest.approx(
        [2 + 2, 4, 4]
    )
    sizes.clear()
    assert parts("--parallel fsdp --train_micro_batch_size 4 --fsdp_sharding_startegy hybrid_full") == pytest.approx(
        [2, 2, 4]
    )
    zero2 = "--parallel fsdp --fsdp_sharding_startegy hybrid_zero2 --rollout_keep_gathered false"
    assert parts(zero2) == pytest.approx([2 + 2, 2, 4])  # whole from the forward to the backward pass
    assert parts("--parallel ddp --use_lora --lora_rank 4 --quantize_base")[0] == pytest.approx(1.1, abs=0.1)
    weights, gradients, moments = parts("--parallel ddp --use_lora --lora_rank 4")
    assert 2 < weights < 2.1 and 0 < gradients < 0.01 and moments == pytest.approx(2 * gradients)


def test_fsdp2_s_gradients_are_whole_only_from_one_micro_batch_to_the_next(flux_of, monkeypatch):
    monkeypatch.setattr(memory, "gpu_sizes", lambda: [2**40] * 2)
    found = [predicted(flux_of(1, 1), f"--parallel fsdp --train_micro_batch_size {n}", 2) for n in (9, 10)]
    assert found[0]["gradients"] == pytest.approx(2 * found[1]["gradients"])


def test_copies_of_the_weights_are_held_back_before_anything_is_kept_whole(flux_of, monkeypatch):
    monkeypatch.setattr(memory, "gpu_sizes", lambda: [int(139.8 * 2**30)] * 4)
    plain, averaged = (
        predicted(flux_of(19, 38), f"--parallel fsdp --train_micro_batch_size 4 {more}", 4)
        for more in ("", "--ema_decay 0.9")
    )
    # The average takes the place of whole gradients, as the engine decides too.
    assert averaged["weights"] == pytest.approx(plain["weights"] + plain["gradients"] / 4)
    assert averaged["gradients"] == pytest.approx(plain["gradients"] / 4)


def test_one_process_under_fsdp2_holds_what_it_gathers(flux_of, monkeypatch):
    monkeypatch.setattr(memory, "gpu_sizes", lambda: [2**40])
    folder = flux_of(1, 1)
    lora = predicted(folder, "--use_lora --lora_rank 4 --parallel none")["weights"]
    assert predicted(folder, "--use_lora --lora_rank 4 --parallel fsdp")["weights"] == pytest.approx(2 * lora, rel=0.01)
    monkeypatch.setattr(memory, "gpu_sizes", list)
    assert predicted(folder, "--parallel fsdp --use_cpu_offload")["weights"] == 0


def test_more_rows_at_a_time_take_more_and_checkpointing_takes_less(flux_of):
    folder = flux_of(2, 2)
    rows = [f"--train_micro_batch_size {n} {flag}" for n, flag in ((8, "--no_"), (16, "--no_"), (16, "--"))]
    one, two, checkpointed = (predicted(folder, f"{r}gradient_checkpointing")["activations"] for r in rows)
    assert two == pytest.approx(2 * one) and checkpointed < two


@pytest.mark.parametrize(
    "gib,flags,rows",
    [
        (79.1, "--parallel fsdp --no_gradient_checkpointing", 5),  # of 36 GiB left; a row keeps 3.5 GiB
        (139.8, "--parallel fsdp --no_gradient_checkpointing", 10),  # 3 samples of 4 steps, one of them shared
        (79.1, "--no_gradient_checkpointing --parallel none --train_micro_batch_size 7", 7),
        (20, "--parallel fsdp", 1),
    ],
)
def test_micro_batches_without_a_size_take_half_of_the_memory_left(flux_of, monkeypatch, gib, flags, rows):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    sizes = [SimpleNamespace(total_memory=gib * 2**30), SimpleNamespace(total_memory=2 * gib * 2**30)]
    monkeypatch.setattr(torch.cuda, "get_device_properties", sizes.__getitem__)
    found = predicted(flux_of(4, 8), flags)
    assert found["rows"] == rows
    assert gib < 21 or found["peak"] < gib


@pytest.mark.slow
def test_processes_whose_gpus_differ_take_the_smallest_micro_batches(flags, tmp_path, subprocess_environment):
    script = tmp_path / "train.py"
    script.write_text(
        "import os\nfrom fastvideo.train_grpo_flux import main\nfrom fastvideo.runtime import memory\n"
        "memory.ROWS_ON_A_CPU = (5, 2)[int(os.environ['RANK'])]\nmain()\n"
    )
    given = {"parallel": "fsdp", "rollout_keep_gathered": "false", "max_train_steps": 1}
    done = torchrun(flags(output_dir=tmp_path / "run", **given), subprocess_environment, script=str(script))
    assert done.returncode == 0, done.stderr[-4000:]
    record = json.loads((Run(tmp_path / "run").checkpoints[-1] / "checkpoint.json").read_text())
    assert record["settings"]["train_micro_batch_size"] == 2


def test_a_dry_run_prints_the_prediction_or_that_there_is_none(flags, capsys):
    main(flags(dry_run=True))
    assert "predicted peak memory of each process: 0." in capsys.readouterr().out
    with parts_missing():
        main(flags(dry_run=True, pretrained_model_name_or_path="owner/not-downloaded"))
    assert "predicted peak memory: unknown until the model is here" in capsys.readouterr().out


@pytest.mark.parametrize("parallel", ["ddp", "fsdp", "deepspeed"])
def test_a_dry_run_needs_no_torchrun_but_contradictory_flags_are_refused(flags, capsys, monkeypatch, parallel):
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.setattr(memory, "gpu_sizes", list)
    main(flags(dry_run=True, parallel=parallel))
    told = capsys.readouterr().out
    assert "predicted peak memory of each process: 0." in told
    assert ("on GPUs with more room FSDP2 keeps more" in told) == (parallel == "fsdp")
    monkeypatch.setattr(memory, "gpu_sizes", lambda: [2**40])
    main(flags(dry_run=True, parallel=parallel))
    assert "on GPUs with more room" not in capsys.readouterr().out
    offload, coarse = {"use_cpu_offload": True, "parallel": "ddp"}, {"master_weight_type": "bf16", "parallel": "fsdp"}
    for given in (offload, coarse):
        with pytest.raises(SystemExit) as stop:
            main(flags(dry_run=True, **given))
        assert stop.value.code == 2 and f"--{next(iter(given))}" in capsys.readouterr().err


def test_a_run_that_can_not_fit_the_gpus_here_is_warned_about(flags, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for size, warned in ((2**20, True), (2**40, False)):
        monkeypatch.setattr(
            torch.cuda, "get_device_properties", lambda _, size=size: SimpleNamespace(total_memory=size)
        )
        main(flags(dry_run=True))
        assert ("warning: a GPU here has" in capsys.readouterr().out) == warned


@pytest.mark.parametrize("share,warned", [(0.98, True), (0.9, False)])
def test_a_run_that_would_fill_a_gpu_to_the_last_gap_is_warned_about(flux_1, monkeypatch, share, warned):
    lora = "--use_lora --train_micro_batch_size 4"
    argv = f"--pretrained_model_name_or_path {flux_1} --data_json_path unused {lora}".split()
    size = predicted(flux_1, lora)["peak"] / share * 2**30
    monkeypatch.setattr(memory, "gpu_sizes", lambda: [size])
    told = memory.describe_memory(parse_dataclass(GRPOConfig, argv), 1)
    assert ("some of which gaps between allocations take" in told) == warned


def test_the_readme_s_recipes_pass_a_dry_run_and_take_what_it_says(flux_1, capsys, monkeypatch):
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    lora = re.search(r"LoRA is `(.*?)`", text)[1]
    rows = re.findall(r"^\| (\d+) × (\d+) GB[^|]*\| (LoRA )?`(.*?)` \| ([\d.]+) \|", text, re.MULTILINE)
    assert len(rows) == 5
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    for processes, gigabytes, adapters, flags, said in rows:
        monkeypatch.setenv("WORLD_SIZE", processes)
        monkeypatch.setattr(memory, "gpu_sizes", lambda size=int(gigabytes) * 10**9: [size])
        argv = f"--pretrained_model_name_or_path {flux_1} --data_json_path unused {flags} {lora if adapters else ''}"
        with parts_missing():
            main([*argv.split(), "--dry_run"])
        found = float(re.search(r"predicted peak memory of each process: ([\d.]+) GiB", capsys.readouterr().out)[1])
        assert found == pytest.approx(float(said), abs=0.05), flags
        assert found + 4 < float(gigabytes) * 1e9 / 2**30, flags  # with room for a reward model


@pytest.fixture(scope="module")
def klein(tmp_path_factory):
    """FLUX.2-klein-base-4B's sizes."""
    folder = tmp_path_factory.mktemp("klein")
    with torch.device("meta"):
        sizes = {"in_channels": 128, "num_layers": 5, "num_single_layers": 20, "attention_head_dim": 128}
        sizes |= {"num_attention_heads": 24, "joint_attention_dim": 7680, "guidance_embeds": False}
        Flux2Transformer2DModel(**sizes).save_config(folder / "transformer")
        AutoencoderKLFlux2().save_config(folder / "vae")
    (folder / "model_index.json").write_text('{"_class_name": "Flux2KleinPipeline"}')
    return folder


@pytest.mark.parametrize(
    "flags,measured",  # GiB, benchmarks/results/h100_iteration.txt
    [
        ("--rollout_batch_size 6 --train_micro_batch_size 4", 74.2),
        ("--rollout_batch_size 6 --train_micro_batch_size 4 --guidance_scale 1", 73.1),
        ("--rollout_batch_size 4 --train_micro_batch_size 2 --h 1024 --w 1024", 74.9),
        ("--rollout_batch_size 6 --train_micro_batch_size 4 --use_lora", 15.3),
        ("--rollout_batch_size 6 --train_micro_batch_size 4 --use_lora --guidance_scale 1", 12.4),
        ("--rollout_batch_size 6 --train_micro_batch_size 4 --use_lora --h 1024 --w 1024", 20.6),
    ],
)
def test_the_prediction_for_flux_2_is_near_what_was_measured(klein, flags, measured):
    assert predicted(klein, flags)["peak"] == pytest.approx(measured, rel=0.03)


def test_flux_2_s_recipes_take_what_their_page_says(klein):
    page = (ROOT / "docs/flux_2.md").read_text(encoding="utf-8")
    table = page.partition("| recipe | GiB")[2].partition("\n\n")[0].split()
    small = "--use_lora --train_micro_batch_size 2"
    for recipe, flags, gib in (
        ("MixGRPO", "", "74.5"),
        ("MixGRPO_Flash", "", "74.5"),
        ("MixGRPO_Flash_lora", "--use_lora", "14.9"),
        ("MixGRPO_Flash_lora", f"{small} --h 1024 --w 1024", "16.2"),
        ("MixGRPO_Flash_lora", f"{small} --quantize_base", "8.8"),
    ):
        own = recipe_flags(ROOT / f"scripts/finetune/finetune_flux2_klein_{recipe}.sh")
        where = ["--pretrained_model_name_or_path", str(klein)]
        config = parse_dataclass(GRPOConfig, ["--override", *own, "--override", *where, *flags.split()])
        assert config.guidance_scale == 4
        assert f"{predict_memory(config, 1)['peak']:.1f}" == gib and gib in table
