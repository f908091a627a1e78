"""LoRA through the command line: what is trained, saved, resumed, merged and sampled with."""

import errno
import json
import os
from pathlib import Path

from fastvideo import train_grpo_flux
from fastvideo.io.lock import FolderLock
from fastvideo.models import merge_lora
from fastvideo.models.lora import LORA_FILE
from fastvideo.models.pretrained import add_lora, load_transformer, load_with_lora
from fastvideo.runtime import engines
from fastvideo.sample import sample_flux

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline, FluxTransformer2DModel
from PIL import Image
from safetensors.torch import load_file

LORA = {"use_lora": True, "lora_rank": 4, "lora_alpha": 8, "learning_rate": 1e-2}


def predict(transformer: FluxTransformer2DModel) -> torch.Tensor:
    """The output for one fixed input, of the tiny model's sizes."""
    config, random = transformer.config, torch.Generator().manual_seed(0)
    with torch.no_grad():
        return transformer(
            hidden_states=torch.randn(2, 16, config.in_channels, generator=random),
            encoder_hidden_states=torch.randn(2, 5, config.joint_attention_dim, generator=random),
            pooled_projections=torch.randn(2, config.pooled_projection_dim, generator=random),
            timestep=torch.tensor([0.3, 0.9]),
            guidance=torch.tensor([3.5, 3.5]),
            img_ids=torch.zeros(16, 3),
            txt_ids=torch.zeros(5, 3),
            return_dict=False,
        )[0]


def test_new_adapters_change_nothing_and_depend_on_the_seed_alone(tiny_flux):
    plain, first, again, other = (load_transformer(tiny_flux) for _ in range(4))
    before = torch.random.get_rng_state()
    for transformer, seed in ((first, 1), (again, 1), (other, 2)):
        add_lora(transformer, 4, 8, ["to_q", "to_out.0"], seed)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(predict(first), predict(plain))
    weights = [{n: p for n, p in t.named_parameters() if p.requires_grad} for t in (first, again, other)]
    assert all("lora_" in name and ("to_q" in name or "to_out.0" in name) for name in weights[0])
    assert all(torch.equal(p, weights[1][n]) for n, p in weights[0].items())
    assert not all(torch.equal(p, weights[2][n]) for n, p in weights[0].items())


def test_only_adapters_change_and_all_of_them(train, tiny_flux, monkeypatch):
    trainers, real = [], train_grpo_flux.train
    monkeypatch.setattr(train_grpo_flux, "train", lambda t, *rest: trainers.append(t) or real(t, *rest))
    run = train(**LORA)
    assert [line["optimizer_steps"] for line in run.metrics] == [2, 2]
    base = load_transformer(tiny_flux).state_dict()
    trained = trainers[0].engine.transformer.state_dict()
    frozen = {name.replace(".base_layer", ""): p for name, p in trained.items() if "lora_" not in name}
    assert frozen.keys() == base.keys()
    assert all(torch.equal(p, base[name]) for name, p in frozen.items())
    fresh = load_transformer(tiny_flux)
    add_lora(fresh, 4, 8, ["to_q", "to_k", "to_v", "to_out.0"], seed=714)
    saved = load_file(run.checkpoints[-1] / LORA_FILE)
    for name, start in fresh.named_parameters():
        if start.requires_grad:
            assert not torch.equal(saved["transformer." + name.replace(".default.", ".")], start), name
    assert {p.name for p in run.checkpoints[-1].iterdir()} == {"checkpoint.json", "optimizer", LORA_FILE}


def test_a_wrong_target_is_refused_with_the_choices_before_any_weight_is_loaded(train, capsys, monkeypatch):
    monkeypatch.setattr(engines, "load_transformer", lambda *_: pytest.fail("weights were loaded"))
    with pytest.raises(SystemExit) as stop:
        train(use_lora=True, lora_target_modules=["to_q", "to_quary"])
    assert stop.value.code == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "--lora_target_modules to_quary" in error
    assert all(name in error for name in ("attn.to_q", "attn.to_out.0", "ff.net.0.proj", "proj_mlp"))


@pytest.mark.parametrize("quantize_base", [False, True])
def test_a_resumed_lora_run_equals_an_uninterrupted_one(train, quantize_base):
    settings = {
        **LORA,
        "quantize_base": quantize_base,
        "max_train_steps": 4,
        "checkpointing_steps": 2,
        "ema_decay": 0.5,
        "train_batch_size": 2,
    }
    whole = train("whole", **settings)
    rest = train("rest", **settings, resume_from_checkpoint=whole.checkpoints[0])
    assert rest.numbers() == whole.numbers()[2:]
    assert torch.equal(rest.gradient(), whole.gradient())
    for part in (".", "ema"):
        a, b = (load_file(run.checkpoints[-1] / part / LORA_FILE) for run in (whole, rest))
        assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a), part


