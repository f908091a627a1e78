"""The memory that a run is predicted to take, against arithmetic and against what a GPU measured."""

from fastvideo.config import GRPOConfig, parse_dataclass
from fastvideo.train_grpo_flux import main
from fastvideo.utils.memory import predict_memory

import pytest
import torch
from diffusers import AutoencoderKL, FluxTransformer2DModel


@pytest.fixture(scope="module")
def flux_of(tmp_path_factory):
    """flux_of(double blocks, single blocks) -> a pipeline of FLUX.1's width that has its config.json files alone."""

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


def predicted(folder, flags: str, processes: int = 1) -> dict[str, float]:
    model = f"--pretrained_model_name_or_path {folder} --data_json_path unused --reward_model shapes --dry_run"
    argv = f"{model} {flags}".split()
    return predict_memory(parse_dataclass(GRPOConfig, argv), processes)


@pytest.mark.parametrize(
    "blocks,flags,measured",  # GiB, benchmarks/results/h100_iteration.txt
    [
        ((4, 8), "--parallel fsdp --train_micro_batch_size 4 --no_gradient_checkpointing", 53.5),
        ((4, 8), "--parallel fsdp --train_micro_batch_size 5 --no_gradient_checkpointing", 60.2),
        ((4, 8), "--train_micro_batch_size 2 --no_gradient_checkpointing", 50.0),
        ((19, 38), "--train_micro_batch_size 4 --use_lora", 31.5),
    ],
)
def test_the_prediction_is_within_a_tenth_of_what_was_measured(flux_of, blocks, flags, measured):
    assert predicted(flux_of(*blocks), flags)["peak"] == pytest.approx(measured, rel=0.1)


def test_engines_split_what_they_say(flux_of):
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
    assert parts("--parallel fsdp") == pytest.approx([4 / 4 + 2, 1, 2])
    assert parts("--parallel fsdp --rollout_keep_gathered false --mixed_precision no") == pytest.approx([1, 1, 2])
    assert parts("--parallel deepspeed --zero_stage 2") == pytest.approx([4 + 2, 1, 2])
    assert parts("--parallel fsdp --ema_decay 0.9 --ref_kl_coeff 1") == pytest.approx([4 / 4 + 2 + 2 / 4 + 1, 1, 2])
    assert parts("--parallel ddp --use_lora --lora_rank 4 --quantize_base")[0] == pytest.approx(1.1, abs=0.1)
    weights, gradients, moments = parts("--parallel ddp --use_lora --lora_rank 4")
    assert 2 < weights < 2.1 and 0 < gradients < 0.01 and moments == pytest.approx(2 * gradients)


def test_more_rows_at_a_time_take_more_and_checkpointing_takes_less(flux_of):
    folder = flux_of(2, 2)
    rows = [f"--train_micro_batch_size {n} {flag}" for n, flag in ((8, "--no_"), (16, "--no_"), (16, "--"))]
    one, two, checkpointed = (predicted(folder, f"{r}gradient_checkpointing")["activations"] for r in rows)
    assert two == pytest.approx(2 * one) and checkpointed < two


def test_a_dry_run_prints_the_prediction_or_that_there_is_none(flags, capsys):
    main(flags(dry_run=True))
    assert "predicted peak memory of each process: 0." in capsys.readouterr().out
    main(flags(dry_run=True, pretrained_model_name_or_path="owner/not-downloaded"))
    assert "predicted peak memory: unknown until the model is here" in capsys.readouterr().out


@pytest.mark.parametrize("parallel", ["ddp", "fsdp", "deepspeed"])
def test_a_dry_run_needs_no_torchrun_but_contradictory_flags_are_refused(flags, capsys, monkeypatch, parallel):
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    main(flags(dry_run=True, parallel=parallel))
    assert "predicted peak memory of each process: 0." in capsys.readouterr().out
    offload, coarse = {"use_cpu_offload": True, "parallel": "ddp"}, {"master_weight_type": "bf16", "parallel": "fsdp"}
    for given in (offload, coarse):
        with pytest.raises(SystemExit) as stop:
            main(flags(dry_run=True, **given))
        assert stop.value.code == 2 and f"--{next(iter(given))}" in capsys.readouterr().err