def test_a_base_in_8_bit_takes_a_byte_a_weight_and_trains_the_same_adapters(train, tiny_flux, monkeypatch):
    trainers, real = [], train_grpo_flux.train
    monkeypatch.setattr(train_grpo_flux, "train", lambda t, *rest: trainers.append(t) or real(t, *rest))
    plain, run = (train(**LORA, mixed_precision="bf16", quantize_base=q) for q in (False, True))
    base = load_transformer(tiny_flux).state_dict()
    held = {name.replace(".base_layer", ""): p for name, p in trainers[1].engine.transformer.state_dict().items()}
    in_bytes = [name for name, p in held.items() if p.dtype == torch.int8]
    inside = [n for n, p in base.items() if "transformer_blocks." in n and n.endswith("weight") and p.ndim == 2]
    assert sorted(in_bytes) == sorted(inside) and sum(base[name].numel() for name in in_bytes) > 1e6
    for name in in_bytes:
        step = held[name.replace(".weight", ".scale")][:, None]
        assert ((held[name] * step - base[name]).abs() <= 0.5001 * step).all(), name
    assert all(torch.equal(p, held[name]) for name, p in base.items() if name not in in_bytes)
    assert [line["optimizer_steps"] for line in run.metrics] == [2, 2]
    assert max(line["ratio_first_deviation"] for line in run.metrics) < 1e-5  # a tenth of the clip range
    assert run.metrics[0]["grad_norm"] == pytest.approx(plain.metrics[0]["grad_norm"], rel=0.1)
    a, b = (load_file(r.checkpoints[-1] / LORA_FILE) for r in (run, plain))
    assert {name: (p.shape, p.dtype) for name, p in a.items()} == {name: (p.shape, p.dtype) for name, p in b.items()}


@pytest.mark.parametrize("name,value", [("lora_rank", 8), ("lora_alpha", 4), ("lora_target_modules", ["to_q"])])
def test_adapters_of_another_shape_are_not_resumed(train, capsys, name, value):
    run = train(**LORA, max_train_steps=1)
    with pytest.raises(SystemExit) as stop:
        train(**{**LORA, name: value}, resume_from_checkpoint=run.checkpoints[-1])
    assert stop.value.code == 2
    assert f"--{name}" in capsys.readouterr().err.splitlines()[-1]


@pytest.fixture
def adapters(train) -> Path:
    """A LoRA checkpoint whose pictures differ from the base model's."""
    return train(**{**LORA, "learning_rate": 3e-2}, max_train_steps=4).checkpoints[-1]


def test_a_merged_model_computes_what_the_adapters_do(adapters, tiny_flux, tmp_path):
    merged = tmp_path / "merged"
    argv = ["--pretrained_model_name_or_path", tiny_flux, "--model_path", str(adapters), "--output_dir", str(merged)]
    merge_lora.main([*argv, "--dtype", "fp32"])
    whole, base = FluxTransformer2DModel.from_pretrained(merged), load_transformer(tiny_flux)
    assert not any("lora" in name for name in whole.state_dict())
    with_adapters = predict(load_with_lora(tiny_flux, str(adapters)))
    torch.testing.assert_close(predict(whole), with_adapters, rtol=1e-4, atol=1e-5)
    assert (predict(base) - with_adapters).abs().max() > 0.05
    with pytest.raises(SystemExit):  # the folder is in use
        merge_lora.main(argv)


def test_two_merges_dont_mix_and_a_killed_or_failed_one_leaves_nothing(
    adapters, tiny_flux, tmp_path, refused, monkeypatch
):
    argv = ["--pretrained_model_name_or_path", tiny_flux, "--model_path", str(adapters)]
    argv += ["--output_dir", str(tmp_path / "merged")]
    with FolderLock("output_dir", tmp_path / "merged") as other:
        other.take()
        with refused(f"--output_dir .*merged: process {os.getpid()} on .* is working in it"):
            merge_lora.main(argv)
    with monkeypatch.context() as patched:
        patched.setattr(merge_lora, "usual_modes", full_disk)
        with refused("--output_dir .*merged: can't be written: .*No space left on device"):
            merge_lora.main(argv)
    assert not (tmp_path / "merged").exists()
    (tmp_path / "merged/.part").mkdir(parents=True)  # of a killed merge
    (tmp_path / "merged/.part/config.json").write_text("{")
    merge_lora.main(argv)
    files = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "merged").iterdir()}
    usual = (tmp_path / "merged/config.json").stat().st_mode & 0o777
    assert files == dict.fromkeys(("checkpoint.json", "config.json", "diffusion_pytorch_model.safetensors"), usual)


def full_disk(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_merging_takes_the_base_model_that_the_checkpoint_names_and_no_other(
    adapters, tiny_flux, random_flux, tmp_path, capsys
):
    argv = ["--model_path", str(adapters), "--dtype", "fp32", "--output_dir"]
    merge_lora.main([*argv, str(tmp_path / "merged")])
    expected = load_with_lora(tiny_flux, str(adapters))
    torch.testing.assert_close(predict(load_transformer(str(tmp_path / "merged"))), predict(expected))
    with pytest.raises(SystemExit) as stop:
        merge_lora.main([*argv, str(tmp_path / "other"), "--pretrained_model_name_or_path", str(random_flux)])
    assert stop.value.code == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert f"--model_path {adapters}: was trained from another base model ({tiny_flux})" in last
    (tmp_path / "damaged/transformer").mkdir(parents=True)
    (tmp_path / "damaged/transformer/diffusion_pytorch_model.safetensors.index.json").write_text("{")
    with pytest.raises(SystemExit):
        merge_lora.main([*argv, str(tmp_path / "third"), "--pretrained_model_name_or_path", str(tmp_path / "damaged")])
    assert "damaged: diffusion_pytorch_model.safetensors.index.json isn't" in capsys.readouterr().err.splitlines()[-1]
    (adapters / "checkpoint.json").write_text('{"format": 1}')
    with pytest.raises(SystemExit):
        merge_lora.main([*argv, str(tmp_path / "third")])
    assert "checkpoint.json doesn't name its base model" in capsys.readouterr().err.splitlines()[-1]
    (adapters / "checkpoint.json").unlink()
    with pytest.raises(SystemExit):
        merge_lora.main([*argv, str(tmp_path / "third")])
    assert "--pretrained_model_name_or_path: needed" in capsys.readouterr().err.splitlines()[-1]


def test_diffusers_loads_the_adapters_with_their_scale(adapters, tiny_flux):
    pipe = FluxPipeline.from_pretrained(tiny_flux, dtype=torch.float32)
    pipe.load_lora_weights(adapters)
    assert torch.equal(predict(pipe.transformer), predict(load_with_lora(tiny_flux, str(adapters))))
    (config,) = pipe.transformer.peft_config.values()
    assert (config.r, config.lora_alpha) == (4, 8)


def test_sampling_takes_a_lora_checkpoint_and_can_hand_over_to_the_base_model(adapters, tiny_flux, tmp_path):
    (tmp_path / "prompts.txt").write_text("a red circle\n")
    merged = tmp_path / "merged"
    base = ["--pretrained_model_name_or_path", tiny_flux]
    merge_lora.main([*base, "--model_path", str(adapters), "--output_dir", str(merged), "--dtype", "fp32"])

    def sample(name: str, *flags: str) -> Image.Image:
        common = f"--prompts_file {tmp_path}/prompts.txt --output_dir {tmp_path}/{name} --h 32 --w 32 --device cpu"
        known = base if "--baseline" in flags else []  # the other models name it
        manifest = sample_flux.main([*known, *common.split(), "--total_sampling_steps", "4", *flags])
        (entry,) = json.loads(manifest.read_text())
        return Image.open(manifest.parent / entry["image"]).convert("RGB")

    def difference(a: Image.Image, b: Image.Image) -> int:
        return int(np.abs(np.asarray(a, int) - np.asarray(b, int)).max())

    half = ("--mix_sampling_steps", "2")
    for name, more in (("whole", ()), ("half", half)):
        pictures = [sample(f"{name}{i}", "--model_path", str(path), *more) for i, path in enumerate((adapters, merged))]
        assert difference(*pictures) <= 2, name
    assert difference(sample("whole0", "--model_path", str(adapters)), sample("base", "--baseline")) > 8
    assert difference(sample("half0", "--model_path", str(adapters), *half), sample("base", "--baseline")) > 2


def test_adapters_start_from_a_file_whatever_its_alpha(train, tiny_flux):
    """Here from a run's own checkpoint, whose adapters then act with half of their alpha: B is twice as large."""
    first = train("first", **LORA, max_train_steps=1)
    given = {**LORA, "lora_alpha": 4, "lora_init": first.checkpoints[0], "max_train_steps": 1}
    second = train("second", **given | {"learning_rate": 1e-12})  # hardly trains
    before, after = (load_file(run.checkpoints[0] / LORA_FILE) for run in (first, second))
    for name, weight in before.items():
        factor = {"lora_B": 2, "alpha": 0.5}.get(next((p for p in ("lora_B", "alpha") if p in name), ""), 1)
        torch.testing.assert_close(after[name], weight * factor, rtol=1e-4, atol=1e-7)
    whole = train("whole", **{**given, "learning_rate": 1e-3}, ref_kl_coeff=1e-9)
    assert whole.metrics[0]["ref_kl_loss"] == pytest.approx(0, abs=1e-6)  # the reference starts there too


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ({**LORA, "lora_rank": 8}, "has rank 4, --lora_rank is 8"),
        ({**LORA, "lora_target_modules": ["to_q"]}, "its layers aren't those of --lora_target_modules"),
        ({}, "goes with --use_lora"),
        ({**LORA, "lora_init": "nowhere"}, "no LoRA file"),
    ],
    ids=["rank", "layers", "no LoRA", "no file"],
)
def test_a_start_of_another_shape_is_refused_before_any_weight_is_loaded(
    adapters, train, capsys, monkeypatch, given, problem
):
    monkeypatch.setattr(train_grpo_flux, "set_up", lambda *_: pytest.fail("a run was set up"))
    with pytest.raises(SystemExit):
        train("other", **{"lora_init": adapters, **given})
    error = capsys.readouterr().err
    assert problem in error and "--lora_init" in error
